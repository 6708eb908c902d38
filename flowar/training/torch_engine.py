"""One process, DDP, or FSDP2, and torch's AdamW. Read next: checkpoint.py, train.py."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.base.run_folder import optimizer_key, weight_key
from flowar.config.training import ParallelConfig
from flowar.models.build import family_of
from flowar.models.family import Model
from flowar.models.folders import load_state
from flowar.training.engine import EngineSettings, engine_name, prepare_blocks
from flowar.training.optim import ADAM_MOMENTS, LocalAdamW, make_optimizer
from flowar.training.shares import fill, fill_from_main, gather_whole, read_shared, share_out, take_tensors

# FSDP2 warns about in-place operations on the model's output; the model has no such operations.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


class TorchEngine:
    """One process, DDP, or FSDP2 (with `parallel.replicas` > 1: HSDP), and torch's AdamW."""

    def __init__(self, settings: EngineSettings, model: Model, world: World) -> None:
        self.name = engine_name(settings.parallel.engine, world.size)
        self.optim = settings.optim
        self.world = world
        self.model = model
        self.forward: nn.Module = model
        family = family_of(self.model.config)
        blocks = family.blocks(self.model)
        prepare_blocks(blocks, settings.parallel)
        if self.name == "single":
            model.to(world.device)
        else:
            fresh = take_tensors(model)
            if self.name == "fsdp":
                mesh = make_mesh(world.device.type, world.size, settings.parallel.replicas)
                shard_model(model, blocks, mesh, settings.parallel)
            fill_from_main(model, fresh, world)
        if self.name == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                self.model, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        self.syncs_once = self.name == "fsdp" and settings.parallel.fsdp_sync_once
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = LocalAdamW(self.parameters, make_optimizer(self.model, family, settings.optim, settings.old))
        # FSDP2: each rank of one row has a part of the gradients. Otherwise every rank has all of them.
        self._num_copies = settings.parallel.replicas if self.name == "fsdp" else world.size

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """Return the context of one part's forward and backward pass.

        DDP averages gradients over the ranks after the last part. FSDP2 does it after every part; waiting, as
        `parallel.fsdp_sync_once` allows, would keep full gradients on every rank.
        """
        if self.syncs_once:
            assert isinstance(self.forward, FSDPModule)
            self.forward.set_requires_gradient_sync(is_last)
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self.forward, DistributedDataParallel) and not is_last:
            context = self.forward.no_sync()
        with context:
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part of the batch."""
        loss.backward()

    def norm_share(self) -> Tensor:
        """Return this rank's share of the gradients' squared norm, float64; the shares of all ranks add up to it."""
        return self.optimizer.take_gradients().double().square() / self._num_copies

    def clip(self, norm: Tensor) -> None:
        """Clip the gradients as the settings say; `norm`, a scalar on the device, is their norm over all ranks."""
        self.optimizer.clip(norm, self.optim)

    def step(self, lr: float, grad_norm: float) -> None:
        """Move the weights along the clipped gradients."""
        self.optimizer.step(lr)

    def skip(self) -> None:
        """Drop the gradients and leave the weights as they are."""
        self.optimizer.drop_gradients()

    def save_own_files(self, folder: Path) -> None:
        """Write the extra files that the engine's own tools need: here, nothing."""

    def set_step(self, step: int) -> None:
        """Tell the optimizer how many steps it has done."""
        self.optimizer.steps.fill_(step)

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights, for averaging; each weight is on one rank only.

        FSDP2: this rank's DTensors. Otherwise all ranks have all weights, and each rank averages some of them.
        """
        return self._followed

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights in the form of checkpoints."""
        return {weight_key(name): tensor for name, tensor in self.to_state(self.local_weights()).items()}

    def state(self) -> dict[str, Tensor]:
        """Return this rank's share of weights and optimizer in the form of checkpoints; the values may be in use."""
        found = self.weights()
        for key in ADAM_MOMENTS:
            trained = self.optimizer.moments
            moments = {name: trained[name][key] for name in self.local_weights() if name in trained}
            found |= {optimizer_key(name, key): tensor for name, tensor in self.to_state(moments).items()}
        return found

    def load(self, folder: Path) -> None:
        """Load weights and optimizer from a checkpoint."""
        self._load({name: p.detach() for name, p in self.parameters.items()}, weight_key, folder)
        for key in ADAM_MOMENTS:
            moments = {name: own[key] for name, own in self.optimizer.moments.items()}
            self._load(moments, functools.partial(optimizer_key, state=key), folder)

    def _load(self, tensors: dict[str, Tensor], key: Callable[[str], str], folder: Path) -> None:
        """Fill tensors that are laid out like the parameters."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        keys = {name: key(name) for name in tensors}
        for name, whole in read_shared(keys, shapes, self._owners, self.world, folder):
            fill(tensors[name], whole)

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that are laid out like `local_weights`, in the form of checkpoints."""
        shards = {name: tensor for name, tensor in local.items() if isinstance(tensor, DTensor)}
        return gather_whole(shards, self._owners, self.world) if self.name == "fsdp" else local

    def load_local(self, local: dict[str, Tensor], key: Callable[[str], str], folder: Path) -> None:
        """Fill tensors that are laid out like `local_weights` from a checkpoint, which has them under `key(name)`."""
        if self.name == "fsdp":
            self._load(local, key, folder)
        else:
            load_state({key(name): tensor for name, tensor in local.items()}, folder, self.world.control)

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every name and whole tensor, on all ranks, from tensors that are laid out like `local_weights`."""
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
    def _followed(self) -> dict[str, Tensor]:
        is_mine = {name: self.name == "fsdp" or owner == self.world.rank for name, owner in self._owners.items()}
        return {name: p.detach() for name, p in self.parameters.items() if is_mine[name]}

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return share_out({name: p.numel() for name, p in self.parameters.items()}, self.world.size)


def shard_model(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard the weights of every block, and of what is around the blocks (FSDP2).

    With `parallel.fsdp_bf16` a block's matrices and biases are gathered in bfloat16, as autocast casts them anyway; the
    weights of its norms, and everything around the blocks, stay float32.
    """
    policy = MixedPrecisionPolicy()
    if parallel.fsdp_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded: list[FSDPModule] = []
    for block in blocks:
        norms: list[nn.Module] = [module for module in block.modules() if has_norm_weight(module)]
        if parallel.fsdp_bf16 and norms:
            fully_shard(norms, mesh=mesh, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.fsdp_reshard, mp_policy=policy)
        assert isinstance(block, FSDPModule)
        sharded.append(block)
    fully_shard(model, mesh=mesh)
    ahead = parallel.fsdp_prefetch
    for index, module in enumerate(sharded if ahead else []):
        module.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + ahead])
        module.set_modules_to_backward_prefetch(sharded[max(0, index - ahead) : index][::-1])


def has_norm_weight(module: nn.Module) -> bool:
    """Return whether a module is a norm that has a weight."""
    return isinstance(module, nn.RMSNorm | nn.LayerNorm) and module.weight is not None


def make_mesh(device_type: str, num_ranks: int, replicas: int) -> DeviceMesh:
    """Return the ranks as one row, or as `replicas` rows whose members share one copy of the weights."""
    if num_ranks % replicas:
        raise UserError(
            f"parallel.replicas={replicas} does not divide the {num_ranks} processes; set a divisor of {num_ranks}"
        )
    if replicas == 1:
        return init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, num_ranks // replicas), mesh_dim_names=("replicate", "shard"))
