"""A real Slurm on one machine, to try things and for the tests: `python -m cluster.local_slurm start FOLDER`.

Needs root in a container or virtual machine, and Debian's packages slurm-wlm and munge. It writes only below FOLDER,
listens on its own loopback ports, and never touches an existing Slurm or munge.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from flowar.base.errors import UserError

CONF = "slurm.conf"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

UP_WITHIN_S, END_WITHIN_S = 60, 10
CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n.spool
SlurmdTimeout=5
KillWait=3
MinJobAge=3600
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5,sched_min_interval=200000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
{nodes}
PartitionName=local Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
{more}
"""


def start_slurm(folder: Path, num_nodes: int, more: str = "") -> Path:
    """Start munge, slurmctld and `num_nodes` slurmd; return the slurm.conf, once all nodes are idle.

    Args:
        folder: new or empty, and not below a folder that others may write to.
        num_nodes: the nodes are called n1, n2, ...
        more: lines for slurm.conf, for example for more partitions.

    Raises:
        UserError: if Slurm can't be started.
    """
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing or os.geteuid() != 0:
        lack = f"{', '.join(missing)} not found" if missing else "this user is not root"
        raise UserError(f"a private Slurm needs root and two packages, but {lack}; apt-get install slurm-wlm munge")
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give a new folder, or stop the Slurm in it with `stop`")
    for name in ("munge", "state"):
        (folder / name).mkdir(parents=True, mode=0o755)
    names = [f"n{number}" for number in range(1, num_nodes + 1)]
    ports = free_ports(num_nodes + 1)
    nodes = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={socket.gethostname()} Port={port} "
        f"CPUs={os.cpu_count()} RealMemory={psutil.virtual_memory().total // 2**20 // num_nodes} State=UNKNOWN"
        for name, port in zip(names, ports[1:], strict=True)
    )
    text = CONFIG.format(
        host=socket.gethostname(), folder=folder, ports=ports, nodes=nodes, names=",".join(names), more=more
    )
    conf = folder / CONF
    conf.write_text(text)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = [f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")]
    run("munged", ["--force", *munge, f"--seed-file={folder}/munge/seed"], folder)  # only root needs it
    run("slurmctld", ["-f", str(conf)], folder)
    for name in names:
        start_node(folder, name)
    wait_until_idle(conf, names)
    return conf


def start_node(folder: Path, name: str) -> None:
    """Start the daemon of one node."""
    run("slurmd", ["-f", str(folder / CONF), "-N", name], folder)


def wait_until_idle(conf: Path, names: list[str]) -> None:
    """Wait until Slurm says that these nodes are idle."""
    deadline = time.monotonic() + UP_WITHIN_S
    command = ["sinfo", "-h", "-N", "-n", ",".join(names), "-o", "%N %t"]
    while True:
        seen = subprocess.run(command, env=os.environ | {"SLURM_CONF": str(conf)}, capture_output=True, text=True)
        states = dict(line.split() for line in seen.stdout.splitlines())
        if [states.get(name) for name in names] == ["idle"] * len(names):
            return
        if time.monotonic() > deadline:
            raise UserError(f"the nodes are {states or seen.stderr.strip()}, not idle; look at {conf.parent}/*.log")
        time.sleep(0.2)


def stop_slurm(folder: Path) -> None:
    """Stop all daemons that `start` has started in `folder`, and the jobs that they run."""
    folder = folder.resolve()
    if not (folder / CONF).is_file():
        raise UserError(f"{folder} has no {CONF}; give a folder that `start` was called with")
    daemons = []
    for file in (*folder.glob("*.pid"), folder / "munge" / "pid"):
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            daemon = psutil.Process(int(file.read_text()))
            if str(folder) in " ".join(daemon.cmdline()):  # else another process has this number by now
                daemon.send_signal(signal.SIGTERM)
                daemons.append(daemon)
    _, alive = psutil.wait_procs(daemons, timeout=END_WITHIN_S)
    for daemon in alive:
        daemon.kill()
    for process in psutil.process_iter():  # the steps' daemons survive slurmd
        with contextlib.suppress(psutil.Error):
            if process.name() == "slurmstepd" and process.environ().get("SLURM_CONF") == str(folder / CONF):
                process.kill()


def find_program(name: str) -> str | None:
    """Return the path of a program, which may be for root only."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def run(program: str, arguments: list[str], folder: Path) -> None:
    """Start a daemon; it puts itself in the background."""
    command = [find_program(program) or program, *arguments]
    log = folder / "start.log"
    environment = os.environ | {"SLURM_CONF": str(folder / CONF)}
    with log.open("a") as output:
        result = subprocess.run(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise UserError(f"{command[0]} doesn't start: {log.read_text().strip()[-300:]}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local_slurm", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path, help="for its configuration, logs and state")
    parser.add_argument("--nodes", type=int, default=4)
    options = parser.parse_args()
    try:
        if options.action == "stop":
            stop_slurm(options.folder)
        else:
            conf = start_slurm(options.folder, options.nodes)
            print(f"{options.nodes} nodes are idle; now run\nexport SLURM_CONF={conf}")
    except UserError as error:
        sys.exit(f"local_slurm: {error}")


if __name__ == "__main__":
    main()
