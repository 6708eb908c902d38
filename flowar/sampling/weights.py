"""The weights that samples are drawn with: chosen once per folder of samples, as the run may still be training.

The first process that draws from a run, or from one of its checkpoints, copies the weights into OUT_DIR/model, a model
folder. All other processes, and all later starts, draw with this copy: one file to read, and the same step for all.
Read next: job.py.
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

from flowar.base.errors import UserError
from flowar.base.leases import CLAIMS_FOLDER, WAIT_S, Leases
from flowar.base.records import read_record
from flowar.base.run_folder import CHECKPOINTS, checkpoint_step, find_latest, is_checkpoint
from flowar.config.drawing import SampleConfig
from flowar.models.folders import SOURCE_FILE, export_model, find_model_folder
from flowar.sampling.folder import HASHES_FILE, SAMPLES_FILE, read_samples

KEPT_FOLDER = "model"  # in the folder of samples, while drawing


class Weights(NamedTuple):
    """Where a model's weights come from, and where they are read."""

    folder: Path  # a model folder, or a checkpoint, which its run may have deleted since
    step: int | None  # of the checkpoint
    stored: Path  # the same, or the copy beside the samples


def find_weights(config: SampleConfig) -> Weights:
    """Return the weights to draw with: those that the samples in `out_dir` were started with, or the newest ones.

    Raises:
        UserError: if there is no model, or the run has deleted the checkpoint that the samples were started with.
    """
    out_dir, kept = Path(config.out_dir), Path(config.out_dir) / KEPT_FOLDER
    cure = f"remove {kept}, or give another out_dir"
    of_kept = read_record(kept / SOURCE_FILE, cure) if (kept / SOURCE_FILE).is_file() else {}
    of_samples = read_samples(out_dir) if (out_dir / SAMPLES_FILE).is_file() else {}
    for record in (of_kept, of_samples):
        folder, step = Path(str(record.get("model"))), record.get("step")
        if not isinstance(step, int) or Path(config.model).absolute() not in (folder, folder.parent.parent):
            continue
        if record is of_kept and record.get("weights") == config.weights:
            return Weights(folder, step, kept)
        if is_checkpoint(folder):
            return Weights(folder, step, folder)
        raise UserError(
            f"out_dir={out_dir} holds images of step {step:,}, but {folder} no longer exists; give another out_dir"
        )
    folder = find_model_folder(config.model)
    return Weights(folder, checkpoint_step(folder) if is_checkpoint(folder) else None, folder)


def say_if_outdated(config: SampleConfig, weights: Weights) -> None:
    """Print a line if the run has newer weights."""
    run = Path(config.model)
    newest = find_latest(run) if (run / CHECKPOINTS).is_dir() else None
    if newest is not None and weights.step is not None and checkpoint_step(newest) != weights.step:
        print(
            f"drawing with step {weights.step:,}, which the samples in {config.out_dir} were started with; for step "
            f"{checkpoint_step(newest):,} of {run} give another out_dir"
        )


def keep_weights(config: SampleConfig) -> Weights:
    """Return the weights to draw with, read from a copy beside the samples if they are a training run's.

    One process makes the copy, and the others wait for it. A folder with samples of another model is left alone, as a
    later check refuses it.
    """
    weights, out_dir = find_weights(config), Path(config.out_dir)
    kept = out_dir / KEPT_FOLDER
    if weights.step is None or weights.stored == kept:
        return weights
    if (out_dir / SAMPLES_FILE).is_file():
        record = read_samples(out_dir)
        is_done = (out_dir / HASHES_FILE).exists() and record["num_images"] >= config.num_images
        if is_done or record.get("model") != str(weights.folder.absolute()):
            return weights
    try:
        with Leases(out_dir / CLAIMS_FOLDER, config.lease_s) as leases:
            while not kept.exists():
                if not leases.claim(KEPT_FOLDER):
                    time.sleep(WAIT_S)
                    continue
                if not kept.exists():
                    export_model(weights.folder, config.weights, kept)
                leases.release(KEPT_FOLDER)
    except OSError as error:
        raise UserError(f"can't write to {out_dir}: {error}; fix that and run the same command again") from error
    return find_weights(config)


def remove_kept(out_dir: Path) -> None:
    """Remove the copy of the weights once everything is drawn, unless the original checkpoint was deleted."""
    kept = out_dir / KEPT_FOLDER
    if (kept / SOURCE_FILE).is_file():
        record = read_record(kept / SOURCE_FILE, f"remove {kept}")
        if is_checkpoint(Path(str(record["model"]))):
            shutil.rmtree(kept, ignore_errors=True)
