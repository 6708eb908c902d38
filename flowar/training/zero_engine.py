"""DeepSpeed ZeRO; the only module that imports deepspeed. Read next: engine.py."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowar.base.distributed import World
from flowar.base.run_folder import optimizer_key, weight_key
from flowar.models.build import family_of
from flowar.models.family import Model
from flowar.models.folders import load_state
from flowar.training.engine import EngineSettings, prepare_blocks
from flowar.training.optim import ADAM_MOMENTS, clip_values, make_optimizer, set_learning_rate
from flowar.training.shares import fill_from_main, read_shared, share_out, take_tensors


class ZeROEngine:
    """DeepSpeed ZeRO 1, 2 or 3, and torch's AdamW on its flat float32 partitions. An `Engine`."""

    name = "deepspeed"

    def __init__(self, settings: EngineSettings, model: Model, world: World) -> None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ninja
        import deepspeed

        self.writes_own_files = settings.parallel.zero_files
        self.world = world
        self.stage = settings.parallel.zero_stage
        family = family_of(model.config)
        prepare_blocks(family.blocks(model), settings.parallel)
        fill_from_main(model, take_tensors(model), world)
        if settings.precision == "bf16":  # DeepSpeed switches off the autocast that it is called in
            model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
        options: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": settings.micro_batch_size,
            "gradient_accumulation_steps": settings.num_parts,
            "gradient_clipping": settings.optim.max_grad_norm or 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": True,  # DeepSpeed's default for stage 3 alone
                "reduce_bucket_size": BUCKET_SIZE,
                "allgather_bucket_size": BUCKET_SIZE,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if settings.parallel.zero_offload:
            options["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            options["zero_force_ds_cpu_optimizer"] = False
        adamw, largest = make_optimizer(model, family, settings.optim, settings.old), settings.optim.max_grad_value
        if largest is not None:  # DeepSpeed clips only the norm, before AdamW's step on its part of the gradients
            adamw.register_step_pre_hook(functools.partial(_clip_values, largest))
        self.forward, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw,
            config=options,
            dist_init_required=False,
        )
        self.model: Model = self.forward.module
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())  # with DeepSpeed's attributes
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """Make AdamW's states now, so that a checkpoint can be loaded into them.

        DeepSpeed 0.19 would link them to the weights in the first step, when only those of the first group exist.
        """
        zero = self.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            states = {name: torch.zeros_like(flat) for name in ADAM_MOMENTS}
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

    def norm_share(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self.stage == 3:
            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        norm = torch.as_tensor(norm, device=self.world.device).double()
        norm = torch.where(norm >= 0, norm, torch.nan)  # DeepSpeed's mark for a norm that isn't finite
        return norm.square() / self.world.size  # already summed over all ranks

    def clip(self, norm: Tensor) -> None:
        """Do nothing: in `step` DeepSpeed clips the norm, and then AdamW's hook clips the values."""

    def step(self, lr: float, grad_norm: float) -> None:
        set_learning_rate(self.optimizer, lr)
        self._step(torch.tensor(grad_norm))

    def skip(self) -> None:
        # DeepSpeed skips a step whose norm is not finite, so give it one.
        self._step(torch.tensor(torch.nan))

    def _step(self, norm: Tensor) -> None:
        """Take DeepSpeed's step with a norm on the CPU; otherwise it would compute the norm again, and read it."""
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        setattr(self.optimizer, name, lambda: [norm] if self.stage == 3 else norm)
        try:
            self.forward.step()
        finally:
            delattr(self.optimizer, name)

    def save_own_files(self, folder: Path) -> None:
        """Write a checkpoint in DeepSpeed's layout, which its zero_to_fp32.py reads."""
        if self.writes_own_files:
            self.forward.save_checkpoint(str(folder / "deepspeed"), tag="zero")

    def set_step(self, step: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step, dtype=torch.float32)

    def local_weights(self) -> dict[str, Tensor]:
        """ZeRO 3: this rank's flat part of each weight. Otherwise ranks have all weights, and each averages some."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return {
                name: safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor.detach().flatten()
                for name, p in self.parameters.items()
            }
        owners = self._owners
        return {name: p.detach() for name, p in self.parameters.items() if owners[name] == self.world.rank}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, each whole on one rank: copies, gathered one after the other."""
        found: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            full = self._whole(p)  # all ranks take part
            if self._owners[name] == self.world.rank:
                found[weight_key(name)] = full.cpu().clone()
        return found

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer, each whole on one rank: copies, gathered one after the other."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            mine = self._owners[name] == self.world.rank
            full = {weight_key(name): self._whole(p)}
            if p.requires_grad:
                full |= {optimizer_key(name, key): safe_get_full_optimizer_state(p, key) for key in ADAM_MOMENTS}
            if mine:
                found |= {key: tensor.cpu().clone() for key, tensor in full.items()}
        return found

    def _whole(self, parameter: Any) -> Tensor:
        """Return a whole weight; all ranks take part. DeepSpeed's own functions only work for trained weights."""
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            whole: Tensor = safe_get_full_fp32_param(parameter)
            return whole
        if self.stage < 3:
            return torch.Tensor.detach(parameter)
        gathered: Tensor = parameter._z3_optimizer._fp32_state_allgather(parameter, parameter.ds_tensor.flatten())
        return gathered

    def load(self, folder: Path) -> None:
        trained = [name for name, p in self.parameters.items() if p.requires_grad]
        for key in (None, *ADAM_MOMENTS):
            keys = {name: optimizer_key(name, key) for name in trained} if key else {}
            keys = keys or {name: weight_key(name) for name in self.parameters}
            for name, whole in read_shared(keys, self._shapes, self._owners, self.world, folder):
                self._set(self.parameters[name], whole, key)

    @torch.no_grad()
    def _set(self, parameter: Any, full: Tensor, key: str | None) -> None:
        """Overwrite this rank's part of a weight (and its copy for the forward pass) or of its optimizer state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is not None and self.stage < 3:
            safe_set_full_optimizer_state(parameter, full, key)
        elif key is not None:
            parameter._z3_optimizer.set_local_hp_param(self._part(full, parameter), parameter, key)
        elif self.stage < 3:
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, full)
            parameter.data.copy_(full)
        else:
            part = self._part(full, parameter)
            if parameter.requires_grad:
                parameter._z3_optimizer.set_local_hp_param(part, parameter)
            parameter.ds_tensor.data.copy_(part)
            if parameter.data.numel() == full.numel():  # small ones are kept whole
                parameter.data.copy_(full)

    def to_state(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage < 3:
            return local
        return {name: t.cpu() for name, t in self.full(local) if self._owners[name] == self.world.rank}

    def load_local(self, local: dict[str, Tensor], key: Callable[[str], str], folder: Path) -> None:
        if self.stage < 3:
            load_state({key(name): tensor for name, tensor in local.items()}, folder, self.world.control)
            return
        keys = {name: key(name) for name in local}
        for name, whole in read_shared(keys, self._shapes, self._owners, self.world, folder):
            local[name].copy_(self._part(whole, self.parameters[name]))

    def full(self, local: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.parameters.items():
            if self.stage == 3:
                yield name, p._z3_optimizer._fp32_state_allgather(p, local[name])
                continue
            tensor = local[name] if name in local else torch.empty_like(p)
            if self.world.size > 1:
                dist.broadcast(tensor, src=self._owners[name])
            yield name, tensor

    def _part(self, full: Tensor, parameter: Any) -> Tensor:
        """Return this rank's part of a whole tensor, laid out like `local_weights`."""
        if self.stage < 3:
            return full
        size = parameter.ds_tensor.numel()  # with padding at the end of the last rank's part
        flat = torch.nn.functional.pad(full.flatten(), (0, size * self.world.size - full.numel()))
        return flat[self.world.rank * size : (self.world.rank + 1) * size]

    @functools.cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: p.ds_shape if self.stage == 3 else p.shape for name, p in self.parameters.items()}

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return share_out({name: shape.numel() for name, shape in self._shapes.items()}, self.world.size)


BUCKET_SIZE = 200_000_000  # values: 0.8 GB; DeepSpeed's default takes 2 GB


def _clip_values(largest: float, optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Clip the values of the gradients that an optimizer is about to use."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clip_values([parameter.grad for parameter in parameters if parameter.grad is not None], largest)
