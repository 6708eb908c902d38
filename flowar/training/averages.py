"""Averages of the weights over the run, in float32; each rank keeps its share. The caller decides when to update.

Two kinds: a constant decay, and the power function of EDM2 (Karras et al., arXiv:2312.02696, section 3). `flowar ema`
can combine an EDM2 average of any length afterwards, from a few that were stored. Read next: train.py.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.run_folder import AVERAGES, checkpoint_step, list_checkpoints, read_progress
from flowar.config.training import EMAConfig
from flowar.models.folders import load_model, save_model_whole
from flowar.training.optim import local_tensors


def average_names(config: EMAConfig) -> list[str]:
    """Return the names of all averages: decay_0.9999, std_0.05; samples are drawn with the first."""
    return [f"decay_{decay:g}" for decay in config.decays] + [f"std_{std:g}" for std in config.stds]


class EMA:
    """All averages of this rank's share of the weights: average += rate (weights - average)."""

    def __init__(self, config: EMAConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.averages = {
            name: {key: tensor.float().clone() for key, tensor in weights.items()} for name in average_names(config)
        }
        self._local = {name: local_tensors(average.values()) for name, average in self.averages.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Move the averages towards the weights after `step` steps, counted from 1."""
        if not weights:
            return
        found = local_tensors(weights.values())
        current = [tensor if tensor.dtype == torch.float32 else tensor.float() for tensor in found]
        for name, average in self._local.items():
            torch._foreach_lerp_(average, current, update_rate(name, step))


def update_rate(name: str, step: int) -> float:
    """Return how far the average called `name` moves towards the weights after step `step`, counted from 1."""
    kind, _, value = name.partition("_")
    if kind == "decay":
        return 1 - float(value)
    beta = float((1 - 1 / step) ** (power_exponent(float(value)) + 1))  # EDM2, equation 2: (1 - 1 / t)^(gamma + 1)
    return 1 - beta


def power_exponent(std: float) -> float:
    """Return gamma of the power function whose averaging profile has this relative std (EDM2, equation 123)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(np.real(roots[np.argmax(np.real(roots))]))


def combine_weights(steps: list[int], stds: list[float], step: int, std: float) -> NDArray[np.float64]:
    """Return the factors with which stored averages add up to the one of relative std `std` after `step` steps.

    Least squares between the profiles (EDM2, appendix C.3).

    Args:
        steps: the step at which each stored average was taken.
        stds: the relative std of each stored average.
        step: the step of the wanted average.
        std: the relative std of the wanted average.
    """
    stored = [(power_exponent(value), at) for value, at in zip(stds, steps, strict=True)]
    products = np.array([[_inner(*one, *other) for other in stored] for one in stored])
    wanted = np.array([_inner(*one, power_exponent(std), step) for one in stored])
    factors: NDArray[np.float64] = np.linalg.lstsq(products, wanted, rcond=None)[0]
    return factors


def _inner(a: float, t: float, b: float, u: float) -> float:
    """Return the integral over [0, min(t, u)] of two profiles (a + 1) s^a / t^(a + 1) and (b + 1) s^b / u^(b + 1)."""
    least = min(t, u)
    return float((a + 1) * (b + 1) / (a + b + 1) * (least / t) ** a * (least / u) ** b * least / (t * u))


def save_average(run_dir: Path, std: float, step: int | None, folder: Path | None) -> None:
    """Write a model folder with a power-function average, combined from the averages that a run kept.

    Args:
        run_dir: of the run.
        std: relative std of the averaging profile.
        step: at which the average ends; None: the last step that was kept.
        folder: to write; None: only check, and print what would be done.

    Raises:
        UserError: if the run kept no averages, or not at this step.
    """
    kept = list_checkpoints(run_dir, AVERAGES)
    if not kept:
        raise UserError(
            f"run_dir={run_dir} kept no averages; train with ema.stds=[0.05,0.1] and ema.keep_every_steps=..."
        )
    last = step or checkpoint_step(kept[-1])
    kept = [checkpoint for checkpoint in kept if checkpoint_step(checkpoint) <= last]
    if not kept or checkpoint_step(kept[-1]) != last:
        raise UserError(f"{run_dir} kept no averages at step={last}; the kept steps are in {run_dir / AVERAGES}")
    progress = {checkpoint: read_progress(checkpoint) for checkpoint in kept}
    stored = [(checkpoint, name) for checkpoint in kept for name in progress[checkpoint].averages]
    updates = [progress[checkpoint].updates for checkpoint, _ in stored]
    stds = [float(name.removeprefix("std_")) for _, name in stored]
    factors = combine_weights(updates, stds, updates[-1], std)
    print(
        f"std {std:g} after step {last:,}, from {len(stored)} averages of {len(kept)} steps and stds "
        f"{sorted(set(stds))}; factors from {factors.min():.3f} to {factors.max():.3f}, together {factors.sum():.4f}"
    )
    if folder is None:
        return
    total: dict[str, Tensor] = {}
    for factor, (checkpoint, name) in zip(factors.tolist(), stored, strict=True):
        model = load_model(checkpoint, name)
        for key, tensor in model.state_dict().items():
            part = tensor.double() * factor
            total[key] = total[key] + part if key in total else part
    save_model_whole(model.config, {key: tensor.to(torch.float32) for key, tensor in total.items()}, folder)
