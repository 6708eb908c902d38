"""AdamW, its parameter groups, and the learning rate as a pure function of the step. Read next: train.py."""

import math
from typing import Any

import torch
from torch import nn

from flowar.config.training import OptimConfig
from flowar.models.family import Family


def make_optimizer(model: nn.Module, family: Family[Any, Any], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW, with weight decay on the parameters that the model's family says."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if family.is_decayed(name, parameter, config) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, *, num_steps: int, warmup_steps: float, lr: float, min_lr: float) -> float:
    """Return the learning rate of `step`: linear from 0 over the warm-up, then a cosine to `min_lr` at `num_steps`."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1.0, num_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give all parameter groups the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
