"""Training on several real processes, quickly: each is forked from a server that has imported everything already."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from flowar import train
from flowar.config.training import TrainConfig

PRELOADED = ["deepspeed", "streaming", "diffusers", "flowar.training.torch_engine", "tests.flowar.ranks"]


def run_rank(config: TrainConfig, rank: int, world_size: int, port: int, log: Path) -> None:
    """What one process does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = log.open("a", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1)
    train.main(config)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(config: TrainConfig, world_size: int, log: Path) -> list[multiprocessing.Process]:
    """Return the started processes of one job."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = [context.Process(target=run_rank, args=(config, rank, world_size, port, log)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(config: TrainConfig, world_size: int, log: Path) -> None:
    """Run a job to its end, which has to be a good one."""
    ranks = start_ranks(config, world_size, log)
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0] * world_size, log.read_text()[-3000:]
