"""`flowar doctor`: are the nodes of this allocation fit for a run? One process per GPU looks, rank 0 prints a table.

A node that is slower than half of the median, or differs from most nodes, is red. Read next: distributed.py.
"""

import contextlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from flowar import __version__
from flowar.base.devices import measure_tflops, pick_device
from flowar.base.distributed import (
    World,
    gather_objects,
    has_lost_ranks,
    leave_world,
    start_world,
    stop_world,
    sum_over_ranks,
    wait_for_all,
    world_size,
)
from flowar.base.errors import UserError
from flowar.base.files import GIB, MIB, write_text
from flowar.base.hashes import hash_file
from flowar.base.terminal import plain_console
from flowar.config.data import DataConfig
from flowar.config.jobs import DoctorConfig
from flowar.latents.shards import LatentShards

DOCTOR_FILE = "doctor.json"
RENAMES = 50
EXCHANGES = 3  # measured per pair of nodes, after one warm-up
SMI_S = 30
MAX_USED_GIB = 2.0  # on a GPU that should be free
MAX_FILE_MS = 100  # to create, rename or stat a file, as checkpoints, images and claims do
SPEEDS = {  # higher is better; the unit, and what a slow node causes
    "write_mib_per_s": "MiB/s written: checkpoints take longer",
    "tflops": "TFLOP/s of matrix products: every step waits for this node",
    "all_reduce_gb_per_s": "GB/s of all-reduces with the other nodes: every step waits for this node",
}


def main(config: DoctorConfig, dry_run: bool = False) -> None:
    """Look at all nodes, print the table, and fail if one of them is not fit."""
    device = pick_device(config.device)
    if dry_run:
        return
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    # A new folder for each start, so that notes of an earlier start don't count.
    progress = Path(config.run_dir) / f".doctor_{os.environ.get('MASTER_PORT', '0')}" / f"rank_{rank:05d}"
    try:
        note(progress, "waiting for the others to start")
        world = start_world(device, with_group=False, timeout=timedelta(seconds=config.timeout_s))
        note(progress, "examining itself")
        mine = examine(config, world)
        wait_for_all()
        mine["clock_s"] = time.time()
        note(progress, "measuring the network")
        mine["all_reduce_gb_per_s"] = measure_pairs(world, mine["node"], config.message_mib)
        everyone = gather_objects(mine)
        progress.unlink()
        with contextlib.suppress(OSError):  # the last one removes it
            progress.parent.rmdir()
        if world.is_main:
            report(everyone, config)
    except RuntimeError as error:
        leave_world()
        if not has_lost_ranks(error):
            raise
        raise UserError(
            f"rank {rank} waited timeout_s={config.timeout_s:g} s for the others, or lost them; of {size} ranks: "
            f"{describe_ranks(progress.parent, size)}; exclude the nodes that are stuck: cluster.exclude=..."
        ) from error
    except BaseException:
        leave_world()
        raise
    stop_world()


