"""Jobs on a real Slurm are interrupted in many ways, and lose nothing."""

import dataclasses
import json
import os
import shutil
import signal

import pytest

from cluster import local_slurm
from cluster.commands import resume_command
from cluster.environment import parse_duration
from cluster.job import ATTEMPTS_FILE
from cluster.status import attempt_count, cancel, logs, newest_job, status
from data_prep.chunks import PLAN_FILE
from flowar.base.errors import UserError
from flowar.base.leases import Leases
from flowar.config.data import PrepareConfig, VAEConfig
from flowar.config.jobs import DoctorConfig
from flowar.config.training import ParallelConfig
from flowar.training.report import read_metrics
from tests.cluster.conftest import (
    WAIT_S,
    assert_same_weights,
    newest_step,
    processes_of,
    read_logs,
    run,
    steps_printed,
)
from tests.conftest import MORE, TRAININGS
from tests.flowar.ranks import run_ranks
from tests.flowar.training.test_engines import LOSS_TOLERANCE

pytestmark = pytest.mark.slow
ENDLESS = 1_000_000  # steps: a run that ends only when a test ends it
FEW_STEPS = 10
STOP_BEFORE_END_S, STILL_STARTING_S = 100, 105  # of the two minutes of a job that should stop itself
STOPPED, RESUMED = r"stopped by SIG\w+ after step ([\d,]+), saved", r"resuming from \S*step_(\d+)"


