"""Flow matching (FlowAR, arXiv:2412.15205): the path, its velocity and the loss per scale. Takes any velocity function.

`time` is 0 at the data and 1 at the noise, as in the released weights; the paper's t is 1 - time, and its velocity has
the opposite sign. No other file mentions it. Read next: solvers.py, train.py.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowar.config.models import FlowARConfig
from flowar.models.family import check_shape, weigh
from flowar.models.flowar.scales import num_tokens, pack, training_inputs

if TYPE_CHECKING:
    from flowar.models.flowar.model import FlowAR


def interpolate(tokens: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the point at `time` on the straight path from data to noise, (1 - time) tokens + time noise.

    FlowAR (arXiv:2412.15205), scale-wise flow matching.

    Args:
        tokens: clean tokens, (B, N, C).
        noise: standard normal, same shape and dtype.
        time: (B, N) in [0, 1], the same for all tokens of a scale; 0 gives `tokens`, 1 gives `noise`.
    """
    return (1 - time[..., None]) * tokens + time[..., None] * noise


def per_token(values: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Return one value per token (B, L) from one per scale (B, K)."""
    return torch.cat([values[:, k, None].expand(-1, side * side) for k, side in enumerate(scales)], dim=1)


def sample_time(batch_size: int, num_scales: int, generator: torch.Generator | None = None) -> Tensor:
    """Return one uniform time per sample and scale, (B, K), float32, on the generator's device."""
    device = generator.device if generator else None
    return torch.rand(batch_size, num_scales, generator=generator, device=device)


def scale_losses(
    velocity: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    config: FlowARConfig,
    latents: Tensor,
    labels: Tensor,
    *,
    time: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return the mean squared velocity error of each scale, (K,) float32, mean over batch, tokens and channels.

    Args:
        velocity: FlowAR or a wrapper of it: (inputs, labels, noisy, time) -> (B, L, C p p).
        config: of the model; latents are latent_size high and wide.
        latents: (B, C, h, w), about unit std.
        labels: (B,) int64, num_classes where the label was dropped.
        time: (B, K) in [0, 1].
        noise: (B, L, C p p), standard normal.
    """
    scales, patch_size = config.scales, config.patch_size
    tokens = pack(latents, scales, patch_size)
    noisy = interpolate(tokens, noise, per_token(time, scales))
    predicted = velocity(training_inputs(latents, scales, patch_size), labels, noisy, time)
    errors = (predicted.float() - (noise - tokens).float()).square()
    return torch.stack([scale_errors.mean() for scale_errors in errors.split([side * side for side in scales], dim=1)])


def scale_weights(scales: tuple[int, ...]) -> tuple[float, ...]:
    """Return the weight of each scale in the loss: its share of the finest scale's tokens."""
    return tuple(side * side / scales[-1] ** 2 for side in scales)


def training_loss(
    model: "FlowAR", latents: Tensor, labels: Tensor, time: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Return FlowAR's training loss, a float32 scalar: per-scale mean squared errors, weighted by their token counts.

    Labels are used as they are: who trains for guidance replaces some by `num_classes` first.

    Args:
        model: a FlowAR; in training mode its dropout acts.
        latents: (B, C, h, w), about unit std.
        labels: (B,) int64.
        time: (B, K) in [0, 1], coarse to fine; drawn uniformly if None.
        noise: (B, L, C p p), packed coarse to fine; drawn from N(0, 1) if None.

    Raises:
        ValueError: if the latents or the noise don't have the shape that the model was made for.
    """
    config = model.config
    check_shape("latents", latents, (len(labels), *config.latent_shape))
    packed = (len(labels), num_tokens(config.scales), config.token_width)
    if time is None:
        time = sample_time(len(labels), len(config.scales)).to(latents.device)
    if noise is None:
        noise = torch.randn(packed, device=latents.device, dtype=latents.dtype)
    check_shape("time", time, (len(labels), len(config.scales)))
    check_shape("noise", noise, packed)
    losses = scale_losses(model, config, latents, labels, time=time, noise=noise)
    return weigh(losses, scale_weights(config.scales))
