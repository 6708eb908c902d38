"""AdamW, its parameter groups, and the learning rate as a pure function of the step. Read next: train.py."""

import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowar.base.errors import UserError
from flowar.config.training import OptimConfig
from flowar.models.family import Family

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names
EPS = 1e-8  # torch's default
LR_FACTOR = "lr_factor"  # key of a parameter group: its learning rate divided by that of fresh parts
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grads_with_norm_


def freeze_parts(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the patterns: no gradient, no optimizer state.

    Raises:
        UserError: if a pattern matches no parameter, or nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            whole = f"{pattern.rstrip('.*')}.*"
            near = [whole] if fnmatch.filter(parameters, whole) else list(parameters)[:3]
            raise UserError(
                f"optim.frozen={pattern} matches no parameter; patterns work as for file names, * matches anything; "
                f"try, for example, {', '.join(near)}"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"optim.frozen={list(patterns)} leaves nothing to train; freeze less")


def make_optimizer(
    model: nn.Module, family: Family[Any, Any], config: OptimConfig, old: Collection[str] = ()
) -> torch.optim.AdamW:
    """Return torch's AdamW, with weight decay on the parameters that the model's family chooses.

    Its learning rate is set before each step. Frozen parameters are left out.

    Args:
        model: to be trained.
        family: of the model.
        config: of the optimizer.
        old: names of the parameters from init.model, which learn at `init_lr_factor` times the rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    kinds = [(decay, factor) for factor in (1.0, config.init_lr_factor) for decay in (config.weight_decay, 0.0)]
    for kind in kinds:
        groups[kind] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if family.is_decayed(name, parameter, config) else 0.0
            groups[decay, config.init_lr_factor if name in old else 1.0].append(parameter)
    listed = [
        {"params": parameters, "weight_decay": decay, LR_FACTOR: factor}
        for (decay, factor), parameters in groups.items()
        if parameters
    ]
    return torch.optim.AdamW(listed, lr=0.0, betas=config.betas, fused=True)


def learning_rate(step: int, *, num_steps: int, warmup_steps: float, lr: float, min_lr: float) -> float:
    """Return the learning rate of `step`: linear from 0 over the warm-up, then a cosine to `min_lr` at `num_steps`."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1.0, num_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, sharing its memory; operations on these skip DTensor's dispatch."""
    with torch.no_grad():
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]


def clip_values(gradients: list[Tensor], largest: float) -> None:
    """Clip each value of the gradients to at most `largest` on either side, in place."""
    torch._foreach_clamp_min_(gradients, -largest)
    torch._foreach_clamp_max_(gradients, largest)


class _Group(NamedTuple):
    """Parameters with the same weight decay and learning rate."""

    places: list[int]  # among all parameters
    weights: list[Tensor]  # this rank's part of each, and of its moments
    moments: tuple[list[Tensor], list[Tensor]]
    weight_decay: float
    lr_factor: float


class LocalAdamW:
    """torch's fused AdamW on this rank's part of every parameter; gives the same bits as `make_optimizer`'s.

    The overhead of torch.optim per parameter, and of DTensor per operation, takes longer than the arithmetic of a
    shard. So the lists are made once, and all parameters share one step count.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], like: torch.optim.AdamW) -> None:
        """Start with the groups of torch's optimizer, and moments of zero, laid out like the parameters.

        Frozen parameters are left out.
        """
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.parameters = parameters
        self.moments = {
            name: {key: torch.zeros_like(p, requires_grad=False) for key in ADAM_MOMENTS}
            for name, p in parameters.items()
        }
        self.steps = torch.zeros((), device=next(iter(parameters.values())).device)
        self.betas: tuple[float, float] = like.defaults["betas"]
        names, place_of = list(parameters), {id(p): place for place, p in enumerate(parameters.values())}
        self._groups = []
        for group in like.param_groups:
            places = [place_of[id(p)] for p in group["params"]]
            first, second = (local_tensors(self.moments[names[place]][key] for place in places) for key in ADAM_MOMENTS)
            self._groups.append(
                _Group(
                    places,
                    local_tensors(group["params"]),
                    (first, second),
                    group["weight_decay"],
                    group.get(LR_FACTOR, 1.0),
                )
            )
        self._gradients: list[Tensor] = []

    def take_gradients(self) -> Tensor:
        """Keep the parameters' gradients for `clip` and `step`; return the norm of this rank's part."""
        found = [grad for p in self.parameters.values() if (grad := p.grad) is not None]
        if len(found) < len(self.parameters):
            names = [name for name, p in self.parameters.items() if p.grad is None]
            raise ValueError(f"{len(names)} parameters got no gradient: {', '.join(names[:3])}")
        self._gradients = local_tensors(found)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients)))
        return norm

    @torch.no_grad()
    def clip(self, norm: Tensor, config: OptimConfig) -> None:
        """Scale the gradients, whose norm is `norm` on all ranks together, and clip their values; on the device."""
        if config.max_grad_norm is not None:
            factor = torch.clamp(config.max_grad_norm / (norm + CLIP_EPS), max=1.0)
            torch._foreach_mul_(self._gradients, factor)
        if config.max_grad_value is not None:
            clip_values(self._gradients, config.max_grad_value)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the weights along the gradients that were taken, and drop the gradients."""
        self.steps += 1
        for group in self._groups:
            torch._fused_adamw_(
                group.weights,
                [self._gradients[place] for place in group.places],
                *group.moments,
                [],
                [self.steps] * len(group.places),
                lr=lr * group.lr_factor,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group.weight_decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients."""
        self._gradients = []
        for parameter in self.parameters.values():
            parameter.grad = None


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give all parameter groups a learning rate, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group[LR_FACTOR]
