"""One process, DDP, or FSDP2, and torch's AdamW. Read next: checkpoint.py, train.py."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.base.run_folder import optimizer_key, weight_key
from flowar.models.build import family_of
from flowar.models.family import Model
from flowar.models.folders import load_state
from flowar.training.engine import OPTIMIZER_STATES, EngineSettings, engine_name, prepare_blocks, share_out
from flowar.training.optim import make_optimizer, set_learning_rate

# FSDP2 warns that in-place operations on the model's output would be wrong: there is none.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


class TorchEngine:
    """One process, DDP, or FSDP2 (with `parallel.replicas` > 1: HSDP), and torch's AdamW."""

    def __init__(self, settings: EngineSettings, model: Model, world: World) -> None:
        self.name = engine_name(settings.parallel.engine, world.size)
        self.max_grad_norm = settings.optim.max_grad_norm
        self.world = world
        self.model = model.to(world.device)
        self.forward: nn.Module = self.model
        family = family_of(self.model.config)
        blocks = family.blocks(self.model)
        prepare_blocks(blocks, settings.parallel)
        if self.name == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                self.model, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        elif self.name == "fsdp":
            shard_model(self.model, blocks, make_mesh(world.device.type, world.size, settings.parallel.replicas))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, family, settings.optim)
        for parameter in self.parameters.values():  # now, so that a checkpoint has where to go
            states = {name: torch.zeros_like(parameter) for name in OPTIMIZER_STATES}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=world.device), **states}

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """Return the context of one part's forward and backward pass.

        DDP averages the gradients of the last part over the ranks; FSDP2 those of each, or all would have all of them.
        """
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self.forward, DistributedDataParallel) and not is_last:
            context = self.forward.no_sync()
        with context:
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part of the batch."""
        loss.backward()

    def grad_norm(self) -> float:
        """Return the norm of all gradients of all ranks, the same on every rank."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm.item()

    def step(self, lr: float) -> None:
        """Clip the gradients, whose `grad_norm` was taken, and move the weights."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, self._norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop the gradients and leave the weights as they are."""
        self.optimizer.zero_grad(set_to_none=True)

    def save_own_files(self, folder: Path) -> None:
        """Write what else the engine's own tools need; nothing."""

    def set_step(self, step: int) -> None:
        """Tell the optimizer how many steps it has behind it."""
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights, what an average of them follows: each is on one rank only.

        FSDP2: its DTensors. Else all ranks have all weights, and each follows some of them.
        """
        if self.name == "fsdp":
            return {name: p.detach() for name, p in self.parameters.items()}
        return {name: p.detach() for name, p in self.parameters.items() if self._owners[name] == self.world.rank}

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights in the form of checkpoints."""
        return {weight_key(name): tensor for name, tensor in self.local_weights().items()}

    def state(self) -> dict[str, Tensor]:
        """Return this rank's share of weights and optimizer in the form of checkpoints: the values themselves."""
        return self._state(self.local_weights())

    def load(self, folder: Path) -> None:
        """Take over weights and optimizer from a checkpoint."""
        load_state(self._state(self.parameters), folder, self.world.control)

    def _state(self, names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            p = self.parameters[name]
            found |= {optimizer_key(name, key): self.optimizer.state[p][key] for key in OPTIMIZER_STATES}
            found[weight_key(name)] = p.detach()
        return found

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that lie like `local_weights` in the form of checkpoints."""
        return local

    def load_local(self, local: dict[str, Tensor], key: Callable[[str], str], folder: Path) -> None:
        """Fill tensors that lie like `local_weights` from a checkpoint, which has them under `key(name)`."""
        state = {key(name): tensor for name, tensor in local.items()}
        load_state(state, folder, self.world.control)

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every name and whole tensor, on all ranks, of tensors that lie like `local_weights`."""
        for name, parameter in self.parameters.items():
            if self.name == "fsdp":
                shard = local[name]
                assert isinstance(shard, DTensor)
                yield name, shard.full_tensor()
                continue
            tensor = local[name] if name in local else torch.empty_like(parameter)
            if self.world.size > 1:
                dist.broadcast(tensor, src=self._owners[name])
            yield name, tensor

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return share_out({name: p.numel() for name, p in self.parameters.items()}, self.world.size)


def shard_model(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Cut the weights of every block, and of what is around the blocks, into parts (FSDP2)."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def make_mesh(device_type: str, num_ranks: int, replicas: int) -> DeviceMesh:
    """Return the ranks as one row, or as `replicas` rows whose members share one copy of the weights."""
    if num_ranks % replicas:
        raise UserError(f"parallel.replicas={replicas} does not divide the {num_ranks} processes")
    if replicas == 1:
        return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, num_ranks // replicas), mesh_dim_names=("replicate", "shard"))
