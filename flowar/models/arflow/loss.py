"""Training of ARFlow: the times of a sequence, the path of each of its images, and the loss. Read next: generate.py."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowar.models.family import check_shape

if TYPE_CHECKING:
    from flowar.models.arflow.model import ARFlow


def sample_times(batch_size: int, num_images: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the times of each sequence's images, (B, S), float32: uniform in (0, 1], sorted, the noisiest first."""
    device = generator.device if generator else None
    uniform = torch.rand(batch_size, num_images, generator=generator, device=device)
    return 1 - uniform.sort(dim=1).values


def velocity_error(
    forward: Callable[..., Any], latents: Tensor, labels: Tensor, *, time: Tensor, noise: Tensor
) -> Tensor:
    """Return the mean squared velocity error, a float32 scalar: over sequences, images, channels and pixels alike.

    ARFlow, the loss as released: the straight path (1 - time) latents + time noise of each image, without weights; the
    first image of a sequence, which sees no other, counts as well.

    Args:
        forward: ARFlow or a wrapper of it: (noisy, time, labels) -> (velocity, state).
        latents: (B, S, C, h, w), about unit std.
        labels: (B,) int64, num_classes where the label was dropped.
        time: (B, S) in [0, 1], falling along a sequence.
        noise: (B, S, C, h, w), standard normal, independent for each image.
    """
    at = time[:, :, None, None, None]
    velocity, _ = forward((1 - at) * latents + at * noise, time, labels)
    error: Tensor = (velocity.float() - (noise - latents).float()).square().mean()
    return error


def training_loss(
    model: "ARFlow", latents: Tensor, labels: Tensor, time: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Return ARFlow's training loss, a float32 scalar: the mean squared velocity error of sequences of images.

    Labels are used as they are: replace some by `num_classes` first to train for guidance.

    Args:
        model: an ARFlow.
        latents: (B, S, C, h, w), about unit std: S different images of one class.
        labels: (B,) int64, one for each sequence.
        time: (B, S) in [0, 1], falling along a sequence; drawn uniformly and sorted if None.
        noise: (B, S, C, h, w); drawn from N(0, 1) if None.

    Raises:
        ValueError: if the latents, times or noise don't have the shape that the model was made for.
    """
    images = latents.shape[1] if latents.ndim > 1 else 0
    check_shape("latents", latents, (len(labels), images, *model.config.latent_shape))
    if time is None:
        time = sample_times(len(labels), images).to(latents.device)
    if noise is None:
        noise = torch.randn_like(latents)
    check_shape("time", time, (len(labels), images))
    check_shape("noise", noise, tuple(latents.shape))
    return velocity_error(model, latents, labels, time=time, noise=noise)
