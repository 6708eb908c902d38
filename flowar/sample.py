"""Generation scale by scale, with KV cache and guidance, and `flowar sample`. No metrics.

Read next: evaluate.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowar.flow import check_shape, solve_euler
from flowar.model import FlowAR
from flowar.scales import next_input, num_tokens, token_range, unpatchify

TIME_SLACK = 1e-6  # grid points may coincide with the ends of the guidance interval


def scale_guidance(guidance: float, index: int, num_scales: int) -> float:
    """Return the guidance of one scale: 1 at the first, rising linearly to `guidance` at the last, as released."""
    if num_scales == 1:
        return guidance
    return 1 + (guidance - 1) * index / (num_scales - 1)


def guided_velocity(
    model: FlowAR, semantics: Tensor, span: range, *, weight: float, guided_times: set[float]
) -> Callable[[Tensor, float], Tensor]:
    """Return the velocity (state, time) -> (B, N, C p p) of one scale, guided by `weight` at the `guided_times`.

    Where guidance does not act, the flow Transformer's unconditional half is not computed.

    Args:
        semantics: of this scale, (B, N, D), or (2 B, N, D) with the unconditional half last.
    """

    def velocity(state: Tensor, time: float) -> Tensor:
        guided = weight > 1 and time in guided_times
        batch = torch.cat([state, state]) if guided else state
        at = torch.full((len(batch), 1), time, dtype=torch.float32, device=state.device)
        result = model.flow(batch, at, semantics[: len(batch)], span)
        if not guided:
            return result
        conditional, unconditional = result.chunk(2)
        return unconditional + weight * (conditional - unconditional)

    return velocity


@torch.inference_mode()
def sample_token_maps(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return the generated map of every scale, (B, C, side p, side p) coarse to fine; arguments as `sample_latents`."""
    config = model.config
    if guidance < 1:
        raise ValueError(f"guidance={guidance} is below 1, which is no guidance; use 1 or more")
    device = labels.device
    shape = (len(labels), num_tokens(config.scales), config.token_width)
    if noise is None:
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
    check_shape("noise", noise, shape)

    low, high = guidance_interval
    times = time_grid.tolist()[:-1]
    guided_times = {time for time in times if low - TIME_SLACK <= time <= high + TIME_SLACK}
    is_guided = guidance > 1 and bool(guided_times)
    if is_guided:  # The unconditional half runs through the AR Transformer at every scale: later scales see its keys.
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    token_maps: list[Tensor] = []
    inputs = noise.new_zeros(len(labels), 0, config.token_width)
    cache = None
    for index, side in enumerate(config.scales):
        span = range(index, index + 1)
        if token_maps:
            inputs = next_input(token_maps[-1], side, config.scales, config.patch_size)
            inputs = torch.cat([inputs, inputs]) if is_guided else inputs
        semantics, cache = model.ar(inputs, labels, span, cache)
        weight = scale_guidance(guidance, index, len(config.scales)) if is_guided else 1.0
        velocity = guided_velocity(model, semantics, span, weight=weight, guided_times=guided_times)
        tokens = solve_euler(velocity, noise[:, token_range(config.scales, span)], time_grid)
        token_maps.append(unpatchify(tokens, side, config.patch_size))
    return token_maps


def sample_latents(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return generated latents (B, C, h, w), about unit std: the VAE's `decode` divides by the multiplier.

    Args:
        model: a FlowAR in evaluation mode.
        labels: (B,) int64 classes, on the model's device; num_classes draws from all classes.
        time_grid: (steps + 1,) from 1 to 0, for example `released_time_grid(25)`.
        guidance: classifier-free guidance at the finest scale, growing linearly from 1 at the coarsest; 1 is off, and
            costs nothing.
        guidance_interval: (low, high) in time; steps that start outside are not guided, and cost nothing extra.
        noise: (B, L, C p p), standard normal, packed coarse to fine; drawn with `generator` if None.
        generator: of the noise; torch's global one if None.

    Raises:
        ValueError: if guidance is below 1 or the noise has another shape.
    """
    return sample_token_maps(
        model,
        labels,
        time_grid=time_grid,
        guidance=guidance,
        guidance_interval=guidance_interval,
        noise=noise,
        generator=generator,
    )[-1]
