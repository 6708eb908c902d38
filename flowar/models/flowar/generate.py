"""Generation scale by scale (FlowAR, arXiv:2412.15205), with KV cache and guidance. Knows no files and no metrics.

Read next: ../solvers.py, family.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowar.config.drawing import DrawConfig
from flowar.models.family import check_shape
from flowar.models.flowar.model import FlowAR, Modulations
from flowar.models.flowar.scales import next_input, num_tokens, token_range, unpatchify
from flowar.models.solvers import TIME_SLACK, evaluation_times, make_time_grid, solve


class Guidance(NamedTuple):
    """Classifier-free guidance: how strong, at which times, and how it grows over the scales."""

    weight: float = 1.0  # 1: none
    interval: tuple[float, float] = (0.0, 1.0)  # in time; outside nothing is guided
    schedule: str = "linear"  # from 1 at the coarsest scale to `weight` at the finest, as released; or "constant"

    def at_scale(self, index: int, num_scales: int) -> float:
        """Return the weight at one scale."""
        is_flat = self.schedule == "constant" or num_scales == 1
        return self.weight if is_flat else 1 + (self.weight - 1) * index / (num_scales - 1)

    def acts_at(self, time: float) -> bool:
        """Return whether a time lies in the interval, its ends included."""
        low, high = self.interval
        return low - TIME_SLACK <= time <= high + TIME_SLACK

    def acts_in(self, solver: str, time_grids: Sequence[Tensor]) -> bool:
        """Return whether anything is guided at the times at which the solver asks for the velocity."""
        times = (time for grid in time_grids for time in evaluation_times(solver, grid))
        return self.weight > 1 and any(self.acts_at(time) for time in times)


def guided_velocity(
    model: FlowAR,
    semantics: Tensor,
    span: range,
    weight: float,
    guidance: Guidance,
    modulations: dict[float, Modulations],
) -> Callable[[Tensor, float], Tensor]:
    """Return the velocity (state, time) -> (B, N, C p p) of one scale, guided by `weight` where guidance acts.

    Where it does not act, the flow Transformer's unconditional half is not computed.

    Args:
        model: in evaluation mode.
        semantics: of this scale, (B, N, D); (2 B, N, D) with the unconditional half last where weight is above 1.
        span: this scale.
        weight: of the guidance at this scale.
        guidance: when it acts.
        modulations: for every time that the solver uses.
    """
    both = model.flow.prepare(semantics, span)
    conditional = both.first(len(semantics) // 2) if weight > 1 else both

    def velocity(state: Tensor, time: float) -> Tensor:
        if weight == 1 or not guidance.acts_at(time):
            return model.flow.step(state, modulations[time], conditional, span)
        halves = model.flow.step(torch.cat([state, state]), modulations[time], both, span)
        with_class, without_class = halves.chunk(2)
        return torch.lerp(without_class, with_class, weight)

    return velocity


@torch.no_grad()
def sample_token_maps(
    model: FlowAR,
    labels: Tensor,
    *,
    noise: Tensor,
    time_grids: Sequence[Tensor],
    guidance: Guidance,
    solver: str,
    draw_noise: Callable[[tuple[int, ...]], Tensor] | None,
    on_stage: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the generated map of every scale, (B, C, side p, side p) coarse to fine; arguments as `sample_latents`."""
    config = model.config
    check_shape("noise", noise, (len(labels), num_tokens(config.scales), config.token_width))
    if len(time_grids) != len(config.scales):
        raise ValueError(f"{len(time_grids)} time grids were given for {len(config.scales)} scales")
    is_guided = guidance.acts_in(solver, time_grids)
    if is_guided:  # The unconditional half runs through the AR Transformer at every scale: later scales see its keys.
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    times = list(dict.fromkeys(time for grid in time_grids for time in evaluation_times(solver, grid)))
    modulations = dict(zip(times, model.flow.modulations(times), strict=True))
    token_maps: list[Tensor] = []
    inputs = noise.new_zeros(len(labels), 0, config.token_width)
    cache = None
    for index, side in enumerate(config.scales):
        span = range(index, index + 1)
        if token_maps:
            inputs = next_input(token_maps[-1], side, config.scales, config.patch_size)
            inputs = torch.cat([inputs, inputs]) if is_guided else inputs
        semantics, cache = model.ar(inputs, labels, span, cache)
        if index == len(config.scales) - 1:
            cache = None  # not needed any more, and much memory
        weight = guidance.at_scale(index, len(config.scales)) if is_guided else 1.0
        semantics = semantics if weight > 1 else semantics[: len(noise)]
        velocity = guided_velocity(model, semantics, span, weight, guidance, modulations)
        draw = None if draw_noise is None else functools.partial(draw_noise, (side * side, config.token_width))
        tokens = solve(solver, velocity, noise[:, token_range(config.scales, span)], time_grids[index], draw)
        token_maps.append(unpatchify(tokens, side, config.patch_size))
        if on_stage is not None:
            on_stage(index, token_maps[-1])
    return token_maps


