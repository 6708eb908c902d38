"""Generation with ARFlow (arXiv:2501.16085): one image, again and again less noisy, with a memory of all it was before.

Each evaluation of the network reads the memory and adds to it. Knows no files and no metrics. Read next: ../solvers.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from flowar.models.arflow.model import ARFlow, State
from flowar.models.family import check_shape
from flowar.models.solvers import TIME_SLACK, evaluation_times, solve, solve_euler_maruyama

RELEASED_LAST_STEP = 0.04  # in time, without noise
RELEASED_DIFFUSION = 2.0  # squared, over time: released, d state = ... + sqrt(2 time) dW


def released_time_grid(num_steps: int) -> Tensor:
    """Return the released sampler's num_steps + 1 times from 1 to 0, float64: even down to 0.04, then one step to 0.

    The network is evaluated num_steps times, at all times but the last; released: 250.

    Raises:
        ValueError: if there are fewer than 2 steps.
    """
    if num_steps < 2:
        raise ValueError(f"the released time grid needs at least 2 steps, got num_steps={num_steps}")
    return torch.cat([torch.linspace(1, RELEASED_LAST_STEP, num_steps, dtype=torch.float64), torch.zeros(1).double()])


def guidance_acts(times: Sequence[float], interval: tuple[float, float]) -> bool:
    """Return whether one of the times lies in an interval, its ends included."""
    low, high = interval
    return any(low - TIME_SLACK <= time <= high + TIME_SLACK for time in times)


class GuidedVelocity:
    """The velocity (B, C, h, w) at (state of the solver, time), with the memory of all earlier evaluations.

    Classifier-free guidance as released: both halves, with and without the class, see the same image, and each has its
    own memory. Only the first `guided_channels` latent channels are guided; the others are those with the class.
    """

    def __init__(
        self,
        model: ARFlow,
        labels: Tensor,
        guidance: float,
        interval: tuple[float, float],
        guided_channels: int | None,
        on_stage: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """`guidance` 1 is off; outside of `interval` in time both halves are evaluated, and nothing is guided."""
        self.model, self.guidance, self.interval, self.guided_channels = model, guidance, interval, guided_channels
        self.is_guided, self.labels = guidance > 1, labels
        if self.is_guided:
            self.labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
        self.memory: State | None = None
        self.on_stage, self.stages = on_stage, 0

    def __call__(self, noisy: Tensor, time: float) -> Tensor:
        if self.on_stage is not None:
            self.on_stage(self.stages, noisy)
            self.stages += 1
        both = torch.cat([noisy, noisy]) if self.is_guided else noisy
        times = noisy.new_full((len(both), 1), time)
        output, self.memory = self.model(both[:, None], times, self.labels, self.memory)
        velocity: Tensor = output[:, 0]
        if not self.is_guided:
            return velocity
        with_class, without_class = velocity.chunk(2)
        if not guidance_acts([time], self.interval):
            return with_class
        channels = slice(0, self.guided_channels)
        guided = torch.lerp(without_class[:, channels], with_class[:, channels], self.guidance)
        return torch.cat([guided, with_class[:, guided.shape[1] :]], dim=1)


@torch.no_grad()
def sample_latents(
    model: ARFlow,
    labels: Tensor,
    *,
    time_grid: Tensor,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    solver: str = "euler-maruyama",
    noise: Tensor | None = None,
    draw_noise: Callable[[tuple[int, ...]], Tensor] | None = None,
    generator: torch.Generator | None = None,
    on_stage: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return generated latents (B, C, h, w), about unit std: the VAE's `decode` divides by the multiplier.

    ARFlow, sampler as released with solver="euler-maruyama": d state = (velocity - time score) d time +
    sqrt(2 time) dW from 1 to 0, whose last step keeps the score and drops the noise. The memory grows by one image with
    each evaluation of the network, and costs the same each time. The other solvers of solvers.py run without noise,
    which is not as released; those of second order with two evaluations a step put both into the memory.

    Args:
        model: an ARFlow in evaluation mode.
        labels: (B,) int64 classes, on the model's device; num_classes draws from all classes.
        time_grid: (steps + 1,) from 1 to 0, for example `released_time_grid(250, family="arflow")`.
        guidance: classifier-free guidance; 1 is off, and costs nothing.
        guidance_interval: (low, high) in time; outside nothing is guided, at the same cost.
        guided_channels: the first latent channels, which are guided; None: as the model's config says, released 3.
        solver: euler, heun, midpoint, adams-bashforth or euler-maruyama.
        noise: (B, C, h, w), standard normal; drawn with `generator` if None.
        draw_noise: (C, h, w) -> (B, C, h, w) standard normal, once a stochastic step; drawn with `generator` if None.
        generator: of the noise; torch's global one if None.
        on_stage: called before each evaluation of the network with its number and its input, (B, C, h, w).

    Raises:
        ValueError: if guidance is below 1, or labels or noise have another shape.
    """
    if guidance < 1:
        raise ValueError(f"guidance={guidance} is below 1; use 1 (no guidance) or more")
    config = model.config
    draw = draw_noise or partial(_draw, len(labels), labels.device, generator)
    if noise is None:
        noise = _draw(len(labels), labels.device, generator, config.latent_shape)
    check_shape("noise", noise, (len(labels), *config.latent_shape))
    channels = config.guided_channels if guided_channels is None else guided_channels
    acts = guidance_acts(evaluation_times(solver, time_grid), guidance_interval)
    velocity = GuidedVelocity(model, labels, guidance if acts else 1.0, guidance_interval, channels, on_stage)
    if solver == "euler-maruyama":
        step_noise = partial(draw, config.latent_shape)
        return solve_euler_maruyama(
            velocity, noise, time_grid, step_noise, diffusion=RELEASED_DIFFUSION, last_has_score=True
        )
    return solve(solver, velocity, noise, time_grid)


def _draw(batch_size: int, device: torch.device, generator: torch.Generator | None, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise (B, *shape) on a device, drawn on the generator's."""
    drawn_on = generator.device if generator else device
    return torch.randn(batch_size, *shape, generator=generator, device=drawn_on).to(device)
