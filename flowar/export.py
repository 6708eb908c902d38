"""`flowar export`, `ema` and `convert`: each writes a new model folder. Read next: models/folders.py."""

from pathlib import Path

from flowar.base.errors import UserError
from flowar.base.run_folder import CHECKPOINTS, MODEL_CONFIG_FILE, checkpoint_step, is_checkpoint
from flowar.base.tensors import load_plain_checkpoint
from flowar.config.training import AverageConfig, ConvertConfig, ExportConfig
from flowar.models.build import convert_released
from flowar.models.folders import (
    WEIGHTS_FILE,
    export_model,
    find_model_folder,
    save_model_whole,
)
from flowar.training.averages import save_average
from flowar.training.report import record_export


def export(config: ExportConfig, dry_run: bool = False) -> None:
    """Write model.safetensors and config.json, whole or not at all."""
    source, target = find_model_folder(config.model), Path(config.out_dir)
    check_new(target)
    if dry_run:
        print(f"would write weights {config.weights} of {source} to {target}")
        return
    parameters = sum(p.numel() for p in export_model(source, config.weights, target).parameters())
    print(f"{source}, weights {config.weights}: {parameters / 1e6:.1f} M parameters")
    print(f"wrote {target / WEIGHTS_FILE} and {target / MODEL_CONFIG_FILE}")
    if is_checkpoint(source):
        record_export(source.parent.parent, target, checkpoint_step(source), config.weights)


def average(config: AverageConfig, dry_run: bool = False) -> None:
    """Write a model folder with the weights averaged by the requested power function."""
    target = Path(config.out_dir)
    check_new(target)
    save_average(Path(config.run_dir), config.std, config.step, None if dry_run else target)
    if not dry_run:
        print(f"wrote {target / WEIGHTS_FILE}")


def check_new(folder: Path) -> None:
    """Raise a UserError if a folder exists."""
    if folder.exists():
        raise UserError(f"{folder} already exists; give another out_dir, or remove it first")


def convert_checkpoint(config: ConvertConfig, dry_run: bool = False) -> None:
    """Convert the authors' checkpoint to a model folder."""
    source, target = Path(config.checkpoint), Path(config.out_dir)
    if is_checkpoint(source) or (source / CHECKPOINTS).is_dir():
        raise UserError(
            f"{source} belongs to a training run; convert takes a checkpoint of the authors. To make a model folder "
            f"from a run, use `flowar export {source} {target}`"
        )
    if (source / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{source} is already a model folder; use it as it is, for example `flowar sample model={source}`"
        )
    if not source.is_file():
        raise UserError(
            f"{source} does not exist; download FlowAR-S.pth, FlowAR-L.pth, FlowAR-H.pth or an ARFlow checkpoint from "
            "the authors' release"
        )
    check_new(target)
    state_dict = load_plain_checkpoint(source)
    try:
        model = convert_released(state_dict, config.ar_heads)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{source}: {model.config.variant}, {parameters / 1e6:.1f} M parameters")
    if dry_run:
        print(f"would write {target / WEIGHTS_FILE} and {target / MODEL_CONFIG_FILE}")
        return
    save_model_whole(model.config, model.state_dict(), target)
    print(f"wrote {target / WEIGHTS_FILE} and {target / MODEL_CONFIG_FILE}")