def note(file: Path, what: str) -> None:
    """Write down what this process is about to do, so that the others can say where it got stuck."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{file.name} on {node_name()} is {what}")
    except OSError as error:
        raise UserError(f"can't write to run_dir={file.parents[1]}: {error.strerror or error}") from error


def describe_ranks(notes: Path, size: int) -> str:
    """Return what each rank noted that it was about to do, and which ranks never started, grouped by node."""
    files = {int(file.name.partition("_")[2]): file for file in notes.glob("rank_*")}
    said = [files[rank].read_text() for rank in sorted(files)]
    nodes = os.environ.get("FLOWAR_NODES", "").split(",")
    absent: dict[str, list[int]] = {}
    for rank in sorted(set(range(size)) - set(files)):
        absent.setdefault(nodes[rank * len(nodes) // size], []).append(rank)
    for node, ranks in absent.items():
        where = f" of {node}" if node else ""
        said.append(f"ranks {', '.join(map(str, ranks))}{where} never started")
    return "; ".join(said)


def node_name() -> str:
    """Return what the cluster calls this machine."""
    return os.environ.get("FLOWAR_NODE", socket.gethostname())


def examine(config: DoctorConfig, world: World) -> dict[str, Any]:
    """Return what this process finds out about its node."""
    shm = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    return {
        "node": node_name(),
        "rank": world.rank,
        "versions": versions(),
        "gpus": gpus(world.device),
        "cpus": len(os.sched_getaffinity(0)),
        "shm_gib": shm,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        **measure_files(Path(config.run_dir), config.write_mib, world.rank),
        "far_gpu": far_gpu(world.device, os.sched_getaffinity(0)),
        "tflops": measure_tflops(world.device),
        "damaged": damaged_shards(config, world.rank),
    }


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes."""
    found = {
        "flowar": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    for package in ("flash-attn", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    if importlib.util.find_spec("flash_attn") is not None:
        try:
            importlib.import_module("flash_attn")
        except ImportError as error:  # built for another torch
            found["flash-attn"] += f", does not load: {str(error).splitlines()[0]}"
    return found


def gpus(device: torch.device) -> list[dict[str, Any]]:
    """Return the GPUs of the node, as its driver lists them; an empty list without CUDA."""
    if device.type != "cuda":
        return []
    fields = "name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    found = []
    for line in answer.splitlines():
        name, total, used, ecc, driver = (word.strip() for word in line.split(","))
        errors = int(ecc) if ecc.isdecimal() else 0  # [N/A] where ECC is off
        gpu: dict[str, Any] = {"name": name, "total_gib": int(total) / 1024, "used_gib": int(used) / 1024}
        found.append(gpu | {"ecc_errors": errors, "driver": driver})
    return found


def far_gpu(device: torch.device, cpus: set[int], pci: Path = Path("/sys/bus/pci/devices")) -> str:
    """Return the address of this process's GPU if all of its CPUs are on another socket; "" if not, or unknown.

    Args:
        device: of this process.
        cpus: those that the process may run on.
        pci: the folder where Linux lists which CPUs are near a device.
    """
    if device.type != "cuda":
        return ""
    gpu: Any = torch.cuda.get_device_properties(device)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    file = pci / address / "local_cpulist"
    near = set()
    for part in file.read_text().strip().split(",") if file.is_file() else ():
        first, _, last = part.partition("-")
        near |= set(range(int(first), int(last or first) + 1))
    return "" if near & cpus or not near else address


def measure_files(folder: Path, write_mib: int, rank: int) -> dict[str, float]:
    """Return how fast a file in `folder` is written to disk, and how long it takes to create, rename and stat one.

    Raises:
        UserError: if the file can't be written.
    """
    name = f".doctor.{socket.gethostname()}.{rank}"
    file = folder / name
    block = os.urandom(MIB)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with file.open("wb") as output:
            for _ in range(write_mib):
                output.write(block)
            output.flush()
            os.fsync(output.fileno())
        speed = write_mib / (time.perf_counter() - began)
        times: dict[str, list[float]] = {"create_ms": [], "rename_ms": [], "stat_ms": []}
        for number in range(RENAMES):
            made, other = folder / f"{name}.made", folder / f"{name}.{number}"
            for what, action in (
                ("create_ms", made.touch),
                ("rename_ms", partial(file.rename, other)),
                ("stat_ms", other.stat),
            ):
                began = time.perf_counter()
                action()
                times[what].append(1000 * (time.perf_counter() - began))
            made.unlink()
            file = other
    except OSError as error:
        raise UserError(f"can't write to run_dir={folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return {"write_mib_per_s": speed, **{what: statistics.median(of_it) for what, of_it in times.items()}}


def damaged_shards(config: DoctorConfig, rank: int) -> list[str]:
    """Return the shards, out of a few that differ by rank, that this node reads differently from what was written."""
    if config.data is None:
        return []
    shards = LatentShards(DataConfig(path=config.data))
    some = [shards.shards[(rank + world_size() * n) % len(shards.shards)] for n in range(config.num_shards)]
    return [shard.name for shard in dict.fromkeys(some) if hash_file(shards.local_file(shard)) != shard.file_hash]


def measure_pairs(world: World, node: str, message_mib: int) -> float | None:
    """Return the median GB/s that this node reaches in all-reduces with one other node at a time; None if alone.

    The first process of each node takes part; in each round every node has one partner (a round-robin tournament).
    """
    nodes = gather_objects((node, world.rank)) if world.control is not None else [(node, 0)]
    first_ranks: dict[str, int] = {}
    for name, rank in nodes:
        first_ranks.setdefault(name, rank)
    players: list[int | None] = list(first_ranks.values())
    if len(players) < 2:
        return None
    players += [None] * (len(players) % 2)
    # NCCL makes its communicator at the first call and waits for all ranks, so the first call must include all of them.
    sum_over_ranks(torch.ones(1, device=world.device))
    message = torch.ones(message_mib * MIB // 4, device=world.device)
    speeds = []
    for _ in range(len(players) - 1):
        wait_for_all()
        if world.rank in players:
            partner = players[-1 - players.index(world.rank)]
            if partner is not None:
                speeds.append(message.nbytes / exchange_seconds(message, partner) / 1e9)
        players = [players[0], players[-1], *players[1:-1]]
    shared = gather_objects((node, statistics.median(speeds) if speeds else None))
    return next(speed for name, speed in shared if name == node and speed is not None)


def exchange_seconds(message: torch.Tensor, partner: int) -> float:
    """Return the median time that two processes need to sum their messages."""
    received = torch.empty_like(message)
    seconds = []
    for _ in range(EXCHANGES + 1):
        began = time.perf_counter()
        sends = [dist.P2POp(dist.isend, message, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        received += message
        if message.is_cuda:
            torch.cuda.synchronize(message.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def find_problems(everyone: list[dict[str, Any]], config: DoctorConfig) -> dict[str, list[str]]:
    """Return what is wrong, by node."""
    problems: dict[str, list[str]] = {}

    def add(seen: dict[str, Any], what: str) -> None:
        lines = problems.setdefault(seen["node"], [])
        if what not in lines:
            lines.append(what)

    for name in everyone[0]["versions"]:
        usual, _ = Counter(seen["versions"].get(name) for seen in everyone).most_common(1)[0]
        for seen in everyone:
            if seen["versions"].get(name) != usual:
                add(seen, f"{name} is {seen['versions'].get(name)}, elsewhere {usual}")
    drivers = [seen["gpus"][0]["driver"] if seen["gpus"] else "none" for seen in everyone]
    usual, _ = Counter(drivers).most_common(1)[0]
    for seen, driver in zip(everyone, drivers, strict=True):
        if driver != usual:
            add(seen, f"the driver is {driver}, elsewhere {usual}")
    for key, unit in (("gpus", "GPUs"), ("cpus", "CPUs per task")):
        counts = [len(seen[key]) if key == "gpus" else seen[key] for seen in everyone]
        usual, _ = Counter(counts).most_common(1)[0]
        for seen, count in zip(everyone, counts, strict=True):
            if count < usual:
                add(seen, f"{count} {unit}, elsewhere {usual}")
    for key, effect in SPEEDS.items():
        speeds = [seen[key] for seen in everyone if seen[key] is not None]
        middle = statistics.median(speeds) if speeds else 0
        for seen in everyone:
            if seen[key] is not None and seen[key] < config.min_share * middle:
                add(seen, f"{seen[key]:.3g}, median {middle:.3g} {effect}")
    middle_clock = statistics.median(seen["clock_s"] for seen in everyone)
    for seen in everyone:
        if seen["shm_gib"] < config.min_shm_gib:
            add(seen, f"{seen['shm_gib']:.2f} GiB free in /dev/shm, which data readers pass batches through")
        if seen["open_files"] < config.min_open_files:
            add(seen, f"ulimit -n is {seen['open_files']}: data readers and sockets may run out of file descriptors")
        for what in ("create", "rename", "stat"):
            if seen[f"{what}_ms"] > MAX_FILE_MS:
                add(seen, f"it takes {seen[f'{what}_ms']:.0f} ms to {what} a file in {config.run_dir}")
        if abs(skew := seen["clock_s"] - middle_clock) > config.max_clock_s:
            add(seen, f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}")
        if seen["far_gpu"]:
            add(seen, f"rank {seen['rank']} uses GPU {seen['far_gpu']} from another socket; see --distribution of srun")
        for name in seen["damaged"]:
            add(seen, f"reads shard {name} differently from what was written")
        tasks = sum(other["node"] == seen["node"] for other in everyone)
        for index, gpu in enumerate(seen["gpus"]):
            if gpu["ecc_errors"]:
                add(seen, f"GPU {index} has {gpu['ecc_errors']} uncorrected memory errors")
            if gpu["used_gib"] > MAX_USED_GIB + tasks:  # each of our processes takes some
                add(seen, f"GPU {index} has {gpu['used_gib']:.1f} GiB in use by others")
    return problems


def report(everyone: list[dict[str, Any]], config: DoctorConfig) -> None:
    """Print the table and what is wrong; write doctor.json.

    Raises:
        UserError: if a node is not fit; it says which nodes to exclude.
    """
    problems = find_problems(everyone, config)
    nodes: dict[str, list[dict[str, Any]]] = {}
    for seen in everyone:
        nodes.setdefault(seen["node"], []).append(seen)
    columns = ("node", "tasks", "GPUs", "CPUs/task", "shm GiB", "files", "MiB/s", "file ms", "TFLOP/s", "GB/s", "")
    table = Table(*columns, box=None)
    for node, of_node in nodes.items():
        first = of_node[0]
        speed = first["all_reduce_gb_per_s"]
        cells = (
            node,
            str(len(of_node)),
            f"{len(first['gpus'])} x {first['gpus'][0]['name']}" if first["gpus"] else "none",
            str(min(one["cpus"] for one in of_node)),
            f"{first['shm_gib']:.1f}",
            f"{first['open_files']:,}",
            f"{min(one['write_mib_per_s'] for one in of_node):,.0f}",
            "/".join(f"{max(one[f'{what}_ms'] for one in of_node):.2g}" for what in ("create", "rename", "stat")),
            f"{min(one['tflops'] for one in of_node):.3g}",
            "" if speed is None else f"{speed:.3g}",
            "NOT FIT" if node in problems else "fit",
        )
        table.add_row(*cells, style="red" if node in problems else None)
    console = plain_console(width=None if plain_console().is_terminal else 140)
    console.print(", ".join(f"{name} {found}" for name, found in everyone[0]["versions"].items()))
    console.print(table)
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "the interface of the host's name")
    console.print(f"file ms: to create, rename and stat a file; ranks communicate over {interface}")
    for node, lines in problems.items():
        for line in lines:
            console.print(f"{node}: {line}", style="red")
    write_text(
        Path(config.run_dir) / DOCTOR_FILE, json.dumps({"seen": everyone, "problems": problems}, indent=2) + "\n"
    )
    if problems:
        names = ",".join(problems)
        raise UserError(f"{len(problems)} of {len(nodes)} nodes are not fit; exclude them: cluster.exclude={names}")
    print(f"fit: {', '.join(nodes)}")
