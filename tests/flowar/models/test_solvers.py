import pytest
import torch

from flowar.models.build import released_time_grid
from flowar.models.solvers import (
    SOLVERS,
    evaluation_times,
    shifted_time_grid,
    solve,
    uniform_time_grid,
)

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "adams-bashforth": 2}
EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "adams-bashforth": 1}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_exact_on_a_constant_field(solver):
    noise, field = torch.randn(2, 2, 5, 3).unbind(0)
    for grid in (uniform_time_grid(1), uniform_time_grid(7), released_time_grid(25)):
        torch.testing.assert_close(solve(solver, lambda state, time: field, noise, grid), noise - field)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_converge_at_their_order(solver):
    """d state / d time = 3 time^2 state from 1 to 0, on uneven grids: the exact answer is exp(-1)."""
    start = torch.ones(1, dtype=torch.float64)
    exact = torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    errors = [
        abs(solve(solver, lambda state, time: 3 * time**2 * state, start, shifted_time_grid(n, 2.0)) - exact).item()
        for n in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[solver], rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
def test_velocities_are_asked_for_as_often_and_when_it_says(solver):
    asked = []

    def velocity(state, time):
        asked.append(time)
        return state

    solve(solver, velocity, torch.ones(1), uniform_time_grid(6))
    assert len(asked) == 6 * EVALUATIONS[solver]
    assert sorted(asked) == pytest.approx(sorted(evaluation_times(solver, uniform_time_grid(6))))


def test_the_stochastic_solver_keeps_the_distribution_of_the_data():
    """Data are normal with mean 2 and std 0.5, for which the velocity is known."""
    mean, std = 2.0, 0.5
    generator = torch.Generator().manual_seed(0)

    def velocity(state, time):  # E[noise - data | state]
        variance = (1 - time) ** 2 * std**2 + time**2
        centred = state - (1 - time) * mean
        return time * centred / variance - (mean + (1 - time) * std**2 * centred / variance)

    noise = torch.randn(200_000, generator=generator)
    result = solve(
        "euler-maruyama", velocity, noise, uniform_time_grid(200),
        lambda: torch.randn(noise.shape, generator=generator),
    )  # fmt: skip
    assert result.mean().item() == pytest.approx(mean, abs=0.01) and result.std().item() == pytest.approx(std, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([noise, result]))[0, 1]) < 0.9  # the flow alone would give 1
    with pytest.raises(ValueError, match="stochastic"):
        solve("euler-maruyama", velocity, noise, uniform_time_grid(2))


def test_released_time_grids():
    assert torch.equal(released_time_grid(50), uniform_time_grid(50))
    grid = released_time_grid(25)
    assert len(grid) == 25  # 24 steps
    assert grid.dtype == torch.float64
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    assert grid[11].item() == pytest.approx(0.3) and grid[12].item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="num_steps=1"):
        released_time_grid(1)


def test_shifted_time_grids():
    torch.testing.assert_close(shifted_time_grid(8, 1.0), uniform_time_grid(8))
    grid = shifted_time_grid(10, 3.0)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and grid[5] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="shift=0"):
        shifted_time_grid(10, 0)
