import numpy as np
import pytest
import torch

from flowar.base.errors import UserError
from flowar.config.training import EMAConfig
from flowar.training.averages import EMA, combine_weights, power_exponent


def test_averages_with_a_constant_decay_follow_the_closed_form():
    start = torch.randn(3)
    ema = EMA(EMAConfig(decays=(0.9, 0.5)), {"w": start})
    for step in range(1, 6):
        ema.update({"w": start + 1}, step)
    torch.testing.assert_close(ema.averages["decay_0.9"]["w"], start + 1 - 0.9**5)
    torch.testing.assert_close(ema.averages["decay_0.5"]["w"], start + 1 - 0.5**5)


def test_averages_of_low_precision_weights_are_float32_copies():
    weights = {"w": torch.ones(3, dtype=torch.bfloat16)}
    ema = EMA(EMAConfig(decays=(0.9999,)), weights)
    weights["w"].add_(1)
    ema.update(weights, 1)
    average = ema.averages["decay_0.9999"]["w"]
    assert average.dtype == torch.float32
    assert (average > 1).all() and (average < 1.001).all()  # a step that bfloat16 would round away


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_function_averages_have_the_requested_relative_std(std):
    """The weight of each step in the average, over the finished share of the run."""
    steps = 4000
    ema = EMA(EMAConfig(decays=(), stds=(std,)), {"w": torch.zeros(steps, dtype=torch.float64)})
    for step in range(1, steps + 1):
        weights = torch.zeros(steps)
        weights[step - 1] = 1
        ema.update({"w": weights}, step)
    profile = ema.averages[f"std_{std:g}"]["w"].double().numpy()
    times = np.arange(1, steps + 1) / steps
    assert profile.sum() == pytest.approx(1, abs=1e-4)
    mean = (profile * times).sum()
    assert np.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(std, rel=0.02)
    gamma = power_exponent(std)
    assert np.abs(profile - (gamma + 1) * times**gamma / steps)[10:].max() < 0.02 * profile.max()


def test_stored_averages_add_up_to_one_of_another_length():
    """For weights on a random walk, the combination is near the average that would have been tracked."""
    steps, wanted = 3000, 0.08
    random = np.random.default_rng(0)
    path = torch.from_numpy(np.cumsum(random.standard_normal((steps, 50)), axis=0)).float()
    ema = EMA(EMAConfig(decays=(), stds=(0.05, 0.1, wanted)), {"w": torch.zeros(50)})
    stored, steps_of, stds = [], [], []
    for step in range(1, steps + 1):
        ema.update({"w": path[step - 1]}, step)
        if step % 300 == 0:
            for std in (0.05, 0.1):
                stored.append(ema.averages[f"std_{std:g}"]["w"].clone())
                steps_of.append(step)
                stds.append(std)
    factors = combine_weights(steps_of, stds, steps, wanted)
    found = sum(factor * one for factor, one in zip(factors, stored, strict=True))
    truth = ema.averages[f"std_{wanted:g}"]["w"]
    assert factors.sum() == pytest.approx(1, abs=0.01)
    nearest = min((ema.averages[f"std_{std:g}"]["w"] - truth).norm() for std in (0.05, 0.1))
    assert (found - truth).norm() < 0.05 * nearest


def test_averages_that_make_no_sense_are_refused():
    for changes, message in (
        ({"decays": ()}, "ema.decays and ema.stds are both empty"),
        ({"decays": (1.0,)}, r"ema.decays=\[1.0\] must lie in \[0, 1\)"),
        ({"stds": (0.4,)}, r"ema.stds=\[0.4\] must lie in \(0, 0.28\)"),
    ):
        with pytest.raises(UserError, match=message):
            EMAConfig(**changes)
