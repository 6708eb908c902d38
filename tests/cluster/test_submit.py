"""What `flowar submit` refuses, and what it would pass to Slurm."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import psutil
import pytest

from cluster.commands import submit_command as submit
from cluster.environment import (
    TaskEnvironment,
    check_resources,
    export_for_torch,
    first_lines,
    last_lines,
    parse_duration,
)
from cluster.job import Job, Task
from cluster.status import cancel, find_jobs, logs, newest_job, status
from cluster.submit import PlannedJob, check
from flowar.base.errors import UserError
from flowar.base.run_folder import Progress, find_latest
from flowar.config.jobs import ClusterConfig
from flowar.training.report import read_metrics
from tests.cluster.conftest import WAIT_S
from tests.conftest import training

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "configs" / "cluster"


def train_words(shards, run_dir, *words):
    """The command line of a small training run."""
    from flowar.config.load import describe_config

    file = run_dir.with_suffix(".yaml")
    file.write_text(describe_config(training(shards, run_dir)))
    return ["train", str(file), *words]


def refused(words, match, cluster):
    with pytest.raises(UserError, match=match):
        submit([*words, "--cluster", str(cluster)])


def test_what_slurm_would_refuse_is_refused_before_submission(slurm, shards, tmp_path):
    words = train_words(shards, tmp_path / "run")
    one = "cluster.nodes=1"
    refused(
        [*words, one, "cluster.partition=gpu"], r"partition=gpu; the partitions are local, h100\)$", slurm.cluster_file
    )
    refused(
        [*words, one, "cluster.partition=h100", "cluster.account=yours"],
        "cluster.account=yours may not use cluster.partition=h100; use one of its accounts, my_account, or",
        slurm.cluster_file,
    )
    refused([*words, "cluster.nodes=5", "batch_size=10"], "Slurm refuses the train job: .*node", slurm.cluster_file)
    assert not (tmp_path / "run").exists()


def test_errors_in_the_settings_are_found_before_submission(slurm, shards, tmp_path):
    words = train_words(shards, tmp_path / "run")
    refused([*words, "batch_siz=8"], "batch_siz is not a setting; did you mean batch_size", slurm.cluster_file)
    refused([*words, "cluster.node=3"], "node is not a setting; did you mean nodes", slurm.cluster_file)
    refused([*words, "cluster.nodes=3"], "batch_size=8 is not a multiple of 3 processes; try", slurm.cluster_file)
    refused([*words, "data.path=/nowhere"], "/nowhere", slurm.cluster_file)
    refused(
        [*words, "cluster.array=2"],
        "can't share its work between jobs, only prepare, sample, .* can",
        slurm.cluster_file,
    )
    refused([*words, "cluster.time_min=1"], "stop_before_end_s=60 is not less than", slurm.cluster_file)
    refused(["trian"], "'trian' can't be submitted as a job; did you mean train", slurm.cluster_file)
    refused(words, "there is no config file", tmp_path / "none.yaml")
    assert not (tmp_path / "run").exists()


def test_without_slurm_one_line_says_what_to_do(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(train_words(shards, tmp_path / "run"), r"no Slurm on this machine .*local.yaml$", CLUSTERS / "a100.yaml")


def test_the_h100_example_is_accepted_by_sbatch_and_is_what_the_docs_show(slurm, shards, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    words = train_words(shards, Path("runs/h"), "batch_size=16", "--dry-run", "--cluster", str(CLUSTERS / "h100.yaml"))
    submit(words)
    printed = capsys.readouterr().out
    assert "batch_size: 16" in printed
    script = printed[printed.index("#!/bin/bash") :].strip()
    result = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    assert result.returncode == 0 and "to start at" in result.stderr, result.stderr
    assert not (tmp_path / "runs" / "h").exists()
    shown = script.replace(str(tmp_path), "/home/me").replace(sys.executable, "/home/me/flowar/.venv/bin/python")
    assert shown.replace("\n\n\n", "\n\n") in (ROOT / "docs" / "cluster.md").read_text()


def test_every_start_of_a_job_uses_its_own_port(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    task = {"SLURM_JOB_ID": 70, "SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "SLURM_JOB_NUM_NODES": 1}
    task |= {"SLURM_NODEID": 0, "SLURM_JOB_NODELIST": "n1", "SUBMITIT_EXECUTOR": "slurm"}
    ports = set()
    for job, restarts in product((70, 71, 72), range(6)):
        os.environ |= {name: str(value) for name, value in task.items()}
        os.environ |= {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts)}
        export_for_torch()
        ports.add(int(os.environ["MASTER_PORT"]))
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
    assert len(ports) == 18 and min(ports) >= 20_000 and max(ports) < 32_000


def test_a_task_with_fewer_resources_than_requested_says_so():
    from flowar.config.jobs import ClusterConfig

    task = TaskEnvironment("7", restarts=0, rank=0, num_tasks=1, hosts=("n1",), cpus_asked=10_000)
    with pytest.raises(
        UserError, match=r"cpus_per_task=10000 was requested, but this task can use only \d+ CPUs on node"
    ):
        check_resources(task, ClusterConfig())
    with pytest.raises(UserError, match=r"gpus_per_node=99 was requested, but torch sees \d+ on node"):
        check_resources(dataclasses.replace(task, cpus_asked=1), ClusterConfig(gpus_per_node=99))


@pytest.mark.parametrize("name", [file.name for file in sorted(CLUSTERS.glob("*.yaml"))])
def test_every_example_of_a_cluster_loads(name):
    from flowar.config.jobs import ClusterConfig
    from flowar.config.load import load_config

    load_config(ClusterConfig, CLUSTERS / name)


def test_durations_of_slurm():
    assert parse_duration("1-02:03:04") == 93784 and parse_duration("10:00") == 600 and parse_duration("59") == 59
    assert parse_duration("UNLIMITED") is None and parse_duration("") is None and parse_duration("INVALID") is None


@pytest.mark.slow
def test_the_job_folder_records_code_environment_and_changes(slurm, shards, tmp_path):
    """The code comes from a repository with a change that is not committed."""
    root = tmp_path / "repository"
    for package in ("flowar", "cluster", "data_prep"):
        shutil.copytree(ROOT / package, root / package)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    source = root / "flowar" / "base" / "errors.py"
    source.write_text(source.read_text() + "\nCHANGED = True\n")
    words = train_words(shards, tmp_path / "run", "cluster.sbatch.begin=now+600", "--cluster", str(slurm.cluster_file))
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        f"from cluster.commands import submit_command; submit_command({words!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    job = newest_job(tmp_path / "run")
    recorded = json.loads((job.folder / "code.json").read_text())
    assert job.code == f"{recorded['commit'][:12]} + changes" and "+CHANGED" in (job.folder / "diff.patch").read_text()
    assert "CHANGED" in (job.folder / "code" / "flowar" / "base" / "errors.py").read_text()
    assert Job.load(job.folder) == job
    cancel([str(tmp_path / "run")])


@pytest.mark.slow
def test_processes_on_this_machine_by_the_local_scheduler(shards, tmp_path, capsys, monkeypatch):
    """They wait for a file, so that the test can check all messages about running processes."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nuntil [ -e {tmp_path}/go ]; do sleep 0.1; done\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = train_words(
        shards, Path("run"), "cluster.tasks_per_node=2", f"cluster.python={python}",
        "cluster.environment.OMP_NUM_THREADS=1", "--cluster", str(CLUSTERS / "local.yaml"),
    )  # fmt: skip
    submit(words)
    (job,) = find_jobs(Path("run"))
    capsys.readouterr()
    status(["run"])
    assert "RUNNING" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"is in use by job {job.ids[0]}"):
        submit(words)
    processes = [psutil.Process(int(job_id)) for job_id in job.ids]
    (tmp_path / "go").touch()
    _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
    assert not alive
    assert find_latest(tmp_path / "run").name == "step_00000030", (job.folder / f"{job.ids[0]}_0_log.err").read_text()
    assert len(read_metrics(tmp_path / "run")) == 6
    status([str(tmp_path / "run")])
    assert "FINISHED" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no log of rank 7; choose one of \d+_0_log.err"):
        logs([str(tmp_path / "run"), "--rank", "7"])


