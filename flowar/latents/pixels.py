"""Adapter: no VAE at all. The latents are the pixels, and the model's patches are patches of the image.

Read next: vae.py, which asks of an adapter what it asks of diffusers' classes.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor, nn


class Pixels(nn.Module):
    """Gives images (B, 3, H, W) in [-1, 1] back as they are; `data.normalize=channel` brings them to unit std."""

    config: ClassVar[dict[str, Any]] = {"scaling_factor": 1.0, "latent_channels": 3, "block_out_channels": [3]}

    def encode(self, images: Tensor) -> SimpleNamespace:
        """Return the images as `.latent`."""
        return SimpleNamespace(latent=images)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Return the latents as `.sample`."""
        return SimpleNamespace(sample=latents)
