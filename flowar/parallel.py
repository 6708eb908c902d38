"""Wraps a model for training on one or many processes: plain, DDP, FSDP2, DeepSpeed ZeRO; alone imports deepspeed.

All engines keep float32 weights under the names of the plain model, and their checkpoints have one form: a dictionary
from names to tensors of the plain model's shapes, whole or as DTensors. So a run goes on with another engine, or with
another number of processes. No hyper-parameter of its own. Read next: checkpoint.py, train.py.
"""

import contextlib
import functools
import os
import sys
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
from torch.utils.checkpoint import checkpoint

from flowar.checkpoint import load_state
from flowar.config import TrainConfig
from flowar.distributed import World
from flowar.errors import UserError
from flowar.model import FlowAR
from flowar.optim import make_optimizer, set_learning_rate

# FSDP2 warns that in-place operations on the model's output would be wrong: there is none.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")  # AdamW's


def make_engine(config: TrainConfig, model: FlowAR, world: World, micro_batch_size: int) -> "Engine":
    """Return the engine that `config` names, around a model with fresh weights, the same on all ranks."""
    kind = ZeROEngine if engine_name(config, world) == "deepspeed" else TorchEngine
    return kind(config, model, world, micro_batch_size)


def engine_name(config: TrainConfig, world: World) -> str:
    """Return which engine `config` means: "auto" is single for one process and ddp for several."""
    name = config.parallel.engine
    if name == "auto":
        return "single" if world.size == 1 else "ddp"
    if name == "single" and world.size > 1:
        raise UserError(f"parallel.engine=single, but {world.size} processes were started; use ddp, fsdp or deepspeed")
    return name


def prepare_blocks(model: FlowAR, config: TrainConfig) -> list[nn.Module]:
    """Return the blocks of both Transformers, set up for recomputation and compilation as `config` says."""
    blocks = [*model.ar.lower_blocks, *model.ar.upper_blocks, *model.flow.blocks]
    every = config.parallel.checkpoint_every_blocks
    for index, block in enumerate(blocks):
        if config.parallel.compile:
            block.forward = torch.compile(block.forward)  # inside of what is recomputed, or nothing is compiled
        if every and index % every == 0:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return blocks


