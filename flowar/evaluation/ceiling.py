"""The ceiling: real images encoded and decoded by the samples' VAE, an upper limit for samples of the model.

Read next: latents/vae.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowar.base.errors import UserError
from flowar.config.data import VAEConfig
from flowar.evaluation.image_sets import ImageSet, open_images
from flowar.latents.vae import VAE, from_uint8, load_vae, to_uint8
from flowar.sampling.folder import hash_json
from flowar.sampling.job import choose_vae


@dataclass(frozen=True)
class RebuiltImages(ImageSet):
    """Images encoded and decoded by a VAE, from the means of its moments."""

    vae: VAE | None = None
    device: torch.device | None = None

    @torch.inference_mode()
    def read_many(self, places: range, mapped: Callable[..., Iterable[NDArray[np.uint8]]] = map) -> NDArray[np.uint8]:
        """Return rebuilt images as uint8 (N, 3, H, W); same errors as in `ImageSet`."""
        assert self.vae is not None
        pixels = torch.from_numpy(super().read_many(places, mapped).copy()).to(self.device)
        mean, _ = self.vae.encode(from_uint8(pixels)).chunk(2, dim=1)
        rebuilt: NDArray[np.uint8] = to_uint8(self.vae.decode(mean * self.vae.latent_multiplier)).cpu().numpy()
        return rebuilt


def open_ceiling(
    sampling: dict[str, Any] | None, given: VAEConfig | None, images: Path | None, count: int, device: torch.device
) -> RebuiltImages:
    """Return real images through the VAE of the samples.

    Args:
        sampling: the samples' record.
        given: the VAE in the samples' settings, if they are known.
        images: the real ones.
        count: number of samples; at most this many images are taken, evenly spaced, so that metrics have the same bias.
        device: of the VAE.

    Raises:
        UserError: if the VAE or the images are missing or don't fit.
    """
    if sampling is None:
        raise UserError("the samples have no record that names their VAE")
    if images is None:
        raise UserError("the reference holds only statistics, no images")
    real = open_images(images, "reference")
    vae_config = choose_vae(given, Path(str(sampling.get("model", ""))))
    vae = load_vae(vae_config.name, vae_config.weights).to(device)
    if vae.weights_sha256 != sampling.get("vae_sha256"):
        raise UserError(
            f"VAE {vae_config.name} has weights {vae.weights_sha256[:12]} on this machine, but the samples were "
            f"decoded with {str(sampling.get('vae_sha256'))[:12]}"
        )
    height, width = real.read_checked(0).shape[:2]
    if height % vae.stride or width % vae.stride:
        raise UserError(f"the real images have {width} x {height} pixels, not multiples of the VAE's {vae.stride}")
    places = torch.linspace(0, len(real) - 1, min(count, len(real))).round().long().tolist()
    return RebuiltImages(
        real.root, "rebuilt", list(range(len(places))), [real.labels[place] for place in places],
        hash_json(real.identity, vae.weights_sha256, len(places)), lambda place: real.read(places[place]),
        real.class_names, vae, device,
    )  # fmt: skip
