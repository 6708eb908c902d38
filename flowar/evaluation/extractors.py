"""Networks that compute features of images, mostly torch-fidelity's, and their weights. Read next: store.py."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowar.base.devices import convolution_precision
from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.config.data import ExtractorConfig
from flowar.evaluation.timm_features import TIMM, TimmFeatures

OWN = "own"  # a judge, trained on the real images of a dataset: judge.py
INCEPTION, DINOV2, VGG = "inception-v3-compat", "dinov2-vit-l-14", "vgg16"

# file name in torch hub's folder of checkpoints, first digits of its sha256, where it is fetched from
PUBLISHED_WEIGHTS = {
    INCEPTION: (
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    VGG: ("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"),
}

DINOV2_FILES = ("facebookresearch_dinov2_main", "checkpoints/dinov2_vitl14_pretrain.pth")  # below torch hub's folder

SPATIAL_MODULE, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7  # ADM's mixed_6/conv:0, of which sFID takes 7 channels


class Extractor:
    """A network that computes features: layers "features", and "logits" and "spatial" if it has them."""

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        """Load the network.

        Raises:
            UserError: if there is no such network, or its weights are missing or not the published ones.
        """
        self.name = config.name
        self.device = device
        if config.name == OWN and OWN not in FEATURE_EXTRACTORS_REGISTRY:
            from flowar.evaluation.judge import JudgeFeatures

            register_feature_extractor(OWN, JudgeFeatures)
        if config.name.startswith(TIMM) and config.name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(config.name, TimmFeatures)
        if config.name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join((*FEATURE_EXTRACTORS_REGISTRY, OWN, f"{TIMM}NAME"))
            raise UserError(f"extractor.name={config.name} is unknown; choose one of {known}")
        check_weights(config)
        is_checked = check_hub_weights(config) or (config.weights is not None and not config.other_weights)
        kind = FEATURE_EXTRACTORS_REGISTRY[config.name]
        layers = {"features": kind.get_default_feature_layer_for_metric("prc" if config.name == VGG else "fid")}
        if config.name in (INCEPTION, OWN):
            layers["logits"] = kind.get_default_feature_layer_for_metric("isc")
        provided = [layer for layer in kind.get_provided_features_list() if layer in layers.values()]
        try:
            is_foreign = config.name in PUBLISHED_WEIGHTS or config.name.startswith(TIMM)
            with weights_as_data(is_foreign and not is_checked):
                self.network = create_feature_extractor(
                    config.name,
                    provided,
                    cuda=False,
                    feature_extractor_weights_path=config.weights,
                    verbose=False,
                ).to(device)
        except OSError as error:  # urllib's URLError is one
            given = ", or set extractor.weights to the file" if is_foreign else ""
            raise UserError(f"{missing_weights(config.name)}{given} (fetching failed: {error})") from error
        except (RuntimeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            source = config.weights or torch.hub.get_dir()
            raise UserError(
                f"the weights of {config.name} in {source} can't be used; copy or download them again: {error!r}"[:400]
            ) from error
        if not is_checked:
            check_hub_weights(config)  # they were just downloaded
        self._order = [next(name for name, layer in layers.items() if layer == own) for own in provided]
        self._spatial: Tensor | None = None
        if config.name == INCEPTION:
            self.network.get_submodule(SPATIAL_MODULE).register_forward_hook(self._keep_spatial)
        self.weights_sha256 = hash_weights(self.network.state_dict())

    def _keep_spatial(self, module: object, arguments: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 x 17 x 7), ADM's order

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the layers of uint8 images (N, 3, H, W), float32 on the CPU."""
        with convolution_precision("fp32"):
            outputs = dict(zip(self._order, self.network(images.to(self.device)), strict=True))
        if self._spatial is not None:
            outputs["spatial"] = self._spatial
        return {name: output.float().cpu() for name, output in outputs.items()}


@contextlib.contextmanager
def weights_as_data(is_needed: bool) -> Iterator[None]:
    """Make torch read pickles as data only, although torch-fidelity allows code: weights may come from anyone."""
    before = os.environ.copy()
    if is_needed:
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_weights(config: ExtractorConfig) -> None:
    """Raise a UserError if the given weights don't exist, or are not the published ones."""
    if config.weights is None:
        if config.name == OWN:
            raise UserError(
                f"extractor.name={OWN} needs the judge's file, extractor.weights=FILE; `flowar evaluate samples=... "
                f"reference=... extractor.name={OWN}` trains a judge and prints its file"
            )
        return
    if config.name.startswith("dinov2"):
        raise UserError(
            f"extractor.weights={config.weights} can't be used: {config.name} is read from torch hub's folder; leave "
            "it out, and set TORCH_HOME if the folder is elsewhere"
        )
    file = Path(config.weights)
    if not file.is_file():
        raise UserError(f"extractor.weights={file} does not exist; give the file with the weights of {config.name}")
    if config.name in PUBLISHED_WEIGHTS and not config.other_weights:
        _check_hash(config.name, file)


def check_hub_weights(config: ExtractorConfig) -> bool:
    """Return whether the weights are read from torch hub's folder and already exist there.

    Raises:
        UserError: if they are not the published ones.
    """
    if config.weights is not None or config.name not in PUBLISHED_WEIGHTS or not has_weights(config.name):
        return False
    _check_hash(config.name, Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED_WEIGHTS[config.name][0])
    return True


def _check_hash(name: str, file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    published, expected, url = PUBLISHED_WEIGHTS[name]
    if not found.startswith(expected):
        raise UserError(
            f"the weights {file} have sha256 {found[:8]}..., but {published} has {expected}...; download it from {url},"
            " or set extractor.other_weights=true for numbers that can't be compared with published ones"
        )


def has_weights(name: str) -> bool:
    """Return whether a network's weights are in torch hub's folder."""
    folder = Path(torch.hub.get_dir())
    files = DINOV2_FILES if name == DINOV2 else (f"checkpoints/{PUBLISHED_WEIGHTS[name][0]}",)
    return all((folder / file).exists() for file in files)


def missing_weights(name: str) -> str:
    """Return a message that says which file is missing, and where to put it."""
    folder = Path(torch.hub.get_dir())
    if name == DINOV2:
        return (
            f"the weights of {name} are missing: on a machine with internet access run "
            f'"python -c \'import torch; torch.hub.load(\\"facebookresearch/dinov2\\", \\"dinov2_vitl14\\")\'" and '
            f"copy {' and '.join(DINOV2_FILES)} from its ~/.cache/torch/hub to {folder}"
        )
    if name in PUBLISHED_WEIGHTS:
        file, _, url = PUBLISHED_WEIGHTS[name]
        return f"the weights of {name} are missing: download {url} to {folder / 'checkpoints' / file}"
    if name.startswith(TIMM):
        return f"the weights of {name} are missing; timm downloads them on a machine with internet access"
    return f"the weights of {name} are missing; torch-fidelity downloads them on a machine with internet access"
