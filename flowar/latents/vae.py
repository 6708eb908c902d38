"""Images -> moments -> latents -> images; only here are the pixel range and the VAE known. Read next: batches.py.

The networks are diffusers' AutoencoderKL and AutoencoderDC. What isn't of these has an adapter: ldm.py (MAR's VAE,
VA-VAE and their like), rae.py (frozen encoders with a decoder), pixels.py (no VAE at all).
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.base.records import read_record
from flowar.base.tensors import load_plain_checkpoint, load_tensors
from flowar.latents.ldm import ldm_autoencoder
from flowar.latents.pixels import Pixels
from flowar.latents.rae import RepresentationAutoencoder
from flowar.latents.schema import LatentScale

DEMO_VAE = Path(__file__).parents[1] / "assets" / "demo_vae"

HUB_NAMES = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "dc-ae-f32c32": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
}

DIFFUSERS_CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderRAE")
# In the folder of a VAE that `flowar train-vae` wrote: what it was trained on, with the hash of its weights; its run
VAE_FILE, TRAINING_FOLDER = "vae.json", "training"
FILE_NAMES = ("mar", "ldm")  # VAEs whose weights are one file, vae.weights
SCALE = "scaling_factor"
# What loading raises where a file is damaged or holds something else.
NOT_A_VAE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # the bounds of diffusers' DiagonalGaussianDistribution
MAR_LATENT_MULTIPLIER = 0.2325  # the released code of MAR and FlowAR: 1 / std of the latents of ImageNet
MAR_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "scaling_factor": MAR_LATENT_MULTIPLIER,
}


class VAE(nn.Module):
    """An autoencoder, frozen.

    `latent_multiplier` is what brings its latents to about unit std: latents = multiplier x a sample of the moments.
    Where the autoencoder has a shift too, the means are given with it taken off. A deterministic one (DC-AE) has
    moments whose variance is as good as none.

    Raises:
        UserError: if its configuration has no such multiplier or shift.
    """

    def __init__(self, autoencoder: Any, name: str) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.name = name
        config = autoencoder.config
        self.latent_multiplier: float = config["scaling_factor"]
        self.latent_shift: float = config.get("shift_factor") or 0.0
        for setting, value in ((SCALE, self.latent_multiplier), ("shift_factor", self.latent_shift)):
            if not isinstance(value, int | float) or not math.isfinite(value) or (setting, value) == (SCALE, 0):
                raise UserError(f"vae.name={name} has {setting}={value!r} in its config.json; a number is needed")
        self.latent_scale = LatentScale(self.latent_multiplier)  # a run with data.normalize=channel has another
        self.latent_channels: int = config["latent_channels"]
        blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
        self.stride: int = 2 ** (len(blocks) - 1)
        self.image_size: int | None = config.get("image_size")  # the only one that it takes; None: any

    def encode(self, images: Tensor) -> Tensor:
        """Return the moments (B, 2 C, h, w), mean then log-variance, of images (B, 3, H, W) in [-1, 1]."""
        encoded = self.autoencoder.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, log_variance = encoded.latent_dist.parameters.chunk(2, dim=1)
        else:
            mean, log_variance = encoded.latent, torch.full_like(encoded.latent, MIN_LOG_VARIANCE)
        return torch.cat([mean - self.latent_shift, log_variance], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w) of about unit std."""
        multiplier, shift = (_per_channel(value, latents) for value in self.latent_scale)
        images: Tensor = self.autoencoder.decode(latents / multiplier + (shift + self.latent_shift)).sample
        return images

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of all weights, independent of their file; it identifies a VAE."""
        return hash_weights(self.autoencoder.state_dict())


def sample_posterior(moments: Tensor, noise: Tensor, latent_scale: LatentScale | float) -> Tensor:
    """Return latents (B, C, h, w) of about unit std: (mean + std x noise - shift) x multiplier.

    Args:
        moments: (B, 2 C, h, w), mean then log-variance.
        noise: (B, C, h, w), standard normal.
        latent_scale: shift and multiplier; a number is the multiplier of the VAE that made the moments.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
    scale = latent_scale if isinstance(latent_scale, LatentScale) else LatentScale(latent_scale)
    multiplier, shift = (_per_channel(value, mean) for value in scale)
    samples = mean + std * noise
    latents: Tensor = (samples if scale.shift == 0 else samples - shift) * multiplier
    return latents


