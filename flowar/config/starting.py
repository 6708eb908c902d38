"""What a run starts from: `init`, and the shape of a model that starts with the weights of another one. No torch.

Read next: training.py, which has it as a section; training/start.py, which loads the weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from flowar.base.errors import UserError
from flowar.base.records import read_record
from flowar.base.run_folder import MODEL_CONFIG_FILE, PASSPORT_FILE, weights_folder
from flowar.config.models import DataShape, ModelConfig, config_from_dict

INIT_CURE = "export or convert that model again, or give another init"


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights to start from instead of fresh ones; init=MODEL is short for init.model=MODEL."""

    plain_setting: ClassVar[str] = "model"

    # a model folder, a training run (its newest checkpoint) or one checkpoint; None: fresh weights. It is read only
    # until the run has its own first checkpoint; RUN_DIR/init.json records it
    model: str | None = None
    weights: str = "ema"  # weights of a run: ema (its first average), raw, or an average such as decay_0.9999
    # for each class of the dataset, in order, the init model's class whose label embedding it starts from: a name, a
    # number, or "new"; None: the class of the same name if names are known, else of the same number
    classes: tuple[str, ...] | None = None
    class_file: str | None = None  # a text file with these classes instead, one per line

    def __post_init__(self) -> None:
        if self.classes is not None and self.class_file is not None:
            raise UserError(f"init.classes and init.class_file={self.class_file} say the same; give one of them")
        given = [name for name in ("classes", "class_file") if getattr(self, name) is not None]
        if given and self.model is None:
            raise UserError(f"init.{given[0]} is for init=MODEL, which is not given")


def read_init_shape(model: str) -> ModelConfig:
    """Return the shape of the model at `init.model`.

    Raises:
        UserError: if it is missing or damaged.
    """
    folder = weights_folder(model)
    if not (folder / MODEL_CONFIG_FILE).is_file():
        there = "there is no such folder" if not folder.exists() else f"it has no {MODEL_CONFIG_FILE}"
        raise UserError(
            f"init.model={model} is not a model ({there}); give a model folder, a run_dir or a checkpoint. `flowar "
            f"convert` makes a folder of the authors' file, `flowar export {model} models/NAME` of one on the "
            "Hugging Face hub"
        )
    file = folder / MODEL_CONFIG_FILE
    try:
        return config_from_dict(read_record(file, INIT_CURE), str(file))
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}; check its storage and its permissions") from error


def read_data_shape(path: str) -> DataShape | None:
    """Return what latents and how many classes a local dataset holds; None if it is not there (yet), or remote."""
    file = Path(path) / PASSPORT_FILE
    if not file.is_file():
        return None
    passport = read_record(file, "prepare the dataset again", ("class_names", "moments_shape"))
    try:
        channels, side, _ = map(int, passport["moments_shape"])
        return DataShape(channels // 2, side, len(passport["class_names"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged (moments_shape or class_names); prepare the dataset again") from error


def shape_to_start_with(init: str, given: Mapping[str, Any], data_path: str | None) -> ModelConfig:
    """Return the shape of a model that starts with the weights of `init`: its own, fitted to the dataset.

    Args:
        init: where that model is.
        given: settings of `model` that were given, which win.
        data_path: of the dataset.

    Raises:
        UserError: if there is no such model, or how it fits the data can't be told; names the settings to give.
    """
    shape = read_init_shape(init)
    data = read_data_shape(data_path) if data_path is not None else None
    fitting = shape.fitted_to(data, given)
    return config_from_dict(asdict(shape) | fitting | dict(given), f"init.model={init} with the settings of model")
