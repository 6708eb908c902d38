"""Trace the operations and memory of a training step or a batch of samples on fake tensors. Read next: machines.py.

torch's fake tensors behave like real ones, including autocast, autograd and recomputation, but hold no data. Compiled
blocks are traced and split into forward and backward graphs as for inductor, whose kernels fusion.py predicts. Dropout
is left out, as attention with dropout is one kernel on a GPU but not on a CPU; in FlowAR-L dropout moves 2% more.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils.flop_counter import flop_registry

from flowar.config.drawing import DrawConfig
from flowar.config.models import ModelConfig
from flowar.config.training import ParallelConfig
from flowar.models.build import family_of
from flowar.models.family import weigh
from flowar.models.tally import PeakMemory, tensors_in
from flowar.planning.fusion import kernels_of
from flowar.planning.operations import ATTENTION, Kernel, Operation, at_batch, attention_flops, straight
from flowar.training.engine import prepare_blocks

NOT_MOVING = ("prim.", "aten.empty", "aten._unsafe_view", "aten.detach")  # these move nothing, like views
SIZES = (8, 16)  # batches that are traced; in smaller ones the memory that doesn't grow hides the rest


@dataclass(frozen=True)
class Trace:
    """The operations of one part of a step, or of one batch of samples."""

    forward: list[Operation]  # all operations, when sampling
    backward: list[Operation]
    peak: int  # bytes at the peak, on top of weights and their gradients


@dataclass(frozen=True)
class StepTrace:
    """The operations of one part of a training step, by its size."""

    sizes: tuple[int, int]
    ends: tuple[Trace, Trace]

    def at(self, size: int) -> Trace:
        """Return the trace of a micro batch of `size` samples."""
        one, two = self.ends
        forward = at_batch(self.sizes, (one.forward, two.forward), size)
        return Trace(forward, at_batch(self.sizes, (one.backward, two.backward), size), self.peak(size))

    def peak(self, size: int) -> int:
        """Return the peak memory of a micro batch of `size` samples in bytes, on top of weights and gradients."""
        return straight(self.sizes, (self.ends[0].peak, self.ends[1].peak), size)


class Recorder(PeakMemory):
    """Records the operations inside it, and tracks their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.in_graph = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: compiled code stays compiled inside this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        name = str(func)
        if self.in_graph or is_view or name.startswith(NOT_MOVING):
            return result
        tensors = list(tensors_in((args, kwargs or {}, result)))
        inputs = list(tensors_in((args, kwargs or {})))
        kind: Kernel = "other"
        flops = 0
        if ATTENTION in name:
            shapes = [each.shape for each in inputs]
            flops, kind = attention_flops(name, *(shapes[1:4] if "backward" in name else shapes[:3])), "attention"
        elif func._overloadpacket in flop_registry:
            flops, kind = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result), "matmul"
        is_half = any(each.element_size() == 2 for each in inputs)
        moved = sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors)
        self.operations.append(Operation(kind, is_half, False, flops, moved))
        return result


class Compiler:
    """A backend of torch.compile that compiles nothing, but records what a graph would take when it runs."""

    def __init__(self) -> None:
        # Imported here, as they are slow to import and plans without compilation don't need them.
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        self.recorder: Recorder | None = None
        self.backend = aot_autograd(
            fw_compiler=self.compile,
            bw_compiler=self.compile,
            partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
            decompositions=select_decomp_table(),
        )

    def compile(self, graph_module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Return a function that runs a graph unchanged."""
        kernels = kernels_of(graph_module)

        def run(values: list[Any]) -> Any:
            recorder = self.recorder
            if recorder is None:
                return graph_module(*values)
            recorder.in_graph = True
            try:
                result = graph_module(*values)
            finally:
                recorder.in_graph = False
            recorder.operations += kernels
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def prepare(self, blocks: list[nn.Module]) -> None:
        """Make blocks be traced as compiled blocks when they are called."""
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=self.backend, dynamic=False)


@functools.lru_cache
def trace_step(model: ModelConfig, precision: str, checkpoint_every_blocks: int, compiled: bool) -> StepTrace:
    """Return the operations in the forward and backward pass of one part of a training step."""
    one, two = (_trace_part(model, precision, checkpoint_every_blocks, compiled, size) for size in SIZES)
    return StepTrace(SIZES, (one, two))


def _trace_part(shape: ModelConfig, precision: str, every: int, compiled: bool, size: int) -> Trace:
    family = family_of(shape)
    draws = family.draw(shape, torch.Generator())
    weights, compiler = tuple(family.loss_terms(shape).values()), Compiler() if compiled else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = family.create(shape)
        blocks = family.blocks(model)
        if compiler:
            compiler.prepare(blocks)
        prepare_blocks(blocks, ParallelConfig(checkpoint_every_blocks=every))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        latents = torch.empty(size * shape.images_per_sample, *shape.latent_shape)
        labels = torch.zeros(size, dtype=torch.int64)
        given = {name: torch.empty(size, *tensor.shape) for name, tensor in draws.items()}

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return weigh(family.losses(model, shape, latents, labels, given), weights)

        if compiler:
            forward().backward()
        recorder = Recorder()
        if compiler:
            compiler.recorder = recorder
        with recorder:
            loss = forward()
            parted = len(recorder.operations)
            loss.backward()
    if compiler:
        torch._dynamo.reset()
    return Trace(recorder.operations[:parted], recorder.operations[parted:], recorder.peak)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def trace_sampling(shape: ModelConfig, how: DrawConfig, batch_size: int, compiled: bool) -> Trace:
    """Return the operations for drawing the latents of one batch, in the precision of `how`."""
    family = family_of(shape)
    compiler = Compiler() if compiled else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = family.create(shape)
        noise = torch.empty(batch_size, *family.noise_shape(shape))
        labels = torch.zeros(batch_size, dtype=torch.int64)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how.precision)

    def draw() -> None:  # outside the mode, so that the solver can read real times
        with torch.no_grad(), torch.autocast("cpu", half, enabled=half is not None):
            family.generate(model, labels, noise, how, lambda sizes: noise.new_empty(batch_size, *sizes))

    recorder = Recorder()
    if compiler:
        compiler.prepare(family.blocks(model))
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000):
            draw()
        compiler.recorder = recorder
    with recorder:
        draw()
    if compiler:
        torch._dynamo.reset()
    return Trace(recorder.operations, [], recorder.peak)
