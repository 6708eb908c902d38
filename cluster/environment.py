"""Translate what Slurm says about this task into the variables that torch reads. No other module reads SLURM_*.

submitit's JobEnvironment knows the names, for Slurm and for its local processes. Read next: job.py.
"""

import contextlib
import os
import shlex
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from submitit import JobEnvironment

from flowar.base.errors import UserError
from flowar.base.failures import MachineError
from flowar.config.jobs import ClusterConfig

FIRST_PORT, NUM_PORTS = 20_000, 12_000  # below the range of ephemeral ports
PORTS_APART = 7919  # between the starts of one job, so that jobs submitted together don't collide
ASK_S = 30  # to wait for an answer from Slurm


@dataclass(frozen=True)
class TaskEnvironment:
    """This process's place in its job."""

    job_id: str  # 1234, or 1234_5 in an array
    restarts: int  # how often Slurm has restarted this job
    rank: int
    num_tasks: int
    hosts: tuple[str, ...]
    cpus_asked: int


def read_task() -> TaskEnvironment:
    """Return what the scheduler says about this process."""
    given = JobEnvironment()
    return TaskEnvironment(
        job_id=given.job_id,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        rank=given.global_rank,
        num_tasks=given.num_tasks,
        hosts=tuple(given.hostnames),
        cpus_asked=int(os.environ.get("SLURM_CPUS_PER_TASK", "1")),
    )