def sample_latents(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor | Sequence[Tensor],
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_schedule: str = "linear",
    solver: str = "euler",
    noise: Tensor | None = None,
    draw_noise: Callable[[tuple[int, ...]], Tensor] | None = None,
    generator: torch.Generator | None = None,
    on_stage: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return generated latents (B, C, h, w), about unit std: the VAE's `decode` divides by the multiplier.

    Args:
        model: a FlowAR in evaluation mode.
        labels: (B,) int64 classes, on the model's device; num_classes draws from all classes.
        time_grid: (steps + 1,) from 1 to 0, for example `released_time_grid(25)`; or one such grid for each scale.
        guidance: classifier-free guidance; 1 is off, and costs nothing.
        guidance_interval: (low, high) in time; outside nothing is guided, and costs nothing extra.
        guidance_schedule: "linear", from 1 at the coarsest scale to `guidance` at the finest, as released; "constant".
        solver: euler, heun, midpoint, adams-bashforth or euler-maruyama, of solvers.py.
        noise: (B, L, C p p), standard normal, packed coarse to fine; drawn with `generator` if None.
        draw_noise: (N, C p p) -> (B, N, C p p) standard normal, once a step; for euler-maruyama.
        generator: of the noise; torch's global one if None.
        on_stage: called after each scale with its index and its map, (B, C, side p, side p).

    Raises:
        ValueError: if guidance is below 1, the noise has another shape, or the grids are not one for each scale.
    """
    if guidance < 1:
        raise ValueError(f"guidance={guidance} is below 1; use 1 (no guidance) or more")
    config = model.config
    if noise is None:
        shape = (len(labels), num_tokens(config.scales), config.token_width)
        device = generator.device if generator else labels.device
        noise = torch.randn(shape, generator=generator, device=device).to(labels.device)
    grids = [time_grid] * len(config.scales) if isinstance(time_grid, Tensor) else list(time_grid)
    token_maps = sample_token_maps(
        model,
        labels,
        noise=noise,
        time_grids=grids,
        guidance=Guidance(guidance, guidance_interval, guidance_schedule),
        solver=solver,
        draw_noise=draw_noise,
        on_stage=on_stage,
    )
    return token_maps[-1]


def annealed_steps(first: int, last: int, num_scales: int) -> tuple[int, ...]:
    """Return the steps of each scale, linear from the coarsest to the finest (diffusion step annealing, DiSA, 2025).

    Fractions are dropped, as the authors of DiSA do: 25 to 15 over five scales is 25, 22, 20, 17, 15.
    """
    if num_scales == 1:
        return (last,)
    gaps = num_scales - 1
    return tuple((first * (gaps - index) + last * index) // gaps for index in range(num_scales))


def make_time_grids(how: DrawConfig, num_scales: int) -> list[Tensor]:
    """Return the time grid of each scale."""
    last = how.num_steps if how.last_scale_steps is None else how.last_scale_steps
    steps = annealed_steps(how.num_steps, last, num_scales)
    return [make_time_grid(how.time_grid, number, how.shift) for number in steps]