def test_relative_paths_of_a_resumed_job_start_at_the_folder_of_submission(shards, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    (first / "data").symlink_to(shards)
    settings = training(shards, tmp_path / "run")
    config = dataclasses.replace(settings, data=dataclasses.replace(settings.data, path="data"))
    cluster = ClusterConfig(scheduler="local")
    before = Job("train", cluster, tmp_path / "run" / "jobs" / "train-1", cwd=str(first))
    monkeypatch.chdir(second)
    check(PlannedJob("train", config, cluster, tmp_path / "run" / "jobs", again=before), alone=True)
    with pytest.raises(UserError, match="data.path=data"):
        check(PlannedJob("train", config, cluster, tmp_path / "run" / "jobs"), alone=True)


def test_failures_count_only_while_the_run_makes_no_progress(tmp_path):
    """Eight starts that die, each after a new checkpoint, then two without progress."""
    job = Job("train", ClusterConfig(), tmp_path, cwd=str(tmp_path))
    task = Task(job, TaskEnvironment("7", 0, 0, 1, ("n1",), 1))
    run_dir, failures, counts = tmp_path / "run", job.mark("failures", "7"), []
    for step in [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]:
        folder = run_dir / "checkpoints" / f"step_{step}"
        if step:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".metadata").touch()
            (folder / "state.json").write_text(json.dumps(Progress(step=step).as_record()))
        task._note_progress(str(run_dir))
        with failures.open("a") as file:  # as the batch script does
            file.write("died\n")
        counts.append(len(failures.read_text().splitlines()))
    assert counts == [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3]


def test_the_batch_script_excludes_sick_nodes_and_says_where_nccls_traces_are(tmp_path):
    """With a scontrol that only records how it was called."""
    shown = "JobState=RUNNING Restarts=1 ExcNodeList=n9 EndTime=1"
    fake = f'#!/bin/bash\necho "$@" >> calls\nif [ "$1" = show ]; then echo "{shown}"; fi\n'
    (tmp_path / "scontrol").write_text(fake)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "exclude_7.1").write_text("n2\nn1\nn2\n")
    (tmp_path / "nccl_7.1_rank_3").touch()
    script = "\n".join([*first_lines(tmp_path), "(exit 134)", *last_lines(tmp_path, 5)])
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    ended = subprocess.run(["bash", "-c", script], env={**os.environ, **job, "PATH": path}, cwd=tmp_path)
    assert ended.returncode == 0
    calls = [call for call in (tmp_path / "calls").read_text().splitlines() if not call.startswith("show")]
    assert calls == ["requeue 7", "update JobId=7 ExcNodeList=n9,n1,n2"]
    failure = (tmp_path / "failures_7").read_text()
    assert f"exit code 134; who waited for whom: {tmp_path}/nccl_7.1_rank_*, read by torchfrtrace" in failure
