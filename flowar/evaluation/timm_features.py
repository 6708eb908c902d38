"""Adapter: any image model of timm as a feature extractor, `extractor.name=timm:NAME`.

Images are brought to the input size, mean and std that timm's data config of the model gives. The features are what the
model's classifier gets. Read next: extractors.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import normalize, resize

from flowar.base.errors import UserError
from flowar.base.tensors import load_plain_checkpoint, load_tensors
from flowar.config.load import did_you_mean
from flowar.models.state_dicts import load_strictly

TIMM = "timm:"  # how such names begin


class TimmFeatures(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A timm model as a torch-fidelity feature extractor: layer "features"."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        """Create the model, with the weights of a file or else timm's pretrained ones.

        Raises:
            UserError: if timm or the model is unknown here, or the file does not hold this model.
        """
        super().__init__(name, features_list)
        timm, model_name, file = import_timm(name), name.removeprefix(TIMM), feature_extractor_weights_path
        if not timm.models.is_model(model_name):
            hint = did_you_mean(model_name, timm.list_models()) or "; `timm.list_models()` lists the names"
            raise UserError(f"extractor.name={name}: timm {timm.__version__} has no model {model_name}{hint}")
        self.model: Any = timm.create_model(model_name, pretrained=file is None)
        if file is not None:
            load_strictly(self.model, read_state_dict(Path(file)), file)
        self.input = timm.data.resolve_model_data_config(self.model)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 224, 224, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features (N, D) of uint8 images (N, 3, H, W)."""
        pixels = resize(
            images.float() / 255,
            list(self.input["input_size"][1:]),
            interpolation=InterpolationMode(self.input["interpolation"]),
            antialias=True,
        )
        pixels = normalize(pixels, list(self.input["mean"]), list(self.input["std"]))
        return (self.model.forward_head(self.model.forward_features(pixels), pre_logits=True),)


def import_timm(name: str) -> Any:
    """Return the library.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"extractor.name={name} needs the package timm; run `pip install timm`") from error
    return timm


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the weights in a .safetensors file or a PyTorch checkpoint; no code in it is run.

    Raises:
        UserError: if the file cannot be read.
    """
    if file.suffix == ".safetensors":
        return load_tensors(file, "download it again")
    return load_plain_checkpoint(file)
