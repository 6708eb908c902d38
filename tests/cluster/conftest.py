"""A real Slurm with four nodes on this machine, and what the tests do with it."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest
import torch

from cluster import local_slurm
from cluster.commands import submit_command as submit
from cluster.job import Job
from cluster.status import newest_job
from flowar.base.errors import UserError
from flowar.base.run_folder import checkpoint_step, find_latest
from flowar.config.load import describe_config

# Two nodes like those of configs/cluster/h100.yaml, as far as Slurm can tell.
H100 = """SlurmdParameters=config_overrides
NodeName=h[1-2] NodeAddr=127.0.0.1 NodeHostname={host} Port=[{first}-{last}] CPUs=192 RealMemory=2000000 Gres=gpu:h100:8
PartitionName=h100 Nodes=h[1-2] AllowAccounts=my_account MaxTime=2-0 State=UP
"""
# Nothing here may depend on the machine's speed: no node counts as lost and no task is killed because it is slow.
# And requeued jobs are checked every second.
PATIENT = """SlurmdTimeout=600
KillWait=60
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=200000
"""
WAIT_S = 600


class Slurm:
    """The running Slurm, seen from a test."""

    def __init__(self, folder: Path, cluster_file: Path) -> None:
        self.folder = folder
        self.cluster_file = cluster_file

    def submit(self, verb: str, config: object, folder: Path, *words: str) -> Job:
        """Submit a verb with these settings; `folder` is where its jobs are."""
        file = folder.with_name(f"{folder.name}-{verb}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(describe_config(config))
        submit([verb, str(file), "--cluster", str(self.cluster_file), *words])
        return newest_job(folder)

    def start_at_once(self) -> None:
        """Make requeued jobs start soon; Slurm would let them wait for two minutes."""
        soon = (datetime.now() + timedelta(seconds=10)).isoformat()
        for line in run("squeue", "-h", "-t", "PENDING", "-o", "%i %r %S").splitlines():
            job_id, reason, begin = line.split()
            if reason == "BeginTime" and begin != "N/A" and begin > soon:  # N/A: its time has come, and it starts next
                # Not at once: in the same second its tasks would be refused.
                subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now+2"], capture_output=True)

    def wait_for(self, done: object, what: str) -> None:
        """Wait until `done()` is true, which may take a requeue or two."""
        deadline = time.monotonic() + WAIT_S
        while not done():
            if time.monotonic() > deadline:
                log = self.folder / "slurmctld.log"
                raise AssertionError(f"{what} didn't happen\n{run('squeue')}\n{log.read_text()[-1000:]}")
            self.start_at_once()
            time.sleep(0.2)

    def wait_until_finished(self, job: Job) -> None:
        """Wait until all tasks of a job have finished or failed."""
        self.wait_for(lambda: all(ended(job, job_id) for job_id in job.ids), f"the end of {job.ids}")
        failures = [job.mark("failed", job_id) for job_id in job.ids if job.mark("failed", job_id).exists()]
        assert not failures, failures[0].read_text() + read_logs(job)

    def wait_for_checkpoint(self, run_dir: Path, job: Job, after: int = 0) -> None:
        """Wait until a run that doesn't end by itself has a checkpoint after this step."""
        self.wait_for(
            lambda: any(job.mark("failed", job_id).exists() for job_id in job.ids) or newest_step(run_dir) > after,
            f"a checkpoint in {run_dir} after step {after}",
        )
        assert not [job_id for job_id in job.ids if ended(job, job_id)], read_logs(job)


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint; 0 without a checkpoint."""
    latest = find_latest(run_dir)
    return 0 if latest is None else checkpoint_step(latest)


def ended(job: Job, job_id: str) -> bool:
    """Return whether a job's folder says that it is over."""
    return any(job.mark(kind, job_id).exists() for kind in ("finished", "failed"))


def run(*command: str) -> str:
    """Return what a command of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def read_logs(job: Job) -> str:
    """Return what all tasks printed."""
    return "".join(file.read_text() for file in sorted(job.folder.glob("*_log.*")))


def processes_of(job_id: str, node: str | None = None) -> list[psutil.Process]:
    """Return the tasks of a job, by rank."""
    found = {}
    for process in psutil.process_iter(["name"]):
        try:
            environment = process.environ() if process.info["name"].startswith("python") else {}
        except psutil.Error:
            continue
        is_task = environment.get("SLURM_JOB_ID") == job_id and "SLURM_PROCID" in environment
        if is_task and "submitit.core._submit" in process.cmdline():
            found[int(environment["SLURM_PROCID"])] = process
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread in this process; on a busy machine several threads can wait for each other for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A Slurm with the nodes n1 to n4, and two that look like H100 nodes."""
    folder = tmp_path_factory.mktemp("slurm") / "slurm"
    ports = local_slurm.free_ports(1)[0]
    more = PATIENT + H100.format(host=socket.gethostname(), first=ports, last=ports + 1)
    try:
        conf = local_slurm.start_slurm(folder, 4, more)
    except UserError as error:
        if os.environ.get("FLOWAR_TEST_NEEDS_SLURM"):
            raise
        pytest.skip(str(error))
    for number in range(8):
        os.mknod(folder / f"gpu{number}", 0o20600, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName=h[1-2] Name=gpu Type=h100 File={folder}/gpu[0-7]\n")
    cluster_file = folder / "cluster.yaml"
    cluster_file.write_text(
        "partition: local\nnodes: 2\ntime_min: 30\nstop_before_end_s: 60\n"
        "environment: {GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: '1'}\n"
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", str(conf))
        for name in ("h1", "h2"):
            local_slurm.start_node(folder, name)
        local_slurm.wait_until_idle(conf, ["h1", "h2"])
        yield Slurm(folder, cluster_file)
        for job_id in run("squeue", "-h", "-o", "%A").split():
            subprocess.run(["scancel", job_id], capture_output=True)
            for process in processes_of(job_id):  # left by a test that failed; its run may be endless
                process.kill()
        local_slurm.stop_slurm(folder)


def assert_same_weights(run_dir: Path, needed: Path, names: tuple[str, ...] = ("raw", "decay_0.9")) -> None:
    """Check that two runs ended with the same bits."""
    from flowar.models.folders import load_model

    for weights in names:
        found, expected = load_model(run_dir, weights).state_dict(), load_model(needed, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def steps_printed(job: Job, pattern: str) -> list[int]:
    """Return the step numbers that the first task printed in lines like `pattern`, with (.*) for the step."""
    log = job.folder / f"{job.ids[0]}_0_log.out"
    return [int(number.replace(",", "")) for number in re.findall(pattern, log.read_text() if log.exists() else "")]
