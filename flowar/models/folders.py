"""Where trained models are: model folders (.safetensors, config.json), checkpoints, the hub. Read next: build.py."""

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from flowar.base.distributed import has_lost_ranks
from flowar.base.errors import UserError
from flowar.base.files import publish_folder, write_text
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import (
    MODEL_CONFIG_FILE,
    PASSPORT_FILE,
    average_key,
    checkpoint_step,
    is_checkpoint,
    read_progress,
    weight_key,
    weights_folder,
)
from flowar.base.tensors import load_tensors, save_tensors
from flowar.config.models import ModelConfig, config_from_dict
from flowar.models.build import create_model
from flowar.models.cards import CARD_FILE, model_card
from flowar.models.checkpoint_files import CheckedReader, DamagedCheckpointError, check_small_files
from flowar.models.family import Model
from flowar.models.state_dicts import load_strictly

# With MODEL_CONFIG_FILE the layout of huggingface_hub's PyTorchModelHubMixin.
WEIGHTS_FILE = "model.safetensors"
SOURCE_FILE = "source.json"  # of what a model folder was made, if of a checkpoint
LOCK_FILE = ".lock"
MODEL_CURE = "export or convert it again"


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is meant to be


def load_state(state: dict[str, Tensor], folder: Path, group: ProcessGroup | None = None) -> None:
    """Fill tensors from a checkpoint of any engine; with the ranks of `group`, or alone.

    Raises:
        DamagedCheckpointError: on all ranks, if what is read is not what was written.
        UserError: if one of them is not in it, or of another shape.
    """
    try:
        dcp.load(state, storage_reader=CheckedReader(folder), process_group=group, no_dist=group is None)
    except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
        if (damage := DamagedCheckpointError.find_in(error, folder)) is not None:
            raise damage from error
        if has_lost_ranks(error):
            raise
        raise UserError(f"checkpoint {folder} can't be read: {' '.join(str(error).split())[:300]}") from error


def load_model(path: str | Path, weights: str = "ema") -> Model:
    """Return the model stored at `path`, in evaluation mode, float32 on the CPU.

    Args:
        path: a folder with model.safetensors and config.json, the run_dir of a training run (its newest complete
            checkpoint), one checkpoint of it, or a Hugging Face hub id.
        weights: of a checkpoint: "ema" (the first average), "raw", or the name of an average, such as decay_0.9999.

    Raises:
        UserError: if there is no model, or its weights don't fit its config (names what is missing or unknown).
    """
    folder = find_model_folder(path)
    if is_checkpoint(folder):
        return _load_from_checkpoint(folder, weights)
    missing = [name for name in (MODEL_CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a model: it has no {' and no '.join(missing)}; write one with `flowar convert`, or give "
            "the run_dir of a training run"
        )
    config = config_from_dict(read_record(folder / MODEL_CONFIG_FILE, MODEL_CURE), str(folder / MODEL_CONFIG_FILE))
    model = create_model(config)
    load_strictly(model, load_tensors(folder / WEIGHTS_FILE, MODEL_CURE), str(folder / WEIGHTS_FILE))
    return model


def _load_from_checkpoint(folder: Path, weights: str) -> Model:
    check_small_files(folder)
    averages = read_progress(folder).averages
    name = averages[0] if weights == "ema" else weights
    if name not in ("raw", *averages):
        raise UserError(f"checkpoint {folder} has no weights={weights}; it has raw, {', '.join(averages)}")
    key = weight_key if name == "raw" else functools.partial(average_key, name)
    model = create_model(
        config_from_dict(json.loads((folder / MODEL_CONFIG_FILE).read_text()), str(folder / MODEL_CONFIG_FILE))
    )
    load_state({key(parameter): tensor.detach() for parameter, tensor in model.named_parameters()}, folder)
    return model


def find_model_folder(path: str | Path) -> Path:
    """Return the model folder or the checkpoint that `path` means; errors as `load_model`."""
    folder = weights_folder(path)
    return folder if folder.exists() else _download(str(path))


def save_model(config: ModelConfig, state: dict[str, Tensor], folder: str | Path) -> None:
    """Write model.safetensors and config.json into `folder`, which `load_model` reads back bit for bit."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(state, folder / WEIGHTS_FILE)
    write_record(folder / MODEL_CONFIG_FILE, dataclasses.asdict(config))


def save_model_whole(
    config: ModelConfig, state: dict[str, Tensor], folder: Path, *, checkpoint: Path | None = None, weights: str = "raw"
) -> None:
    """Write a model folder that isn't there yet, whole or not at all.

    Args:
        config, state: the model.
        folder: where to.
        checkpoint: the source, and which of its `weights`; both are recorded, and the dataset's passport is copied, so
            that sampling refuses another VAE.
    """
    partial = folder.with_name(folder.name + ".partial")  # an interrupted run's is overwritten
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(partial / LOCK_FILE, timeout=0):
            for leftover in partial.iterdir():
                if leftover.name != LOCK_FILE:
                    leftover.unlink()
            save_model(config, state, partial)
            write_text(partial / CARD_FILE, model_card(config, checkpoint, weights))
            if checkpoint is not None:
                about = {"model": str(checkpoint.absolute()), "step": checkpoint_step(checkpoint), "weights": weights}
                write_record(partial / SOURCE_FILE, about)
            if checkpoint is not None and (checkpoint / PASSPORT_FILE).is_file():
                shutil.copy(checkpoint / PASSPORT_FILE, partial / PASSPORT_FILE)
            publish_folder(partial, folder)
            (folder / LOCK_FILE).unlink()
    except Timeout as error:
        raise UserError(f"another process is writing {folder}; wait for it, or give another out_dir") from error
    except OSError as error:
        raise UserError(f"can't write {folder}: {error}; give another out_dir, or fix that and run it again") from error


def export_model(source: str | Path, weights: str, folder: Path) -> Model:
    """Write the weights of a run or checkpoint as a model folder, whole or not at all; return the model.

    Raises:
        UserError: as `load_model`.
    """
    found = find_model_folder(source)
    model = load_model(found, weights)
    checkpoint = found if is_checkpoint(found) else None
    save_model_whole(model.config, model.state_dict(), folder, checkpoint=checkpoint, weights=weights)
    return model


def _download(hub_id: str) -> Path:
    """Return the local folder of a model on the Hugging Face hub."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[MODEL_CONFIG_FILE, WEIGHTS_FILE, PASSPORT_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"there is no folder {hub_id}, and the Hugging Face hub gave no model of that name: "
            f"{str(error).splitlines()[0]}"
        ) from error
