"""What a training run keeps where, and which of its checkpoints are complete. Read next: training/checkpoint.py.

RUN_DIR/
    config.yaml                     the settings of the newest steps
    history.jsonl                   a line for each start that trained: after which step, when, with which settings
    dataset.json                    the passport of its shards
    init.json                       what became of the weights that it started from, if it did (`init`)
    metrics.jsonl                   one record per logged step
    previews/step_00001000.png      images drawn with the averaged weights, step_00001000_raw.png with the raw ones
    anomalies/batch_00001234/       a step that was skipped, for `flowar replay`
    checkpoints/step_00001000/      complete as soon as it has this name: it is written as .step_00001000 and renamed
        .metadata, __0_0.distcp     torch.distributed.checkpoint: model.NAME, optim.NAME.exp_avg, ema.AVERAGE.NAME
        state.json                  `Progress`, and the number of processes
        config.json, dataset.json   the model's shape and the shards' passport
        checksums.json              the hashes of these files; those of the tensors are in .metadata
    averages/step_00001000/         the same, of EDM2's averages alone; kept for `flowar ema`
    damaged/checkpoints-step_...    what was in their place and is not what was written
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowar.base.errors import UserError

CONFIG_FILE = "config.yaml"
INIT_FILE = "init.json"
MODEL_CONFIG_FILE = "config.json"  # of a checkpoint or a model folder: the model's shape
PASSPORT_FILE = "dataset.json"  # of a dataset; a run, its checkpoints and what is exported of them have a copy
HISTORY_FILE = "history.jsonl"  # step s was trained with the last line whose after_step is below s
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
AVERAGES = "averages"
ANOMALIES = "anomalies"
PREVIEWS = "previews"
EVALUATIONS = "evaluations"  # a file for each time that samples of a checkpoint were measured
STATE_FILE = "state.json"
METADATA_FILE = ".metadata"  # torch.distributed.checkpoint's
DAMAGED = "damaged"  # checkpoints that are not what was written, set aside


def step_name(step: int) -> str:
    """Return the name of what was written after `step` steps."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Progress:
    """How far a run is: what it resumes with beside tensors; the content of state.json."""

    step: int = 0  # finished steps, skipped ones included
    data_offset: int = 0  # batches left out by rollbacks
    rollbacks: int = 0
    updates: int = 0  # optimizer steps: skipped steps have none
    averages: tuple[str, ...] = ()  # names of the averages in the checkpoint; samples are drawn with the first
    recent_losses: tuple[float, ...] = ()  # of good steps, which a spike is measured against
    bad_in_a_row: int = 0  # steps skipped just before

    def as_record(self) -> dict[str, Any]:
        """Return what state.json says."""
        names = ("step", "data_offset", "rollbacks", "updates")
        guard = {"recent": list(self.recent_losses), "in_a_row": self.bad_in_a_row}
        return {name: getattr(self, name) for name in names} | {"averages": list(self.averages), "guard": guard}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Progress":
        """Return what a state.json says."""
        guard = record.get("guard", {})
        return cls(
            **{name: int(record[name]) for name in ("step", "data_offset", "rollbacks", "updates")},
            averages=tuple(record["averages"]),
            recent_losses=tuple(guard.get("recent", ())),
            bad_in_a_row=guard.get("in_a_row", 0),
        )


def read_progress(folder: Path) -> Progress:
    """Return the state.json of a checkpoint."""
    return Progress.from_record(json.loads((folder / STATE_FILE).read_text()))


def checkpoint_step(folder: Path) -> int:
    """Return after how many steps a checkpoint was written, from what it says itself."""
    return read_progress(folder).step


def weight_key(name: str) -> str:
    """Return under which key a checkpoint has a parameter of the model."""
    return f"model.{name}"


def optimizer_key(name: str, state: str) -> str:
    """Return under which key a checkpoint has one of the optimizer's states of a parameter."""
    return f"optim.{name}.{state}"


def average_key(average: str, name: str) -> str:
    """Return under which key a checkpoint has an average of a parameter."""
    return f"ema.{average}.{name}"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder looks like a complete checkpoint; reading it checks whether it is whole."""
    if folder.name.startswith(".") or not (folder / METADATA_FILE).is_file():
        return False
    try:
        read_progress(folder)
    except (FileNotFoundError, NotADirectoryError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError):
        return False  # missing, half-written or damaged
    return True


def list_checkpoints(run_dir: str | Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Return the complete checkpoints (or AVERAGES) of a run, by content and not by name, oldest first."""
    folder = Path(run_dir) / kind
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # the run may be deleting it
            if is_checkpoint(entry):
                found.append((checkpoint_step(entry), entry))
    return [entry for _, entry in sorted(found)]


def find_latest(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete = list_checkpoints(run_dir)
    return complete[-1] if complete else None


def weights_folder(path: str | Path) -> Path:
    """Return the newest complete checkpoint of a run_dir; of anything else, the folder itself.

    Raises:
        UserError: if the run has no checkpoint yet.
    """
    folder = Path(path)
    if not (folder / CHECKPOINTS).is_dir():
        return folder
    latest = find_latest(folder)
    if latest is None:
        raise UserError(f"{folder} has no complete checkpoint yet; let `flowar train` run until it saves one")
    return latest


def set_aside(folder: Path) -> Path:
    """Move a checkpoint that is damaged to RUN_DIR/damaged, so that its step can be written again; return its place.

    Raises:
        UserError: if it can't be moved.
    """
    target = folder.parent.parent / DAMAGED / f"{folder.parent.name}-{folder.name}"
    try:
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(f"{target.name}_again")
        return folder.rename(target)
    except OSError as error:
        raise UserError(f"{folder} is damaged and can't be moved to {target}: {error}; move it yourself") from error
