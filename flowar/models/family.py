"""The surface of a family of models: all that trainer, sampler and tools ask of a kind of model.

A family is a folder flowar/models/NAME whose file family.py has these functions. Outside of that folder only build.py
names it. Read next: flowar/family.py, build.py.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flowar.config.drawing import DrawConfig
from flowar.config.models import ModelConfig
from flowar.config.training import OptimConfig


class Model(nn.Module):
    """What a family creates: a module that knows its shape."""

    config: ModelConfig


C = TypeVar("C", bound=ModelConfig)
M = TypeVar("M", bound=Model)


class Family(Protocol[C, M]):
    """What a family's module answers. Shapes: B batch, C latent channels, h and w sides of the latents."""

    def create(self, config: C) -> M:
        """Return a model with fresh weights from torch's global generator, in evaluation mode, with `.config`."""

    def blocks(self, model: M) -> list[nn.Module]:
        """Return the blocks that are recomputed, compiled, sharded and watched one by one."""

    def part_of(self, name: str) -> str:
        """Return to which part of the model a parameter belongs, for the table of `flowar info`."""

    def follows_from(self, name: str) -> Literal["classes", "positions", "latents"] | None:
        """Return what of the data a parameter's shape follows from: None: nothing, it is of the model's size alone.

        Of "classes" is the label table, (num_classes + 1, ...), the last row "no class"; of "positions" are tables of
        learned positions, (tokens of all `position_grids`, ...); of "latents" are the layers they enter and leave.
        """

    def position_grids(self, config: C) -> tuple[int, ...]:
        """Return the sides of the square grids of tokens that a table of learned positions holds, one after another."""

    def token_rows(self, config: C) -> list[tuple[str, int, str]]:
        """Return what one image's tokens are: what, how many, and what they attend to; for `flowar info`."""

    def is_decayed(self, name: str, parameter: nn.Parameter, optim: OptimConfig) -> bool:
        """Return whether weight decay acts on a parameter."""

    def loss_terms(self, config: C) -> dict[str, float]:
        """Return the terms of the loss and their weights, in the order of `losses`; logged as loss/NAME."""

    def draw(self, config: C, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one sample's random numbers for training, by name; on the generator's device."""

    def losses(
        self, forward: Callable[..., Any], config: C, latents: Tensor, labels: Tensor, draws: dict[str, Tensor]
    ) -> Tensor:
        """Return the terms of the loss, (terms,) float32, means over the batch.

        Args:
            forward: the model, or what an engine has wrapped around it.
            config: of the model.
            latents: (B x n, C, h, w), about unit std; n is config.images_per_sample, a sample's images side by side.
            labels: (B,) int64, num_classes where the label was dropped.
            draws: what `draw` gave for each sample, stacked.
        """

    def noise_shape(self, config: C) -> tuple[int, ...]:
        """Return the shape of the noise that one image is drawn from."""

    def generate(
        self,
        model: M,
        labels: Tensor,
        noise: Tensor,
        how: DrawConfig,
        step_noise: Callable[[tuple[int, ...]], Tensor],
    ) -> list[Tensor]:
        """Return the latents stage by stage, (B, C, side, side) each; the last are the images'.

        Args:
            model: in evaluation mode.
            labels: (B,) int64, on the model's device; num_classes draws from all classes.
            noise: (B, *noise_shape), standard normal, on the model's device.
            how: solver, time grid, guidance.
            step_noise: shape -> (B, *shape) standard normal; for stochastic solvers.
        """

    def sampling_flops(self, config: C, how: DrawConfig) -> int:
        """Return the FLOPs of generating the latents of one image, without the VAE."""

    def training_loss(
        self, model: M, latents: Tensor, labels: Tensor, time: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return the training loss, a float32 scalar; part of the public API. What is None is drawn.

        Raises:
            ValueError: if a shape does not fit the model.
        """

    def sample_latents(self, model: M, labels: Tensor, *args: Any, **settings: Any) -> Tensor:
        """Return generated latents (B, C, h, w); part of the public API, with the settings of this family."""

    def released_time_grid(self, num_steps: int) -> Tensor:
        """Return the authors' time grid from 1 to 0, float64."""

    def is_released(self, state_dict: dict[str, Any]) -> bool:
        """Return whether a state dict or checkpoint has names that only the authors' code gives."""

    def convert(self, state_dict: dict[str, Any], ar_heads: int | None) -> tuple[C, dict[str, Tensor]]:
        """Return shape and weights of the authors' state dict.

        Raises:
            UserError: if keys are missing or unknown (named), or the shape can't be told.
        """


def weigh(losses: Tensor, weights: Tensor | Iterable[float]) -> Tensor:
    """Return the training loss, a scalar: the sum of the loss's terms (terms,), each times its weight.

    Weights that aren't a tensor are copied to the device, which the host waits for.
    """
    factors = weights if isinstance(weights, Tensor) else losses.new_tensor(tuple(weights))
    return (losses * factors).sum()


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise a ValueError that names the tensor, its shape and the expected one."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this model needs {expected}")
