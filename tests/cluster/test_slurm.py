"""Jobs on a real Slurm: what disturbs them, and that nothing is lost."""

import dataclasses
import json
import os
import shutil
import signal

import pytest

from cluster import local_slurm
from cluster.commands import resume_command
from cluster.status import attempt_count, cancel, logs, newest_job, status
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest
from flowar.config.data import PrepareConfig, VAEConfig
from flowar.config.jobs import DoctorConfig
from flowar.config.training import ParallelConfig
from flowar.training.report import read_metrics
from tests.cluster.conftest import assert_same_weights, processes_of, read_logs, run, steps_printed
from tests.conftest import MORE, training
from tests.flowar.ranks import run_ranks
from tests.flowar.training.test_engines import LOSS_TOLERANCE

pytestmark = pytest.mark.slow
STEPS, FEW_STEPS = 120, 40
STOPPED, RESUMED = r"stopped by SIG\w+ after step ([\d,]+), saved", r"resuming from \S*step_(\d+)"


def settings(shards, run_dir, **changes):
    model = dataclasses.replace(training(shards, run_dir).model, dropout=0.0)
    fixed = {
        "model": model,
        "epochs": STEPS / 2,
        "batch_size": 12,
        "log_every_steps": 1,
        "save_every_steps": 10,
        "parallel": ParallelConfig(timeout_s=20),
    }
    return training(shards, run_dir, **(fixed | changes))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The run on two processes without Slurm."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(settings(shards, run_dir), 2, run_dir.parent / "log")
    return run_dir