def _per_channel(value: float | tuple[float, ...], latents: Tensor) -> Any:
    """Return a number, or one per channel as a tensor (C, 1, 1) that fits latents (B, C, h, w)."""
    return value if isinstance(value, int | float) else latents.new_tensor(value).view(-1, 1, 1)


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 in [0, 255], rounded to the nearest; the only such rounding here."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_vae(name_or_path: str, weights: str | Path | None = None) -> VAE:
    """Return a VAE, in evaluation mode, float32 on the CPU.

    Args:
        name_or_path: "mar" (the KL-16 VAE of MAR and FlowAR), "ldm" (any autoencoder in the layout of latent diffusion
            models: VA-VAE and others), "sd-vae-ft-ema", "sd-vae-ft-mse", "dc-ae-f32c32", "demo" (ships with this
            package), "pixels" (none), or an AutoencoderKL, -DC or -RAE in diffusers' layout: a folder or a Hugging Face
            hub id.
        weights: of "mar" the file kl16.ckpt, of "ldm" a .pt, .ckpt or .safetensors file.

    Raises:
        UserError: if the weights are missing, don't fit, or are of another kind of autoencoder.
    """
    if name_or_path in FILE_NAMES:
        return VAE(_load_ldm(weights) if name_or_path == "ldm" else _load_mar(weights), name_or_path)
    if weights is not None:
        raise UserError(
            f"vae.weights={weights} is for vae.name={' or '.join(FILE_NAMES)} only; vae.name={name_or_path} brings its "
            "own"
        )
    if name_or_path == "pixels":
        return VAE(Pixels(), name_or_path)
    source = DEMO_VAE if name_or_path == "demo" else HUB_NAMES.get(name_or_path, name_or_path)
    vae = VAE(_load_diffusers(source, name_or_path), name_or_path)
    record = Path(source) / VAE_FILE
    if record.is_file():
        cure = f"copy the folder {source} again, or train the VAE again"
        if vae.weights_sha256 != read_record(record, cure, needs=["vae_sha256"])["vae_sha256"]:
            raise UserError(f"vae.name={name_or_path}: its weights are not those that {record} was written for; {cure}")
    return vae


def _load_diffusers(source: str | Path, name: str) -> nn.Module:
    import diffusers

    try:
        kind = diffusers.AutoencoderKL.load_config(source).get("_class_name")
        if kind not in DIFFUSERS_CLASSES:
            raise UserError(f"vae.name={name} is a {kind}, but one of {', '.join(DIFFUSERS_CLASSES)} is needed")
        autoencoder: nn.Module
        autoencoder, loaded = getattr(diffusers, kind).from_pretrained(
            source, low_cpu_mem_usage=False, output_loading_info=True
        )
        if loaded["missing_keys"]:  # diffusers would draw them at random
            missing = sorted(loaded["missing_keys"])
            raise UserError(
                f"vae.name={name} lacks {len(missing)} of its weights, the first is {missing[0]}; copy it again, or "
                "use a config.json that fits the weights"
            )
        return RepresentationAutoencoder(autoencoder) if kind == "AutoencoderRAE" else autoencoder
    except (OSError, *NOT_A_VAE) as error:
        if isinstance(error, UserError):
            raise
        where = f"huggingface.co/{source}" if name in HUB_NAMES else "its source"
        problem = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"can't load vae.name={name}: {problem}; use mar, ldm, {', '.join(HUB_NAMES)}, demo, "
            "pixels, or a folder or hub id in diffusers' layout. Without a network: copy config.json and "
            f"diffusion_pytorch_model.safetensors from {where} into a folder and set vae.name to the folder"
        ) from error


def _load_mar(weights: str | Path | None) -> nn.Module:
    if weights is None or not Path(weights).is_file():
        raise UserError(
            f"vae.name=mar needs the file kl16.ckpt, got vae.weights={weights}; download it (see the README of MAR, "
            "github.com/LTH14/mar) and set vae.weights=/path/to/kl16.ckpt"
        )
    try:
        return mar_autoencoder(load_plain_checkpoint(Path(weights))["model"])
    except NOT_A_VAE as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"vae.weights={weights} is not MAR's kl16.ckpt: {problem}") from error


def mar_autoencoder(state_dict: dict[str, Tensor]) -> nn.Module:
    """Return diffusers' AutoencoderKL with MAR's KL-16 weights; every key has to fit."""
    return ldm_autoencoder(state_dict, MAR_CONFIG)


def _load_ldm(weights: str | Path | None) -> nn.Module:
    if weights is None or not Path(weights).is_file():
        raise UserError(
            f"vae.name=ldm needs a file of weights, got vae.weights={weights}; set vae.weights to a .pt, .ckpt or "
            ".safetensors file, for example vavae-imagenet256-f16d32-dinov2.pt"
        )
    file = Path(weights)
    if file.suffix == ".safetensors":
        content: Any = load_tensors(file, "download it again")
    else:
        content = load_plain_checkpoint(file)
    state_dict = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    try:
        return ldm_autoencoder({key: value for key, value in state_dict.items() if isinstance(value, Tensor)})
    except NOT_A_VAE as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(
            f"vae.weights={weights} can't be used as vae.name=ldm: {problem}; give an autoencoder of that layout, or "
            "convert it to diffusers' layout"
        ) from error
