"""Averages of the weights over the run, in float32, each rank its share. Does not know when it is called.

Two kinds: a constant decay, and the power function of EDM2 (Karras et al., arXiv:2312.02696, section 3), whose averages
of any length can be put together afterwards from a few that were stored: `flowar ema`. Read next: train.py.
"""

import numpy as np
import torch
from torch import Tensor

from flowar.config import EMAConfig


def average_names(config: EMAConfig) -> list[str]:
    """Return the names of all averages: decay_0.9999, std_0.05; the first is the one that samples are drawn with."""
    return [f"decay_{decay:g}" for decay in config.decays] + [f"std_{std:g}" for std in config.stds]


class EMA:
    """All averages of this rank's share of the weights: average += rate (weights - average)."""

    def __init__(self, config: EMAConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.averages = {
            name: {key: tensor.float().clone() for key, tensor in weights.items()} for name in average_names(config)
        }

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Move the averages towards the weights after `step` steps, counted from 1."""
        if not weights:
            return
        current = [tensor.float() for tensor in weights.values()]
        for name, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), current, update_rate(name, step))


def update_rate(name: str, step: int) -> float:
    """Return how far the average called `name` moves towards the weights after step `step`, counted from 1."""
    kind, _, value = name.partition("_")
    if kind == "decay":
        return 1 - float(value)
    return 1 - (1 - 1 / step) ** (power_exponent(float(value)) + 1)  # EDM2, equation 2: beta = (1 - 1 / t)^(gamma + 1)


def power_exponent(std: float) -> float:
    """Return gamma of the power function whose averaging profile has this relative std (EDM2, equation 123)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(np.real(roots[np.argmax(np.real(roots))]))


def combine_weights(steps: list[int], stds: list[float], step: int, std: float) -> np.ndarray:
    """Return the factors with which stored averages add up to the one of relative std `std` after `step` steps.

    Least squares between the profiles (EDM2, appendix C.3).

    Args:
        steps: at which each of the stored averages was taken.
        stds: relative std of each.
        step: of the wanted average.
        std: its relative std.
    """
    stored = [(power_exponent(value), at) for value, at in zip(stds, steps, strict=True)]
    products = np.array([[_inner(*one, *other) for other in stored] for one in stored])
    wanted = np.array([_inner(*one, power_exponent(std), step) for one in stored])
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


def _inner(a: float, t: float, b: float, u: float) -> float:
    """Return the integral over [0, min(t, u)] of two profiles (a + 1) s^a / t^(a + 1) and (b + 1) s^b / u^(b + 1)."""
    least = min(t, u)
    return (a + 1) * (b + 1) / (a + b + 1) * (least / t) ** a * (least / u) ** b * least / (t * u)