class TorchEngine:
    """One process, DDP, or FSDP2 (with `parallel.replicas` > 1: HSDP), and torch's AdamW."""

    def __init__(self, config: TrainConfig, model: FlowAR, world: World, micro_batch_size: int) -> None:
        self.name = engine_name(config, world)
        self.config = config
        self.world = world
        self.model = model.to(world.device)
        self.forward: nn.Module = self.model
        blocks = prepare_blocks(self.model, config)
        if self.name == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                self.model, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        elif self.name == "fsdp":
            shard_model(self.model, blocks, make_mesh(world.device.type, world.size, config.parallel.replicas))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, config.optim)
        for parameter in self.parameters.values():  # now, so that a checkpoint has where to go
            states = {name: torch.zeros_like(parameter) for name in OPTIMIZER_STATES}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=world.device), **states}

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """Return the context of one part's forward and backward pass.

        DDP averages the gradients of the last part over the ranks; FSDP2 those of each, or all would have all of them.
        """
        with self.forward.no_sync() if self.name == "ddp" and not is_last else contextlib.nullcontext():
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
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.optim.max_grad_norm, self._norm)
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

    def state(self) -> dict[str, Tensor]:
        """Return this rank's share of weights and optimizer in the form of checkpoints: the values themselves."""
        return self._state(self.local_weights())

    def load(self, folder: Path) -> None:
        """Take over weights and optimizer from a checkpoint."""
        load_state(self._state(self.parameters), folder, self.world.control)

    def _state(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            p = self.parameters[name]
            found |= {f"optim.{name}.{key}": self.optimizer.state[p][key] for key in OPTIMIZER_STATES}
            found[f"model.{name}"] = p.detach()
        return found

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that lie like `local_weights` in the form of checkpoints."""
        return local

    def load_local(self, local: dict[str, Tensor], prefix: str, folder: Path) -> None:
        """Fill tensors that lie like `local_weights` from a checkpoint, where they have `prefix` before their names."""
        state = {prefix + name: tensor for name, tensor in local.items()}
        load_state(state, folder, self.world.control)

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every name and whole tensor, on all ranks, of tensors that lie like `local_weights`."""
        for name, parameter in self.parameters.items():
            if self.name == "fsdp":
                yield name, local[name].full_tensor()
                continue
            tensor = local[name] if name in local else torch.empty_like(parameter)
            if self.world.size > 1:
                dist.broadcast(tensor, src=self._owners[name])
            yield name, tensor

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return share_out({name: p.numel() for name, p in self.parameters.items()}, self.world.size)


def share_out(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Return a rank for each name, so that all ranks have about as much: the largest first, each to the emptiest."""
    loads, owners = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


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


class ZeROEngine:
    """DeepSpeed ZeRO 1, 2 or 3, and torch's AdamW on its flat float32 partitions. Methods as TorchEngine's."""

    name = "deepspeed"

    def __init__(self, config: TrainConfig, model: FlowAR, world: World, micro_batch_size: int) -> None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ninja
        import deepspeed

        self.config = config
        self.world = world
        self.stage = config.parallel.zero_stage
        prepare_blocks(model, config)
        if config.precision == "bf16":  # DeepSpeed switches off the autocast that it is called in
            model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": config.batch_size // (micro_batch_size * world.size),
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if config.parallel.zero_offload:
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            settings["zero_force_ds_cpu_optimizer"] = False
        self.forward, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=make_optimizer(model, config.optim),
            config=settings,
            dist_init_required=False,
        )
        self.model = self.forward.module
        self.parameters = dict(self.model.named_parameters())
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """Make AdamW's states now, so that a checkpoint has where to go.

        DeepSpeed 0.19 would link them to the weights in the first step, when only those of the first group are there.
        """
        zero = self.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            states = {name: torch.zeros_like(flat) for name in OPTIMIZER_STATES}
            zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **states}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        yield
        if not is_last:
            self.forward.step()  # only counts the parts

    def backward(self, loss: Tensor) -> None:
        self.forward.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> float:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self.stage == 3:
            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        norm = float(norm)
        return norm if norm >= 0 else float("nan")  # DeepSpeed's mark for a norm that isn't finite

    def step(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        self.forward.step()

    def skip(self) -> None:
        # DeepSpeed drops a step by itself where the norm is not finite: let it believe so.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        nan = torch.tensor(float("nan"), device=self.world.device)
        setattr(self.optimizer, name, lambda: [nan] if self.stage == 3 else nan)
        try:
            self.forward.step()
        finally:
            delattr(self.optimizer, name)

    def save_own_files(self, folder: Path) -> None:
        """Write a checkpoint in DeepSpeed's layout, which its zero_to_fp32.py reads."""
        if self.config.parallel.zero_files:
            self.forward.save_checkpoint(str(folder / "deepspeed"), tag="zero")

    def set_step(self, step: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)

    def local_weights(self) -> dict[str, Tensor]:
        """ZeRO 3: this rank's flat part of each weight. Else all ranks have all, and each follows some of them."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return {name: safe_get_local_fp32_param(p) for name, p in self.parameters.items()}
        owners = self._owners
        return {name: p.detach() for name, p in self.parameters.items() if owners[name] == self.world.rank}

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer, each whole on one rank: copies, gathered one after the other."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {}
        for name, p in self.parameters.items():
            mine = self._owners[name] == self.world.rank
            full = {f"model.{name}": safe_get_full_fp32_param(p)}
            full |= {f"optim.{name}.{key}": safe_get_full_optimizer_state(p, key) for key in OPTIMIZER_STATES}
            if mine:
                found |= {key: tensor.cpu().clone() for key, tensor in full.items()}
        return found

    def load(self, folder: Path) -> None:
        for key in (None, *OPTIMIZER_STATES):
            keys = {name: f"optim.{name}.{key}" if key else f"model.{name}" for name in self.parameters}
            for name, full in self._read(folder, keys):
                self._set(self.parameters[name], full, key)

    @torch.no_grad()
    def _set(self, parameter: nn.Parameter, full: Tensor, key: str | None) -> None:
        """Overwrite this rank's part of a weight (and what the forward pass uses of it) or of its optimizer state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is not None and self.stage < 3:
            safe_set_full_optimizer_state(parameter, full, key)
        elif key is not None:
            parameter._z3_optimizer.set_local_hp_param(self._part(full, parameter), parameter, key)
        elif self.stage < 3:
            safe_set_full_fp32_param(parameter, full)
            parameter.data.copy_(full)
        else:
            part = self._part(full, parameter)
            parameter._z3_optimizer.set_local_hp_param(part, parameter)
            parameter.ds_tensor.data.copy_(part)
            if parameter.data.numel() == full.numel():  # small ones are kept whole
                parameter.data.copy_(full)

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage < 3:
            return local
        return {name: t.cpu() for name, t in self.full(local) if self._owners[name] == self.world.rank}

    def load_local(self, local: dict[str, Tensor], prefix: str, folder: Path) -> None:
        for name, full in self._read(folder, {name: prefix + name for name in local}):
            local[name].copy_(self._part(full, self.parameters[name]))

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.parameters.items():
            if self.stage == 3:
                yield name, p._z3_optimizer._fp32_state_allgather(p, local[name])
                continue
            tensor = local[name] if name in local else torch.empty_like(p)
            if self.world.size > 1:
                dist.broadcast(tensor, src=self._owners[name])
            yield name, tensor

    def _part(self, full: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return what this rank has of a whole tensor that lies like `local_weights`."""
        if self.stage < 3:
            return full
        size = parameter.ds_tensor.numel()  # with padding at the end of the last rank's part
        flat = torch.nn.functional.pad(full.flatten(), (0, size * self.world.size - full.numel()))
        return flat[self.world.rank * size : (self.world.rank + 1) * size]

    def _read(self, folder: Path, keys: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors of a checkpoint, some at a time: all of them together may be too much."""
        for names in _groups(keys, lambda name: self._shape(name).numel()):
            state = {keys[name]: torch.empty(self._shape(name)) for name in names}
            load_state(state, folder, self.world.control)
            for name in names:
                yield name, state[keys[name]].to(self.world.device)

    def _shape(self, name: str) -> torch.Size:
        parameter = self.parameters[name]
        return parameter.ds_shape if self.stage == 3 else parameter.shape

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return share_out({name: self._shape(name).numel() for name in self.parameters}, self.world.size)


Engine = TorchEngine | ZeROEngine
READ_AT_ONCE = 2**27  # values: half a GiB


def _groups(names: Iterable[str], size: Callable[[str], int]) -> Iterator[list[str]]:
    group, values = [], 0
    for name in names:
        group.append(name)
        values += size(name)
        if values >= READ_AT_ONCE:
            yield group
            group, values = [], 0
    if group:
        yield group
