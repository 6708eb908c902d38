"""Adapter: representation autoencoders (RAE, arXiv:2510.11690), a frozen encoder such as DINOv2 with a ViT decoder.

diffusers' AutoencoderRAE takes images in [0, 1], of one size; its latents have unit std by its own statistics.
Read next: vae.py, which asks of an adapter what it asks of diffusers' classes.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class RepresentationAutoencoder(nn.Module):
    """diffusers' AutoencoderRAE, for images in [-1, 1]."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        levels = int(autoencoder.decoder_patch_size).bit_length()  # vae.py counts these for the stride
        self.config: dict[str, Any] = {
            "scaling_factor": 1.0,  # its own is applied in it
            "latent_channels": autoencoder.config.encoder_hidden_size,
            "block_out_channels": [1] * levels,
            "image_size": autoencoder.decoder_image_size,
        }

    def encode(self, images: Tensor) -> SimpleNamespace:
        """Return the latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1] as `.latent`."""
        return SimpleNamespace(latent=self.autoencoder.encode((images + 1) / 2).latent)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Return the images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w) as `.sample`."""
        return SimpleNamespace(sample=self.autoencoder.decode(latents).sample * 2 - 1)
