"""Training on several real processes."""

from multiprocessing.process import BaseProcess
from pathlib import Path

from flowar import train
from flowar.config.training import TrainConfig
from tests import processes


def start_ranks(config: TrainConfig, world_size: int, log: Path, **deaths: object) -> list[BaseProcess]:
    """Return the started processes of one job."""
    return processes.start_ranks(train.main, config, world_size=world_size, log=log, **deaths)


def run_ranks(config: TrainConfig, world_size: int, log: Path) -> None:
    """Run a job to its end, and check that all processes succeeded."""
    processes.run_ranks(train.main, config, world_size=world_size, log=log)
