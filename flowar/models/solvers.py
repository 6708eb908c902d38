"""From noise to data: time grids, and solvers of d state / d time = velocity. Takes any velocity function.

`time` is 0 at the data and 1 at the noise, as everywhere. Read next: flowar/generate.py.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]

TIME_SLACK = 1e-6  # grid points may coincide with the ends of an interval in time

RELEASED_UNIFORM_STEPS = 50


def two_part_time_grid(num_steps: int) -> Tensor:
    """Return FlowAR's released times from 1 to 0, float64: uniform for 50 steps, denser near the data otherwise.

    An odd number of steps gives one step less, as released: 25 gives 24.
    """
    if num_steps < 2:
        raise ValueError(f"the released time grid needs at least 2 steps, got num_steps={num_steps}")
    if num_steps == RELEASED_UNIFORM_STEPS:
        return uniform_time_grid(num_steps)
    half = num_steps // 2
    coarse = torch.linspace(1, 0.3, half, dtype=torch.float64)
    fine = torch.linspace(0.25, 0, half + 1, dtype=torch.float64)
    return torch.cat([coarse, fine])


def uniform_time_grid(num_steps: int) -> Tensor:
    """Return num_steps + 1 evenly spaced times from 1 to 0, float64."""
    if num_steps < 1:
        raise ValueError(f"a time grid needs at least 1 step, got num_steps={num_steps}")
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def shifted_time_grid(num_steps: int, shift: float) -> Tensor:
    """Return the uniform grid with each time t moved to shift t / (1 + (shift - 1) t), float64.

    A shift above 1 spends more steps near the noise (Esser et al., 2024, arXiv:2403.03206), below 1 near the data.
    """
    if shift <= 0:
        raise ValueError(f"shift={shift} must be above 0")
    grid = uniform_time_grid(num_steps)
    return shift * grid / (1 + (shift - 1) * grid)


def make_time_grid(
    name: str, num_steps: int, shift: float = 1.0, released: Callable[[int], Tensor] = two_part_time_grid
) -> Tensor:
    """Return the time grid that a config names: "released" (the family's own), "uniform" or "shifted"."""
    if name == "shifted":
        return shifted_time_grid(num_steps, shift)
    return released(num_steps) if name == "released" else uniform_time_grid(num_steps)


def solve_euler(velocity: Velocity, noise: Tensor, time_grid: Tensor) -> Tensor:
    """Return the state that the flow carries `noise` to, by one Euler step between neighbouring times of the grid.

    Args:
        velocity: (state, time) -> d state / d time, same shape as the state.
        noise: the state at time_grid[0].
        time_grid: (steps + 1,) decreasing from 1 to 0; float64, so that steps add up exactly.
    """
    state = noise
    for start, end in pairwise(time_grid.tolist()):
        state = torch.add(state, velocity(state, start), alpha=end - start)
    return state


def solve_heun(velocity: Velocity, noise: Tensor, time_grid: Tensor) -> Tensor:
    """As `solve_euler`, by Heun's method: second order, two evaluations a step."""
    state = noise
    for start, end in pairwise(time_grid.tolist()):
        slope = velocity(state, start)
        predicted = state + (end - start) * slope
        state = state + (end - start) * (slope + velocity(predicted, end)) / 2
    return state


def solve_midpoint(velocity: Velocity, noise: Tensor, time_grid: Tensor) -> Tensor:
    """As `solve_euler`, by the midpoint method: second order, two evaluations a step."""
    state = noise
    for start, end in pairwise(time_grid.tolist()):
        middle = state + (end - start) / 2 * velocity(state, start)
        state = state + (end - start) * velocity(middle, (start + end) / 2)
    return state


def solve_adams_bashforth(velocity: Velocity, noise: Tensor, time_grid: Tensor) -> Tensor:
    """As `solve_euler`, by the two-step Adams-Bashforth method: second order, one evaluation a step, uneven steps."""
    state, before, before_step = noise, None, 0.0
    for start, end in pairwise(time_grid.tolist()):
        step = end - start
        slope = velocity(state, start)
        ratio = step / before_step / 2 if before is not None else 0.0
        state = state + step * (slope if before is None else (1 + ratio) * slope - ratio * before)
        before, before_step = slope, step
    return state


def solve_euler_maruyama(
    velocity: Velocity,
    noise: Tensor,
    time_grid: Tensor,
    draw: Callable[[], Tensor],
    *,
    diffusion: float = 1.0,
    last_has_score: bool = False,
) -> Tensor:
    """As `solve_euler`, but of the stochastic equation with the same marginals; the last step is deterministic.

    d state = (velocity - w score / 2) d time + sqrt(w) dW, with the score -(state + (1 - time) velocity) / time that a
    velocity implies on the straight path (SiT, arXiv:2401.08740, diffusion coefficient w = diffusion x time).

    Args:
        velocity, noise, time_grid: as of `solve_euler`.
        draw: -> standard normal noise of the state's shape; called once a step, but not for the last one.
        diffusion: w over time.
        last_has_score: whether the last step is the mean of the stochastic one (SiT: "Mean"), or one of Euler's method.
    """
    state = noise
    times: list[float] = time_grid.tolist()
    steps = list(pairwise(times))
    for index, (start, end) in enumerate(steps):
        slope = velocity(state, start)
        is_last = index == len(steps) - 1
        if is_last and not last_has_score:
            return state + (end - start) * slope
        score_times_time = -(state + (1 - start) * slope)
        state = state + (end - start) * (slope - score_times_time * (diffusion / 2))
        if not is_last:
            state = state + math.sqrt(diffusion * start * (start - end)) * draw()
    return state


def evaluation_times(solver: str, time_grid: Tensor) -> list[float]:
    """Return the times at which a solver asks for the velocity."""
    times = time_grid.tolist()
    if solver == "heun":
        return [*times[:-1], *times[1:]]
    if solver == "midpoint":
        return [*times[:-1], *((start + end) / 2 for start, end in pairwise(times))]
    return times[:-1]


def solve(
    solver: str, velocity: Velocity, noise: Tensor, time_grid: Tensor, draw: Callable[[], Tensor] | None = None
) -> Tensor:
    """Return what the solver of this name gives; euler-maruyama needs `draw`."""
    if solver == "euler-maruyama":
        if draw is None:
            raise ValueError("solver=euler-maruyama is stochastic: give draw_noise")
        return solve_euler_maruyama(velocity, noise, time_grid, draw)
    return SOLVERS[solver](velocity, noise, time_grid)


SOLVERS = {
    "euler": solve_euler,
    "heun": solve_heun,
    "midpoint": solve_midpoint,
    "adams-bashforth": solve_adams_bashforth,
}
