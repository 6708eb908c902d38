"""Read the state of a training run from its folder, however the run was started. Read next: status.py."""

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
    METRICS_FILE,
    PASSPORT_FILE,
    STATE_FILE,
    checkpoint_step,
    find_latest,
)
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.training.owner import OWNER_CURE, OWNER_FILE


class RunCells(NamedTuple):
    """Cells of the table of `flowar status`."""

    step: str = ""
    loss: str = ""
    images_per_s: str = ""
    left: str = ""
    logged: str = ""  # how long ago
    checkpoint: str = ""  # the newest complete one: its step and age


class Trainer(NamedTuple):
    """The process that trains in a run folder, or the last one that did."""

    state: str
    pid: int
    host: str
    job: str  # the scheduler's number; empty if it was started without a scheduler


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a training run."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def read_run(run_dir: Path) -> RunCells:
    """Return how far a run is."""
    from flowar.training.report import read_metrics

    cells, file = RunCells(checkpoint=_checkpoint(run_dir)), run_dir / METRICS_FILE
    try:
        records = read_metrics(run_dir)
        if not records:
            return cells
        last, num_steps = records[-1], total_steps(run_dir)
        return cells._replace(
            step=f"{last['step']:,}" + (f" of {num_steps:,}" if num_steps else ""),
            loss=f"{last['loss']:.4f}",
            images_per_s=f"{last['images_per_s']:,.1f}",
            left=str(timedelta(seconds=round(last["remaining_s"]))),
            logged=f"{_age(file)} ago",
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): each line must be a JSON object with step, loss, "
            "images_per_s and remaining_s; remove all other lines"
        ) from error


def total_steps(run_dir: Path) -> int | None:
    """Return how many steps a run takes, from its settings and its dataset's passport; None if it has neither yet."""
    from flowar.latents.schema import read_passport

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
    latest = _latest(run_dir)
    if latest is not None and latest[0] == total_steps(run_dir):
        return "FINISHED"
    if not is_of_this_machine(owner):
        return "UNKNOWN"
    return "STOPPED" if process_is_gone(owner) else "RUNNING"


def advise(run_dir: Path, trainer: Trainer) -> str:
    """Return a sentence on what you can do with a run that no scheduler started."""
    latest = _latest(run_dir)
    where = {
        "RUNNING": f"process {trainer.pid} is training {run_dir}; `kill {trainer.pid}` makes it save and stop",
        "STOPPED": f"process {trainer.pid} has ended; the same `flowar train` command resumes {run_dir}",
        "UNKNOWN": f"process {trainer.pid} on {trainer.host} trained {run_dir} last; check there if it still runs",
        "FINISHED": f"{run_dir} is fully trained",
    }[trainer.state]
    if latest is None:
        return f"{where}. It has no complete checkpoint yet, so it can't be sampled or evaluated"
    return f"{where}. `flowar sample model={run_dir}` draws with its checkpoint of step {latest[0]:,}"


def _checkpoint(run_dir: Path) -> str:
    latest = _latest(run_dir)
    return f"{latest[0]:,}, {latest[1]} ago" if latest is not None else ""


def _latest(run_dir: Path) -> tuple[int, timedelta] | None:
    """Return the step and age of the newest complete checkpoint, or None; retries if it is just being deleted."""
    while (latest := find_latest(run_dir)) is not None:
        with contextlib.suppress(FileNotFoundError):
            return checkpoint_step(latest), _age(latest / STATE_FILE)
    return None


def _age(file: Path) -> timedelta:
    return timedelta(seconds=max(0, round(time.time() - file.stat().st_mtime)))
