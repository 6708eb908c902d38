"""What the trainer needs from an engine, and what the engines share. Read next: torch_engine.py, zero_engine.py.

All engines keep float32 weights under the names of the plain model, and write checkpoints in one form: a dictionary
from names to tensors in the plain model's shapes, each whole, on one rank (shares.py). So a run can resume with another
engine, or with another number of processes. Adds no hyper-parameters.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.config.training import OptimConfig, ParallelConfig
from flowar.models.family import Model


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to know about a run."""

    parallel: ParallelConfig
    optim: OptimConfig
    precision: str
    micro_batch_size: int
    num_parts: int  # micro batches of one process in a step
    old: frozenset[str] = frozenset()  # parameters from init.model, which have their own learning rate


class GradientEngine(Protocol):
    """What `accumulate` needs to compute gradients."""

    world: World

    @property
    def forward(self) -> Callable[..., Any]:
        """The model, or its wrapper."""

    def part(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one part's forward and backward pass."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part of the batch."""


class Engine(GradientEngine, Protocol):
    """A model in training on one or many processes. All ranks call the same methods at the same steps."""

    model: Model
    parameters: dict[str, nn.Parameter]

    def norm_share(self) -> Tensor:
        """Return this rank's share of the gradients' squared norm, float64; the shares of all ranks add up to it."""

    def clip(self, norm: Tensor) -> None:
        """Clip the gradients as the settings say; `norm`, a scalar on the device, is their norm over all ranks."""

    def step(self, lr: float, grad_norm: float) -> None:
        """Move the weights along the clipped gradients.

        Args:
            lr: learning rate.
            grad_norm: before clipping, as read from the device.
        """

    def skip(self) -> None:
        """Drop the gradients and leave the weights as they are."""

    def save_own_files(self, folder: Path) -> None:
        """Write the extra files that the engine's own tools need."""

    def set_step(self, step: int) -> None:
        """Tell the optimizer how many steps it has done."""

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights, for averaging; each weight is on one rank only."""

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights in the form of checkpoints."""

    def state(self) -> dict[str, Tensor]:
        """Return this rank's share of weights and optimizer in the form of checkpoints; the values may be in use."""

    def load(self, folder: Path) -> None:
        """Load weights and optimizer from a checkpoint."""

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that are laid out like `local_weights`, in the form of checkpoints."""

    def load_local(self, local: dict[str, Tensor], key: Callable[[str], str], folder: Path) -> None:
        """Fill tensors that are laid out like `local_weights` from a checkpoint, which has them under `key(name)`."""

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every name and whole tensor, on all ranks, from tensors that are laid out like `local_weights`."""


def engine_name(name: str, num_ranks: int) -> str:
    """Return which engine parallel.engine=`name` means: "auto" is single for one process and ddp for several.

    Raises:
        UserError: if the engine works with one process only.
    """
    if name == "auto":
        return "single" if num_ranks == 1 else "ddp"
    if name == "single" and num_ranks > 1:
        raise UserError(f"parallel.engine=single, but {num_ranks} processes were started; use ddp, fsdp or deepspeed")
    return name


def prepare_blocks(blocks: Iterable[nn.Module], parallel: ParallelConfig) -> None:
    """Set a model's blocks up for recomputation and compilation."""
    every = parallel.checkpoint_every_blocks
    for index, block in enumerate(blocks):
        if parallel.compile:
            torch._dynamo.config.optimize_ddp = False  # it splits blocks at DDP's buckets; whole blocks overlap too
            block.forward = torch.compile(block.forward)  # inside the checkpoint, or nothing is compiled
        if every and index % every == 0:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
