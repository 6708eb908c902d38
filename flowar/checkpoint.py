"""Save, find the latest, resume. Does not decide when to save. Read next: train.py.

RUN_DIR/checkpoints/step_00001000/     complete as soon as it has this name: it is written as .step_00001000 and renamed
    raw/, ema/                         model folders (model.safetensors, config.json, dataset.json)
    training.pt                        {"step", "optimizer"}
"""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_prep.schema import Passport, write_passport
from flowar.ema import EMA
from flowar.errors import UserError
from flowar.model import FlowAR
from flowar.weights import WEIGHTS_FILE, load_strictly, save_model

STEP_FOLDER = re.compile(r"step_(\d{8})")


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: FlowAR,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    *,
    passport: Passport,
    keep: int,
) -> Path:
    """Write a complete checkpoint after `step` steps, then delete all but the newest `keep`; return its folder.

    The dataset's passport goes with the weights, so that the sampler can refuse another VAE.

    Raises:
        UserError: if it can't be written; the older checkpoints are then still there.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    hidden = folder.with_name("." + folder.name)
    try:
        if hidden.exists():
            shutil.rmtree(hidden)
        for name, weights in (("raw", model.state_dict()), ("ema", ema.state_dict())):
            save_model(model.config, weights, hidden / name)
            write_passport(passport, hidden / name)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, hidden / "training.pt")
        for path in (*hidden.rglob("*"), hidden):
            _sync(path)
        hidden.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last two: a failed write in Rust or C++
        raise UserError(
            f"can't save checkpoint {folder}: {error}; the older checkpoints are whole; make room or "
            "mend the folder and start the same command again"
        ) from error
    for old in list_checkpoints(run_dir)[:-keep]:
        doomed = old.with_name("." + old.name)  # a name that no one takes for complete, before anything is deleted
        old.rename(doomed)
        shutil.rmtree(doomed)
    return folder


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [entry for entry in folder.iterdir() if STEP_FOLDER.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found)


def find_latest(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete = list_checkpoints(run_dir)
    return complete[-1] if complete else None


def load_checkpoint(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Load all of a checkpoint and return the number of steps that it has behind it.

    Raises:
        UserError: if it is of another model.
    """
    load_strictly(model, load_file(folder / "raw" / WEIGHTS_FILE), str(folder))
    ema.load_state_dict(load_file(folder / "ema" / WEIGHTS_FILE))
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    return training["step"]


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a process that died while saving or deleting has left."""
    for entry in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(entry)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
