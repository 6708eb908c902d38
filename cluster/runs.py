"""Read the state of a training run from its folder, however the run was started. Read next: status.py."""

from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from flowar.base.errors import UserError
from flowar.base.run_folder import METRICS_FILE
from flowar.training.run_state import Trainer, age_of, latest_checkpoint, total_steps


class RunCells(NamedTuple):
    """Cells of the table of `flowar status`."""

    step: str = ""
    loss: str = ""
    images_per_s: str = ""
    left: str = ""
    logged: str = ""  # how long ago
    checkpoint: str = ""  # the newest complete one: its step and age


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
            logged=f"{age_of(file)} ago",
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): each line must be a JSON object with step, loss, "
            "images_per_s and remaining_s; remove all other lines"
        ) from error


def advise(run_dir: Path, trainer: Trainer) -> str:
    """Return a sentence on what you can do with a run that no scheduler started."""
    latest = latest_checkpoint(run_dir)
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
    latest = latest_checkpoint(run_dir)
    return f"{latest[0]:,}, {latest[1]} ago" if latest is not None else ""