def settings(shards, run_dir, steps=ENDLESS, family="flowar", **changes):
    """A run whose steps don't depend on its length, as its learning rate is constant after the warm-up."""
    usual = TRAININGS[family](shards, run_dir)
    fixed = {
        "model": dataclasses.replace(usual.model, dropout=0.0) if family == "flowar" else usual.model,
        "optim": dataclasses.replace(usual.optim, lr=1e-4, min_lr=1e-4),
        "epochs": steps / 2,
        "batch_size": 12,
        "log_every_steps": 1,
        "save_every_steps": 5,
        "parallel": ParallelConfig(timeout_s=WAIT_S),
    }
    return dataclasses.replace(usual, **(fixed | changes))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Return the run of a given number of steps on two processes without Slurm; or a longer one with `at_least`."""
    runs = {}

    def run_undisturbed(steps, at_least=False, family="flowar"):
        fitting = [count for count, kind in runs if kind == family and (count == steps or (at_least and count > steps))]
        if not fitting:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            run_ranks(settings(shards, run_dir, steps, family), 2, run_dir.parent / "log")
            runs[steps, family] = run_dir
        return runs[min(fitting, default=steps), family]

    return run_undisturbed


def assert_every_step_once(run_dir, steps):
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, steps + 1))


def assert_same_losses(run_dir, needed):
    for record, other in zip(read_metrics(run_dir), read_metrics(needed), strict=False):
        assert record["step"] == other["step"]
        assert record["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE), record["step"]


def signalled(name):
    def disturb(slurm, job):
        run("scancel", f"--signal={name}", *job.ids)

    return disturb


def requeued(slurm, job):
    run("scontrol", "requeue", *job.ids)


def killed(slurm, job):
    os.kill(processes_of(job.ids[0])[1].pid, signal.SIGKILL)


def lost_node(slurm, job):
    """Lose the node of the first task and of the batch script, both of which stay alive and wake up too late."""
    starts = attempt_count(job, job.ids[0])
    first, _ = nodes = json.loads((job.folder / ATTEMPTS_FILE).read_text().splitlines()[-1])["hosts"]
    tasks = processes_of(job.ids[0])
    assert len(tasks) == len(nodes) == 2
    for task in tasks:
        task.suspend()
    os.kill(int((slurm.folder / f"{first}.pid").read_text()), signal.SIGKILL)
    run("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=lost")  # Slurm itself waits for SlurmdTimeout
    tasks[1].kill()  # as Slurm does, but only after KillWait
    slurm.wait_for(lambda: attempt_count(job, job.ids[0]) == starts + 1, "one more start")
    tasks[0].resume()
    tasks[0].wait(timeout=WAIT_S)
    local_slurm.start_node(slurm.folder, first)


def out_of_time(slurm, job):
    """Requeue with two minutes for the new start, and one more if it would have to stop before its first step."""
    (job_id,) = job.ids
    run_dir, stops = job.folder.parents[1], len(steps_printed(job, STOPPED))
    run("scontrol", "requeue", job_id)
    run("scontrol", "update", f"JobId={job_id}", "TimeLimit=2")

    def has_stopped_twice():
        left = parse_duration(run("squeue", "-h", "-t", "RUNNING", "-j", job_id, "-o", "%L"))
        stopped = steps_printed(job, STOPPED)
        if left is not None and left < STILL_STARTING_S and read_metrics(run_dir)[-1]["step"] == stopped[-1]:
            run("scontrol", "update", f"JobId={job_id}", "TimeLimit=+1")
        return len(stopped) == stops + 2

    slurm.wait_for(has_stopped_twice, "a stop before the end of the time")
    run("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")


def disturb_in_turn(slurm, job, run_dir, disturbances):
    """Disturb a run after it has gained a checkpoint in each of its starts, then cancel it; return the steps of these.

    The run has no end, so its job ends only when it is cancelled.
    """
    seen = []
    for disturb in disturbances:
        resumed = steps_printed(job, RESUMED)
        slurm.wait_for_checkpoint(run_dir, job, after=resumed[-1] if resumed else 0)
        seen.append(newest_step(run_dir))
        starts = len(resumed) + (2 if disturb is out_of_time else 1)
        disturb(slurm, job)
        slurm.wait_for(lambda starts=starts: len(steps_printed(job, RESUMED)) == starts, "a resumed start")
    slurm.wait_for_checkpoint(run_dir, job, after=steps_printed(job, RESUMED)[-1])
    cancel([str(run_dir)])
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", job.ids[0]), "the end of the job")
    return seen


def test_a_job_that_is_disturbed_in_every_way_ends_with_the_bits_of_an_undisturbed_run(
    slurm, shards, undisturbed, tmp_path
):
    """If it is asked to stop, or out of time, it loses no step; if a task or node dies, it resumes from a checkpoint.

    Slurm's own signal before the end of the time is switched off, as it doesn't always arrive.
    """
    run_dir = tmp_path / "run"
    limits = (f"cluster.stop_before_end_s={STOP_BEFORE_END_S}", "cluster.sbatch.signal=USR2@0")
    job = slurm.submit("train", settings(shards, run_dir), run_dir, *limits)
    failures = job.mark("failures", job.ids[0])

    seen = disturb_in_turn(slurm, job, run_dir, [signalled("USR2"), killed, lost_node, out_of_time])

    stopped, resumed = steps_printed(job, STOPPED), steps_printed(job, RESUMED)
    by_usr2, by_requeue, by_itself, by_cancel = stopped
    assert [resumed[0], *resumed[3:]] == [by_usr2, by_requeue, by_itself], read_logs(job)
    assert resumed[1] >= seen[1] and resumed[2] >= seen[2], read_logs(job)
    assert attempt_count(job, job.ids[0]) == 6 and not failures.exists()
    assert_every_step_once(run_dir, by_cancel)
    assert_same_weights(run_dir, undisturbed(by_cancel))


SICK_AND_SLOW = """
import errno, os, pathlib

folder, read = pathlib.Path({folder!r}), os.preadv

def preadv(*arguments):
    sick, failed = folder / "sick", folder / "failed"
    if not sick.exists():
        sick.write_text(os.environ["SLURMD_NODENAME"])
    if sick.read_text() == os.environ["SLURMD_NODENAME"]:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    if not failed.exists():
        failed.touch()
        raise OSError(errno.EIO, "Input/output error")
    return read(*arguments)

if os.environ.get("SLURM_PROCID") == "1":
    os.preadv = preadv