@pytest.fixture(scope="module")
def short(shards, tmp_path_factory):
    """A shorter run on one process."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    run_ranks(settings(shards, run_dir, epochs=FEW_STEPS / 2), 1, run_dir.parent / "log")
    return run_dir


def assert_every_step_once(run_dir, steps=STEPS):
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, steps + 1))


def assert_same_losses(run_dir, needed):
    for record, other in zip(read_metrics(run_dir), read_metrics(needed), strict=True):
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
    """The node of the first task and of the batch script, both of which live on and wake up too late."""
    assert run("squeue", "-h", "-j", job.ids[0], "-o", "%N").strip() == "n[1-2]"
    tasks = processes_of(job.ids[0])
    for task in tasks:
        task.suspend()
    os.kill(int((slurm.folder / "n1.pid").read_text()), signal.SIGKILL)
    slurm.wait_for(lambda: attempt_count(job, job.ids[0]) == 2, "a second start")
    tasks[0].resume()
    tasks[0].wait(timeout=60)
    local_slurm.start_node(slurm.folder, "n1")


@pytest.mark.parametrize(
    "disturb",
    [signalled("USR2"), pytest.param(signalled("TERM"), marks=MORE), requeued],
    ids=["USR2", "TERM", "requeue"],
)
def test_a_job_that_is_asked_to_stop_loses_no_step(slurm, shards, undisturbed, tmp_path, disturb):
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(shards, run_dir), run_dir)
    slurm.wait_for_checkpoint(run_dir, job)
    disturb(slurm, job)
    slurm.wait_until_finished(job)
    stopped, resumed = steps_printed(job, STOPPED), steps_printed(job, RESUMED)
    assert stopped == resumed and len(stopped) == 1, read_logs(job)
    assert_every_step_once(run_dir)
    assert_same_weights(run_dir, undisturbed)
    assert not job.mark("failures", job.ids[0]).exists()


@pytest.mark.parametrize("disturb", [killed, lost_node])
def test_a_job_whose_task_or_node_dies_goes_on_from_the_last_checkpoint(slurm, shards, undisturbed, tmp_path, disturb):
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(shards, run_dir), run_dir)
    slurm.wait_for_checkpoint(run_dir, job)
    latest = int(find_latest(run_dir).name[-8:])
    disturb(slurm, job)
    slurm.wait_until_finished(job)
    (resumed,) = steps_printed(job, RESUMED)
    assert resumed >= latest, read_logs(job)
    assert_every_step_once(run_dir)
    assert_same_weights(run_dir, undisturbed)


def test_a_job_stops_itself_before_its_time_is_over(slurm, shards, undisturbed, tmp_path):
    """Slurm's own signal is switched off, as it doesn't always come."""
    run_dir = tmp_path / "run"
    limits = ("cluster.time_min=1", "cluster.stop_before_end_s=46", "cluster.sbatch.signal=USR2@0")
    job = slurm.submit("train", settings(shards, run_dir, micro_batch_size=1), run_dir, *limits)
    slurm.wait_until_finished(job)
    stopped, resumed = steps_printed(job, STOPPED), steps_printed(job, RESUMED)
    assert stopped and stopped == resumed, read_logs(job)
    assert_every_step_once(run_dir)
    assert_same_losses(run_dir, undisturbed)


def test_four_nodes_then_two(slurm, shards, short, tmp_path, capsys, monkeypatch):
    """`flowar cancel`, then `flowar resume` from another folder with fewer nodes, under FSDP; status and logs."""
    run_dir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    fsdp = ParallelConfig(engine="fsdp", timeout_s=20)
    config = settings(shards, "run", epochs=FEW_STEPS / 2, parallel=fsdp)
    first = slurm.submit("train", config, run_dir, "cluster.nodes=4")
    monkeypatch.chdir("/")
    slurm.wait_for_checkpoint(run_dir, first)
    with pytest.raises(UserError, match=rf"is in use by job {first.ids[0]} \(train\); wait for it, or end it with"):
        resume_command([str(run_dir), "nodes=2"])
    capsys.readouterr()
    status([str(run_dir)])
    assert f" {first.ids[0]} " in (shown := capsys.readouterr().out) and "RUNNING" in shown and "n[1-4]" in shown
    cancel([str(run_dir)])
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", first.ids[0]), "the end of the first job")
    resume_command([str(run_dir), "nodes=2"])
    second = newest_job(run_dir)
    assert second.ids != first.ids and second.code == first.code
    slurm.wait_until_finished(second)
    assert steps_printed(first, STOPPED) == steps_printed(second, RESUMED)
    assert_every_step_once(run_dir, FEW_STEPS)
    assert_same_losses(run_dir, short)
    capsys.readouterr()
    status([str(run_dir)])
    shown = capsys.readouterr().out
    assert "FINISHED" in shown and "CANCELLED" in shown and f"{FEW_STEPS}, 0:0" in shown
    logs([str(run_dir), "--rank", "1"])


def test_two_tasks_on_each_of_two_nodes_train_with_deepspeed(slurm, shards, short, tmp_path):
    """What runs is the copy of the code."""
    run_dir = tmp_path / "run"
    zero = ParallelConfig(engine="deepspeed", timeout_s=20)
    config = settings(shards, run_dir, epochs=FEW_STEPS / 2, parallel=zero)
    job = slurm.submit("train", config, run_dir, "cluster.tasks_per_node=2")
    slurm.wait_until_finished(job)
    assert_every_step_once(run_dir, FEW_STEPS)
    assert_same_losses(run_dir, short)
    (attempt,) = (json.loads(line) for line in (job.folder / "attempts.jsonl").read_text().splitlines())
    assert attempt["code"] == str(job.folder / "code") and attempt["hosts"] == ["n1", "n2"]
    assert "torch" in json.loads((job.folder / "environment.json").read_text())["packages"]


def test_an_error_of_ours_is_shown_and_not_tried_again(slurm, shards, tmp_path, capsys):
    data = shutil.copytree(shards, tmp_path / "data")
    run_dir = tmp_path / "run"
    job = slurm.submit("train", settings(data, run_dir), run_dir)
    shutil.rmtree(data)
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


def test_a_task_that_dies_each_time_is_given_up(slurm, tmp_path):
    """Here by a signal from its own batch script's setup, long before Python starts."""
    job = slurm.submit(
        "doctor", DoctorConfig(run_dir=str(tmp_path / "run")), tmp_path / "run", "cluster.python=false",
        "cluster.nodes=1", "cluster.max_restarts=1",
    )  # fmt: skip
    slurm.wait_for(lambda: job.mark("failed", job.ids[0]).exists(), "giving up")
    assert job.mark("failed", job.ids[0]).read_text().startswith("no gain in 2 starts, the last: exit code ")
    assert len(job.mark("failures", job.ids[0]).read_text().splitlines()) == 2


def test_every_element_of_an_array_is_started_again(slurm, image_folder, tmp_path):
    """Also the one that has the array's own number."""
    config = PrepareConfig(
        images=str(image_folder),
        out_dir=str(tmp_path / "data"),
        vae=VAEConfig(name="demo"),
        image_size=32,
        num_workers=0,
    )
    job = slurm.submit("prepare", config, tmp_path / "data", "cluster.array=2", "cluster.nodes=1")
    slurm.wait_for(lambda: all(attempt_count(job, job_id) == 1 for job_id in job.ids), "both starts")
    run("scancel", "--signal=USR2", *job.ids)
    slurm.wait_until_finished(job)
    assert [attempt_count(job, job_id) for job_id in job.ids] == [2, 2], read_logs(job)
    assert (tmp_path / "data" / "dataset.json").exists()
