"""Averaged weights, in float32. Does not know when it is called. Read next: train.py."""

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a model's parameters: average += (1 - decay) (parameter - average)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages a step towards the model's parameters."""
        parameters = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; they are the values themselves, not copies."""
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved averages of the same parameters."""
        for name, average in self.averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the averages."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.averages[name])