"""


def test_a_sick_gpu_costs_one_node_and_a_single_storage_failure_costs_nothing(
    slurm, shards, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(SICK_AND_SLOW.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))  # sbatch passes it on
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(shards, run_dir, FEW_STEPS), run_dir)
    slurm.wait_until_finished(job)
    sick = (tmp_path / "sick").read_text()
    first, second = (json.loads(line)["hosts"] for line in (job.folder / ATTEMPTS_FILE).read_text().splitlines())
    assert sick in first and sick not in second
    failure = job.mark("failures", job.ids[0]).read_text()
    assert f"hardware failed, task 1 on {sick}" in failure and "uncorrectable ECC error" in failure
    assert "Input/output error; trying again in 1 s" in read_logs(job)
    assert_every_step_once(run_dir, FEW_STEPS)
    assert_same_losses(run_dir, undisturbed(FEW_STEPS, at_least=True))


@MORE
@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_job_that_gets_another_stop_signal_loses_no_step(slurm, shards, undisturbed, tmp_path, name):
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(shards, run_dir), run_dir)
    disturb_in_turn(slurm, job, run_dir, [signalled(name)])
    stopped = steps_printed(job, STOPPED)
    assert stopped[:1] == steps_printed(job, RESUMED) and len(stopped) == 2, read_logs(job)
    assert_every_step_once(run_dir, stopped[-1])
    assert_same_weights(run_dir, undisturbed(stopped[-1]))


def test_three_nodes_then_two(slurm, shards, undisturbed, tmp_path, capsys, monkeypatch):
    """`flowar cancel`, then `flowar resume` from another folder with fewer nodes, under FSDP; status and logs."""
    run_dir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    config = settings(shards, "run", parallel=ParallelConfig(engine="fsdp", timeout_s=WAIT_S))
    first = slurm.submit("train", config, run_dir, "cluster.nodes=3")
    monkeypatch.chdir("/")
    slurm.wait_for_checkpoint(run_dir, first)
    with pytest.raises(UserError, match=rf"is in use by job {first.ids[0]} \(train\); wait for it, or cancel it with"):
        resume_command([str(run_dir), "nodes=2"])
    capsys.readouterr()
    status([str(run_dir)])
    assert f" {first.ids[0]} " in (shown := capsys.readouterr().out) and "RUNNING" in shown and "n[1-3]" in shown
    cancel([str(run_dir)])
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", first.ids[0]), "the end of the first job")
    resume_command([str(run_dir), "nodes=2"])
    second = newest_job(run_dir)
    assert second.ids != first.ids and second.code == first.code
    (stopped,) = steps_printed(first, STOPPED)
    slurm.wait_for_checkpoint(run_dir, second, after=stopped)
    cancel([str(run_dir)])
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", second.ids[0]), "the end of the second job")
    assert steps_printed(second, RESUMED) == [stopped]
    (steps,) = steps_printed(second, STOPPED)
    assert_every_step_once(run_dir, steps)
    assert_same_losses(run_dir, undisturbed(steps, at_least=True))
    capsys.readouterr()
    status([str(run_dir)])
    assert capsys.readouterr().out.count("CANCELLED") == 2
    logs([str(run_dir), "--rank", "1"])


@pytest.mark.parametrize("family", ["arflow", pytest.param("flowar", marks=MORE)])
def test_two_tasks_on_each_of_two_nodes_train_with_deepspeed(slurm, shards, undisturbed, tmp_path, capsys, family):
    """What runs is the copy of the code; status shows the end."""
    run_dir = tmp_path / "run"
    zero = ParallelConfig(engine="deepspeed", timeout_s=WAIT_S)
    config = settings(shards, run_dir, FEW_STEPS, family, parallel=zero)
    job = slurm.submit("train", config, run_dir, "cluster.tasks_per_node=2")
    slurm.wait_until_finished(job)
    assert_every_step_once(run_dir, FEW_STEPS)
    assert_same_losses(run_dir, undisturbed(FEW_STEPS, at_least=True, family=family))
    (attempt,) = (json.loads(line) for line in (job.folder / ATTEMPTS_FILE).read_text().splitlines())
    assert attempt["code"] == str(job.folder / "code") and attempt["hosts"] == ["n1", "n2"]
    assert "torch" in json.loads((job.folder / "environment.json").read_text())["packages"]
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", job.ids[0]), "the end of the job")
    capsys.readouterr()
    status([str(run_dir)])
    shown = capsys.readouterr().out
    assert "FINISHED" in shown and f"{FEW_STEPS}, 0:0" in shown


def test_an_error_in_our_code_is_shown_and_not_retried(slurm, shards, tmp_path, capsys):
    data = shutil.copytree(shards, tmp_path / "data")
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(data, run_dir), run_dir, "cluster.sbatch.begin=now+3600")
    shutil.rmtree(data)  # before the start, which `wait_for` brings about
    slurm.wait_for(lambda: job.mark("failed", job.ids[0]).exists(), "the failure")
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", job.ids[0]), "the end of the job")
    assert attempt_count(job, job.ids[0]) == 1
    capsys.readouterr()
    status([str(run_dir)])
    shown = capsys.readouterr().out
    assert "FAILED" in shown and str(data) in shown.replace("\n", "")


def test_the_doctor_sees_every_node(slurm, shards, tmp_path):
    run_dir = tmp_path / "run"
    limits = {"write_mib": 2, "message_mib": 1, "min_share": 0.01, "min_open_files": 1, "min_shm_gib": 0.0}
    config = DoctorConfig(run_dir=str(run_dir), data=str(shards), **limits)
    job = slurm.submit("doctor", config, run_dir, "cluster.nodes=4")
    slurm.wait_until_finished(job)
    seen = json.loads((run_dir / "doctor.json").read_text())["seen"]
    assert [one["node"] for one in seen] == ["n1", "n2", "n3", "n4"]
    assert all(one["all_reduce_gb_per_s"] > 0 for one in seen) and "fit: n1, n2, n3, n4" in read_logs(job)


def test_a_job_whose_task_always_dies_is_stopped(slurm, tmp_path):
    """A signal from the batch script's setup kills it, long before Python starts."""
    job = slurm.submit(
        "doctor", DoctorConfig(run_dir=str(tmp_path / "run")), tmp_path / "run", "cluster.python=false",
        "cluster.nodes=1", "cluster.max_restarts=1",
    )  # fmt: skip
    slurm.wait_for(lambda: job.mark("failed", job.ids[0]).exists(), "giving up")
    assert job.mark("failed", job.ids[0]).read_text().startswith("no gain in 2 starts, the last: exit code ")
    assert len(job.mark("failures", job.ids[0]).read_text().splitlines()) == 2


def test_every_element_of_an_array_is_restarted(slurm, image_folder, tmp_path):
    """Including the element with the array's own number. They can't finish while this process holds the claim."""
    config = PrepareConfig(
        images=str(image_folder),
        out_dir=str(tmp_path / "data"),
        vae=VAEConfig(name="demo"),
        image_size=32,
        num_workers=0,
    )
    with Leases(tmp_path / "data.claims", config.lease_s) as leases:
        assert leases.claim("merge")
        job = slurm.submit("prepare", config, tmp_path / "data", "cluster.array=2", "cluster.nodes=1")
        slurm.wait_for(lambda: all(attempt_count(job, job_id) == 1 for job_id in job.ids), "both starts")
        slurm.wait_for((tmp_path / "data.partial" / PLAN_FILE).exists, "the start of the work")
        run("scancel", "--signal=USR2", *job.ids)
        slurm.wait_for(lambda: all(attempt_count(job, job_id) == 2 for job_id in job.ids), "both starts again")
        assert not (tmp_path / "data").exists()
    slurm.wait_until_finished(job)
    assert [attempt_count(job, job_id) for job_id in job.ids] == [2, 2], read_logs(job)
    assert (tmp_path / "data" / "dataset.json").exists()
