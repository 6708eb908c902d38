"""Images -> moments -> latents -> images; only here are the pixel range and the VAE known. Read next: data.py.

The networks are diffusers' AutoencoderKL and AutoencoderDC; MAR's weights are mapped onto the former.
"""

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.base.tensors import load_plain_checkpoint

DEMO_VAE = Path(__file__).parents[1] / "assets" / "demo_vae"

HUB_NAMES = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "dc-ae-f32c32": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
}

DIFFUSERS_CLASSES = ("AutoencoderKL", "AutoencoderDC")
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

# Names in kl16.ckpt -> diffusers' names, replaced in this order.
MAR_NAMES = (
    (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d)\.attn\.(\d)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.(\d)\.", lambda m: f".up_blocks.{4 - int(m[1])}.resnets.{m[2]}."),
    (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{4 - int(m[1])}.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(\.attentions\.\d)\.proj_out\.", r"\1.to_out.0."),
)


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
        self.latent_multiplier: float = config.scaling_factor
        self.latent_shift: float = config.get("shift_factor") or 0.0
        for setting, value in ((SCALE, self.latent_multiplier), ("shift_factor", self.latent_shift)):
            if not isinstance(value, int | float) or not math.isfinite(value) or (setting, value) == (SCALE, 0):
                raise UserError(f"vae.name={name} has {setting}={value!r} in its config.json; a number is needed")
        self.latent_channels: int = config.latent_channels
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        self.stride: int = 2 ** (len(blocks) - 1)

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
        images: Tensor = self.autoencoder.decode(latents / self.latent_multiplier + self.latent_shift).sample
        return images

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of all weights, whatever file they came from; tells VAEs apart."""
        return hash_weights(self.autoencoder.state_dict())


def sample_posterior(moments: Tensor, noise: Tensor, latent_multiplier: float) -> Tensor:
    """Return latents (B, C, h, w) of about unit std: multiplier x (mean + std x noise).

    Args:
        moments: (B, 2 C, h, w), mean then log-variance.
        noise: (B, C, h, w), standard normal.
        latent_multiplier: of the VAE that made the moments.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
    return (mean + std * noise) * latent_multiplier


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 in [0, 255], rounded to the nearest; the only such rounding here."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_vae(name_or_path: str, weights: str | Path | None = None) -> VAE:
    """Return a VAE, in evaluation mode, float32 on the CPU.

    Args:
        name_or_path: "mar" (the KL-16 VAE of MAR and FlowAR), "sd-vae-ft-ema", "sd-vae-ft-mse", "dc-ae-f32c32", "demo"
            (ships with this package), or an AutoencoderKL or AutoencoderDC in diffusers' layout: a folder or a Hugging
            Face hub id.
        weights: the file kl16.ckpt, for "mar" only.

    Raises:
        UserError: if the weights are missing, don't fit, or are of another kind of autoencoder.
    """
    if name_or_path == "mar":
        return VAE(_load_mar(weights), "mar")
    if weights is not None:
        raise UserError(f"vae.weights={weights} is for vae.name=mar only; vae.name={name_or_path} brings its own")
    source = DEMO_VAE if name_or_path == "demo" else HUB_NAMES.get(name_or_path, name_or_path)
    return VAE(_load_diffusers(source, name_or_path), name_or_path)


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
        return autoencoder
    except (OSError, *NOT_A_VAE) as error:
        if isinstance(error, UserError):
            raise
        where = f"huggingface.co/{source}" if name in HUB_NAMES else "its source"
        problem = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"can't load vae.name={name}: {problem}; use mar, {', '.join(HUB_NAMES)}, demo, or a "
            "folder or hub id in diffusers' layout. Without a network: copy config.json and "
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
    from diffusers import AutoencoderKL

    weights = {}
    for theirs, tensor in state_dict.items():
        name = theirs
        for pattern, replacement in MAR_NAMES:
            name = re.sub(pattern, replacement, name)
        is_linear = re.search(r"\.to_(q|k|v|out\.0)\.weight", name)  # theirs are 1 x 1 convolutions
        weights[name] = tensor[:, :, 0, 0] if is_linear else tensor
    autoencoder: nn.Module = AutoencoderKL(**MAR_CONFIG)
    autoencoder.load_state_dict(weights)
    return autoencoder
