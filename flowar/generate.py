"""Generation scale by scale, with KV cache and guidance. Knows no files and no metrics.

Read next: solvers.py, sample.py for the command.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flowar.config import ModelConfig, SampleConfig
from flowar.flow import check_shape
from flowar.model import FlowAR
from flowar.scales import next_input, num_tokens, token_range, unpatchify
from flowar.seeding import derive_seed
from flowar.solvers import (
    annealed_steps,
    evaluation_times,
    released_time_grid,
    shifted_time_grid,
    solve,
    uniform_time_grid,
)

NOISE_STREAM, STEP_STREAM = 3, 4  # keeps the seeds of the images apart from those of the training
TIME_SLACK = 1e-6  # grid points may coincide with the ends of the guidance interval


def scale_guidance(guidance: float, index: int, num_scales: int) -> float:
    """Return the guidance of one scale: 1 at the first, rising linearly to `guidance` at the last, as released."""
    if num_scales == 1:
        return guidance
    return 1 + (guidance - 1) * index / (num_scales - 1)


def find_guided_times(time_grid: Tensor, guidance_interval: tuple[float, float]) -> set[float]:
    """Return the times at which a step starts inside the guidance interval, its ends included."""
    return {time for time in time_grid.tolist()[:-1] if is_guided_at(time, guidance_interval)}


def is_guided_at(time: float, guidance_interval: tuple[float, float]) -> bool:
    """Return whether a time lies in the guidance interval, its ends included."""
    low, high = guidance_interval
    return low - TIME_SLACK <= time <= high + TIME_SLACK


def guided_velocity(
    model: FlowAR, semantics: Tensor, span: range, *, weight: float, guidance_interval: tuple[float, float]
) -> Callable[[Tensor, float], Tensor]:
    """Return the velocity (state, time) -> (B, N, C p p) of one scale, guided by `weight` inside the interval.

    Where guidance does not act, the flow Transformer's unconditional half is not computed.

    Args:
        semantics: of this scale, (B, N, D), or (2 B, N, D) with the unconditional half last.
    """

    def velocity(state: Tensor, time: float) -> Tensor:
        guided = weight > 1 and is_guided_at(time, guidance_interval)
        batch = torch.cat([state, state]) if guided else state
        at = torch.full((len(batch), 1), time, dtype=torch.float32, device=state.device)
        result = model.flow(batch, at, semantics[: len(batch)], span)
        if not guided:
            return result
        conditional, unconditional = result.chunk(2)
        return unconditional + weight * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_token_maps(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor | Sequence[Tensor],
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_schedule: str = "linear",
    solver: str = "euler",
    noise: Tensor | None = None,
    draw_noise: Callable[[tuple[int, int]], Tensor] | None = None,
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
    grids = [time_grid] * len(config.scales) if isinstance(time_grid, Tensor) else list(time_grid)
    if len(grids) != len(config.scales):
        raise ValueError(f"{len(grids)} time grids were given for {len(config.scales)} scales")

    is_guided = guidance > 1 and any(
        is_guided_at(time, guidance_interval) for grid in grids for time in evaluation_times(solver, grid)
    )
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
        weight = 1.0
        if is_guided:
            is_constant = guidance_schedule == "constant"
            weight = guidance if is_constant else scale_guidance(guidance, index, len(config.scales))
        velocity = guided_velocity(model, semantics, span, weight=weight, guidance_interval=guidance_interval)
        draw = None if draw_noise is None else functools.partial(draw_noise, (side * side, config.token_width))
        tokens = solve(solver, velocity, noise[:, token_range(config.scales, span)], grids[index], draw)
        token_maps.append(unpatchify(tokens, side, config.patch_size))
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
    draw_noise: Callable[[tuple[int, int]], Tensor] | None = None,
    generator: torch.Generator | None = None,
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

    Raises:
        ValueError: if guidance is below 1, the noise has another shape, or the grids are not one for each scale.
    """
    return sample_token_maps(
        model,
        labels,
        time_grid=time_grid,
        guidance=guidance,
        guidance_interval=guidance_interval,
        guidance_schedule=guidance_schedule,
        solver=solver,
        noise=noise,
        draw_noise=draw_noise,
        generator=generator,
    )[-1]


def draw_noise(config: ModelConfig, images: Iterable[int], seed: int) -> Tensor:
    """Return the noise of the images with these numbers, (B, L, C p p): each a function of (seed, number)."""
    shape = (num_tokens(config.scales), config.token_width)
    generators = (torch.Generator().manual_seed(derive_seed(seed, NOISE_STREAM, image)) for image in images)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class StepNoise:
    """Standard normal noise for the steps of stochastic solvers: of each image a function of (seed, number)."""

    def __init__(self, images: Iterable[int], seed: int, device: torch.device) -> None:
        seeds = (derive_seed(seed, STEP_STREAM, image) for image in images)
        self.generators = [torch.Generator().manual_seed(number) for number in seeds]
        self.device = device

    def __call__(self, shape: tuple[int, int]) -> Tensor:
        """Return the next noise, (B, N, C p p)."""
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators]).to(self.device)


def make_time_grid(name: str, num_steps: int, shift: float = 1.0) -> Tensor:
    """Return the time grid that a config names: "released", "uniform" or "shifted"."""
    if name == "shifted":
        return shifted_time_grid(num_steps, shift)
    return released_time_grid(num_steps) if name == "released" else uniform_time_grid(num_steps)


def make_time_grids(config: SampleConfig, num_scales: int) -> list[Tensor]:
    """Return the time grid of each scale."""
    last = config.num_steps if config.last_scale_steps is None else config.last_scale_steps
    steps = annealed_steps(config.num_steps, last, num_scales)
    return [make_time_grid(config.time_grid, number, config.shift) for number in steps]
