"""Save and resume. Does not decide when to save. Read next: train.py; run_folder.py has the layout."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_prep.schema import Passport, write_passport
from flowar.ema import EMA
from flowar.errors import UserError
from flowar.files import publish_folder
from flowar.model import FlowAR
from flowar.run_folder import CHECKPOINTS, checkpoint_folder, list_checkpoints
from flowar.weights import WEIGHTS_FILE, load_strictly, save_model


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
    folder = checkpoint_folder(run_dir, step)
    hidden = folder.with_name("." + folder.name)
    try:
        if hidden.exists():
            shutil.rmtree(hidden)
        for name, weights in (("raw", model.state_dict()), ("ema", ema.state_dict())):
            save_model(model.config, weights, hidden / name)
            write_passport(passport, hidden / name)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, hidden / "training.pt")
        publish_folder(hidden, folder)
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
    for entry in (run_dir / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(entry)
