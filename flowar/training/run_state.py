"""The state of a training run by its folder: finished or not, by which process, age of its checkpoint. No torch.

Read next: watch.py and cluster/runs.py, which show it.
"""

import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from flowar.base.errors import UserError
from flowar.base.leases import is_of_this_machine, process_is_gone
from flowar.base.records import DamagedRecordError, read_record
from flowar.base.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    PASSPORT_FILE,
    STATE_FILE,
    checkpoint_step,
    find_latest,
)
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.latents.schema import read_passport
from flowar.training.owner import OWNER_CURE, OWNER_FILE

FINISHED = "FINISHED"


class Trainer(NamedTuple):
    """The process that trains in a run folder, or the last one that did."""

    state: str  # RUNNING, STOPPED, FINISHED; UNKNOWN: it is on another machine
    pid: int
    host: str
    job: str  # the scheduler's number; empty if it was started without a scheduler


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a training run."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def total_steps(run_dir: Path) -> int | None:
    """Return how many steps a run takes, from its settings and its dataset's passport; None if it has neither yet."""
    if not (run_dir / CONFIG_FILE).is_file() or not (run_dir / PASSPORT_FILE).is_file():
        return None
    config = load_described(TrainConfig, run_dir / CONFIG_FILE)
    return config.count_steps(read_passport(run_dir).num_images)


def find_trainer(run_dir: Path) -> Trainer:
    """Return the process that trains in a run folder.

    Raises:
        UserError: if owner.json, which names it, is missing or damaged.
    """
    file = run_dir / OWNER_FILE
    try:
        owner = read_record(file, OWNER_CURE)
        state = _state(owner, run_dir)
        return Trainer(state, int(owner["pid"]), str(owner["host"]), str(owner["job"]))
    except FileNotFoundError:
        raise UserError(
            f"{run_dir} has no {OWNER_FILE}, so no training has started there yet; start `flowar train`"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedRecordError(f"{file} is damaged ({type(error).__name__}: {error}); {OWNER_CURE}") from error


def _state(owner: dict[str, Any], run_dir: Path) -> str:
    latest = latest_checkpoint(run_dir)
    if latest is not None and latest[0] == total_steps(run_dir):
        return FINISHED
    if not is_of_this_machine(owner):
        return "UNKNOWN"
    return "STOPPED" if process_is_gone(owner) else "RUNNING"


def latest_checkpoint(run_dir: Path) -> tuple[int, timedelta] | None:
    """Return the step and age of the newest complete checkpoint, or None; retries if it is just being deleted."""
    while (latest := find_latest(run_dir)) is not None:
        with contextlib.suppress(FileNotFoundError):
            return checkpoint_step(latest), age_of(latest / STATE_FILE)
    return None


def age_of(file: Path) -> timedelta:
    """Return how long ago a file was written, in whole seconds."""
    return timedelta(seconds=max(0, round(time.time() - file.stat().st_mtime)))
