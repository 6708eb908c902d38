"""What Slurm says about this task -> the variables that torch reads. Nothing else reads SLURM_*.

submitit's JobEnvironment knows the names, for Slurm and for its local processes. Read next: job.py.
"""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment

from flowar.config import ClusterConfig
from flowar.errors import UserError

FIRST_PORT, NUM_PORTS = 20_000, 12_000  # below the range from which systems give ports to clients
ASK_S = 30  # for an answer of Slurm


@dataclass(frozen=True)
class Task:
    """This process's place in its job."""

    job_id: str  # 1234, or 1234_5 in an array
    restarts: int  # how often Slurm has started this job again
    rank: int
    num_tasks: int
    hosts: tuple[str, ...]
    cpus_asked: int


def read_task() -> Task:
    """Return what the scheduler says about this process."""
    given = JobEnvironment()
    return Task(
        job_id=given.job_id,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        rank=given.global_rank,
        num_tasks=given.num_tasks,
        hosts=tuple(given.hostnames),
        cpus_asked=int(os.environ.get("SLURM_CPUS_PER_TASK", "1")),
    )


def export_for_torch() -> None:
    """Set RANK, WORLD_SIZE and so on: the rendezvous is the first host, with a port that follows from the job's id."""
    given = JobEnvironment()
    os.environ |= {
        "RANK": str(given.global_rank),
        "WORLD_SIZE": str(given.num_tasks),
        "LOCAL_RANK": str(given.local_rank),
        "LOCAL_WORLD_SIZE": str(given.num_tasks // given.num_nodes),
        "MASTER_ADDR": "127.0.0.1" if given.num_nodes == 1 else find_address(given.hostnames[0]),
        "MASTER_PORT": str(FIRST_PORT + int(given.raw_job_id) % NUM_PORTS),
        "FLOWAR_JOB": given.job_id,
        "FLOWAR_NODE": node_name(),
    }


def node_name() -> str:
    """Return what the scheduler calls this machine."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def find_address(node: str) -> str:
    """Return where a node is reached: its name, or the address that Slurm has for it where no name server knows it."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    answer = subprocess.run(["scontrol", "show", "node", node, "-o"], capture_output=True, text=True, timeout=ASK_S)
    fields = dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)
    return fields.get("NodeAddr", node)


def check_resources(task: Task, cluster: ClusterConfig) -> None:
    """Check that this task may use what was asked for.

    Raises:
        UserError: if it got fewer CPUs or GPUs; names the node.
    """
    node = f"on node {node_name()}"
    cpus = len(os.sched_getaffinity(0))
    if cpus < task.cpus_asked:
        raise UserError(
            f"cpus_per_task={task.cpus_asked} was asked for, but this task may use {cpus} CPUs {node}; does srun get "
            "--cpus-per-task? Is the node's TaskPlugin right? To go on elsewhere, exclude the node"
        )
    if cluster.gpus_per_node:
        import torch  # only where there are GPUs: this takes seconds

        gpus = torch.cuda.device_count()
        if gpus < cluster.gpus_per_node:
            raise UserError(
                f"gpus_per_node={cluster.gpus_per_node} was asked for, but torch sees {gpus} {node} "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}): every task must see all of them, so "
                "leave --gpus-per-task out; to go on elsewhere, exclude the node"
            )


def seconds_left() -> float | None:
    """Return how long this job may still run; None without a limit, or without Slurm."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None or shutil.which("squeue") is None:
        return None
    answer = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%L"], capture_output=True, text=True, timeout=ASK_S)
    return parse_duration(answer.stdout.strip())


def parse_duration(text: str) -> float | None:
    """Return the seconds of Slurm's days-hours:minutes:seconds; None for UNLIMITED and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return 86_400 * int(days or 0) + seconds


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job or launcher around us: a job may be submitted from inside another one."""
    given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FLOWAR_JOB")
    schedulers = ("SLURM_", "SBATCH_", "SUBMITIT_")
    hidden = [name for name in os.environ if name in given or name.startswith(schedulers)]
    before = {name: os.environ.pop(name) for name in hidden if name != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(before)


def first_lines(folder: Path) -> list[str]:
    """Return what the batch script does before srun: nothing if all is done, else forget how the last start ended."""
    return [
        "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; id=${id:-$SLURM_JOB_ID}",
        f"cd {shlex.quote(str(folder))} || exit 1",
        'if [ -e "finished_$id" ]; then echo "finished before"; exit 0; fi',
        'rm -f "again_$id" "failed_$id"',
        'cd "$OLDPWD"',
    ]


def last_lines(folder: Path, max_restarts: int) -> list[str]:
    """Return what the batch script does after srun: finish, requeue, or leave it.

    In bash, as this also has to work where the tasks run in a container. Only a running job is requeued: not one that
    was cancelled, or that Slurm requeues by itself.
    """
    return [
        "rc=$?",
        f"cd {shlex.quote(str(folder))} || exit 1",
        "requeue() {",
        '  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T)',
        '  if [ "$state" != RUNNING ]; then echo "not requeued: the job is ${state:-gone}"; exit 1; fi',
        '  scontrol requeue "$SLURM_JOB_ID"; exit',
        "}",
        'if [ -e "failed_$id" ]; then cat "failed_$id"; exit 1; fi',
        'if [ -e "again_$id" ]; then rm "again_$id"; requeue; fi',
        'if [ $rc -eq 0 ]; then touch "finished_$id"; exit 0; fi',
        'echo "$(date -Is) exit code $rc on $SLURM_JOB_NODELIST" >> "failures_$id"',
        f'if [ "$(wc -l < "failures_$id")" -le {max_restarts} ]; then requeue; fi',
        f'echo "failed {max_restarts + 1} times" > "failed_$id"; exit $rc',
    ]