def export_for_torch() -> None:
    """Set RANK, WORLD_SIZE and so on.

    The rendezvous is the first host, with a port that follows from the job's id and its number of restarts, as the port
    of an earlier start may stay in use for minutes.
    """
    given = JobEnvironment()
    restarts = read_task().restarts
    os.environ |= {
        "RANK": str(given.global_rank),
        "WORLD_SIZE": str(given.num_tasks),
        "LOCAL_RANK": str(given.local_rank),
        "LOCAL_WORLD_SIZE": str(given.num_tasks // given.num_nodes),
        "MASTER_ADDR": "127.0.0.1" if given.num_nodes == 1 else find_address(given.hostnames[0]),
        "MASTER_PORT": str(FIRST_PORT + (int(given.raw_job_id) + PORTS_APART * restarts) % NUM_PORTS),
        "FLOWAR_JOB": given.job_id,
        "FLOWAR_NODE": scheduler_node_name(),
        "FLOWAR_NODES": ",".join(given.hostnames),
    }
    if given.num_nodes > 1 and (interface := route_to(find_address(given.hostnames[0 if given.node else 1]))):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def route_to(host: str) -> str:
    """Return the network interface that leads to a host; "" if that is loopback, or not known.

    gloo would take the interface with the address of this host's name, which may be loopback or slow.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(known.address == address for known in addresses):
                return "" if address.startswith("127.") else name
    return ""


def scheduler_node_name() -> str:
    """Return what the scheduler calls this machine."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def find_address(node: str) -> str:
    """Return the address of a node: its name, or Slurm's address for it if no name server knows the name."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with contextlib.suppress(FileNotFoundError):  # in a container there may be no scontrol
        answer = subprocess.run(["scontrol", "show", "node", node, "-o"], capture_output=True, text=True, timeout=ASK_S)
        fields = dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)
        return fields.get("NodeAddr", node)
    return node


def check_resources(task: TaskEnvironment, cluster: ClusterConfig) -> None:
    """Check that this task got the CPUs and GPUs that were requested.

    Raises:
        UserError: if it got fewer CPUs, which is a matter of settings; names the node.
        MachineError: if it sees fewer GPUs, so that the job restarts without this node.
    """
    node = f"on node {scheduler_node_name()}"
    cpus = len(os.sched_getaffinity(0))
    if cpus < task.cpus_asked:
        raise UserError(
            f"cpus_per_task={task.cpus_asked} was requested, but this task can use only {cpus} CPUs {node}; check that "
            "srun gets --cpus-per-task and that the node's TaskPlugin is right, or exclude the node"
        )
    if cluster.gpus_per_node:
        import torch  # takes seconds, so only on GPU nodes

        gpus = torch.cuda.device_count()
        if gpus < cluster.gpus_per_node:
            raise MachineError(
                f"gpus_per_node={cluster.gpus_per_node} was requested, but torch sees {gpus} {node} "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); every task must see all GPUs of its "
                "node, so leave out --gpus-per-task"
            )


def seconds_left() -> float | None:
    """Return how long this job may still run; None without a limit.

    Raises:
        OSError: if there is no squeue.
        subprocess.SubprocessError: if squeue doesn't answer.
    """
    command = ["squeue", "-h", "-j", JobEnvironment().job_id, "-o", "%L"]
    return parse_duration(subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout)


def parse_duration(text: str) -> float | None:
    """Return the seconds of Slurm's days-hours:minutes:seconds; None for UNLIMITED and the like."""
    days, _, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return 86_400 * int(days or 0) + seconds


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a surrounding job or launcher, as a job may be submitted from inside another one."""
    given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FLOWAR_JOB")
    schedulers = ("SLURM_", "SBATCH_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    hidden = [name for name in os.environ if name in given or name.startswith(schedulers)]
    before = {name: os.environ.pop(name) for name in hidden if name != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def with_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started inside the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_passed(names: Iterable[str], sbatch: Mapping[str, str]) -> None:
    """Check that sbatch passes these variables of its environment to the job.

    Raises:
        UserError: if --export leaves one out.
    """
    setting = "cluster.sbatch.export" if "export" in sbatch else "SBATCH_EXPORT"
    export = sbatch.get("export", os.environ.get("SBATCH_EXPORT", "ALL"))
    exported = [part.partition("=")[0] for part in export.split(",")]
    for name in names:
        if "ALL" not in exported and name not in exported:
            raise UserError(
                f"cluster.environment.{name} is passed from your shell, but {setting}={export} doesn't pass it to the "
                f"job; use ALL, or a list with {name} in it"
            )


def first_lines(folder: Path, passed: Iterable[str] = ()) -> list[str]:
    """Return the lines before srun; they end the script if the job is finished or a passed variable is missing."""
    lack = "was not passed by sbatch: submit the job again with `flowar resume`"
    return [
        "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; id=${id:-$SLURM_JOB_ID}",
        "n=${SLURM_RESTART_COUNT:-0}",
        f"cd {shlex.quote(str(folder))} || exit 1",
        'if [ -e "finished_$id" ]; then echo "finished before"; exit 0; fi',
        'rm -f "failed_$id" "cancelled_$id" "${id}"_*_result.pkl.save_tmp',  # submitit stumbles over the last ones
        *(f'[ -n "${{{name}+x}}" ] || {{ echo "{name} {lack}" > "failed_$id"; exit 1; }}' for name in passed),
        'cd "$OLDPWD"',
    ]


def last_lines(folder: Path, max_restarts: int) -> list[str]:
    """Return the lines after srun, which mark the job as finished, requeue it, or say why not.

    They are bash, as this must also work if the tasks run in a container. A script that outlived its node's daemon
    notices that Slurm has restarted the job, and leaves it alone.
    """
    return [
        "rc=$?",
        f"cd {shlex.quote(str(folder))} || exit 1",
        """show() { scontrol show job "$id" | sed -n "s/.*$1=\\([A-Z0-9_]*\\).*/\\1/p"; }""",
        'is_newest() { now=$(show Restarts); [ -z "$now" ] || [ "$now" = "$n" ]; }',
        "exclude() {",  # the list can only be changed while the job is pending, which it is until this script ends
        '  old=$(scontrol show job "$id" | sed -n "s/.*ExcNodeList=\\([^ ]*\\).*/\\1/p")',
        '  new=$(sort -u "exclude_$id.$n" | paste -sd,)',
        '  if [ -n "$old" ] && [ "$old" != "(null)" ]; then new=$old,$new; fi',
        '  scontrol update JobId="$id" ExcNodeList="$new"',
        "}",
        "requeue() {",
        """  if [ -s "exclude_$id.$n" ]; then trap '' TERM; fi""",
        "  for try in $(seq 60); do",
        "    is_newest || exit 0",
        "    state=$(show JobState)",
        '    case "$state" in',
        "      RUNNING|SUSPENDED|STOPPED|SIGNALING)",
        '        if scontrol requeue "$id"; then if [ -s "exclude_$id.$n" ]; then exclude; fi; exit 0; fi ;;',
        '      ?*) echo "not requeued: the job is $state"; exit 1 ;;',
        "    esac",
        "    sleep 5",
        "  done",
        '  echo "Slurm did not requeue the job" > "failed_$id"; exit 1',
        "}",
        "watched() {",  # what NCCL's watchdogs have written, if one of them ended its process
        '  if ls "nccl_$id.$n"_rank_* > /dev/null 2>&1; then',
        '    echo "; who waited for whom: $PWD/nccl_$id.${n}_rank_*, read by torchfrtrace"',
        "  fi",
        "}",
        "count() {",
        '  echo "$(date -Is) start $n on $SLURM_JOB_NODELIST: $1" >> "failures_$id"',
        f'  if [ "$(wc -l < "failures_$id")" -le {max_restarts} ]; then requeue; fi',
        f'  echo "no gain in {max_restarts + 1} starts, the last: $1" > "failed_$id"; exit 1',
        "}",
        "is_newest || exit 0",
        "if [ $rc -ne 0 ]; then sleep 2; ls -a > /dev/null; fi",  # NFS may show late what other nodes wrote
        'if [ -e "cancelled_$id" ]; then exit 1; fi',
        'if [ -s "trouble_$id.$n" ]; then count "$(head -n 1 "trouble_$id.$n")"; fi',
        'if [ -s "again_$id.$n" ]; then count "stopped before its first step"; fi',
        'if [ -e "again_$id.$n" ]; then rm -f "failures_$id"; requeue; fi',
        'if [ -e "error_$id.$n" ]; then cat "error_$id.$n"; cp "error_$id.$n" "failed_$id"; exit 1; fi',
        'if [ $rc -eq 0 ]; then touch "finished_$id"; exit 0; fi',
        'count "exit code $rc$(watched)"',
    ]
