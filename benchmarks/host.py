"""Time the host's work between two steps of FlowAR-H, and count a step's communication, as rank 0 of 64 under FSDP2.

Runs on one CPU. The process group has no other processes, and the model has FlowAR-H's 611 parameters with a few
channels each, so only the bookkeeping is left, which a GPU would wait for.
python -m benchmarks.host      medians per part, then collectives by setting
"""

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flowar.base.distributed import World
from flowar.config.models import FlowARConfig, ModelConfig, variant_config
from flowar.config.training import EMAConfig, OptimConfig, ParallelConfig
from flowar.latents.batches import Batch
from flowar.models.build import create_model
from flowar.training.averages import EMA
from flowar.training.engine import Engine, EngineSettings
from flowar.training.setup import make_engine
from flowar.training.step import StepSettings, TrainingInputs, accumulate, agree, draw_training_inputs

RANKS = 64
STEPS, WARM_UP = 20, 3
PARAMETERS = 611  # named ones of FlowAR-H
SAMPLES = 32  # per rank, in a batch of 2,048
CPU = torch.device("cpu")
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {"fsdp_reshard": False}, {"fsdp_bf16": True}, {"fsdp_bf16": True, "fsdp_reshard": False},
    {"fsdp_sync_once": True},
)  # fmt: skip


@contextlib.contextmanager
def imagined_ranks(count: int = RANKS) -> Iterator[World]:
    """Start a process group whose other ranks don't exist; collectives return at once, without data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield World(0, count, CPU, None)
    finally:
        dist.destroy_process_group()


def narrow(model: ModelConfig) -> FlowARConfig:
    """Return the shape of a FlowAR with the same named parameters, but only a few channels and tokens."""
    assert isinstance(model, FlowARConfig)
    return dataclasses.replace(
        model, variant="custom", scales=(1, 2), ar_width=64, flow_width=64, ar_heads=2, flow_heads=2,
        latent_channels=4, num_classes=100,
    )  # fmt: skip


def random_inputs(settings: StepSettings, size: int, number: int = 1) -> TrainingInputs:
    """Return the inputs of a step, from random moments."""
    channels, *sides = settings.model.latent_shape
    moments = torch.randn(size, 2 * channels, *sides)
    batch = Batch(moments, torch.zeros(size, dtype=torch.int64), torch.arange(size))
    return draw_training_inputs(batch, number, settings)


def make_parts(
    model: ModelConfig, parallel: ParallelConfig, world: World, precision: str = "fp32", parts: int = 1
) -> tuple[Engine, StepSettings]:
    """Return an engine with fresh weights, and the settings of its steps: one sample in each part."""
    settings = StepSettings(model, 0, 0.1, precision, 1, 1.0)
    engine = EngineSettings(parallel, OptimConfig(), precision, 1, parts)
    return make_engine(engine, create_model(model).train(), world), settings


def time_gap() -> dict[str, float]:
    """Return the median milliseconds of each part between the last backward pass and the next forward pass."""
    seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def lap(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[name].append(time.process_time() - start)

    largest = variant_config("flowar-h")
    wide = StepSettings(largest, 0, 0.1, "fp32", SAMPLES, 1.0)
    with imagined_ranks() as world:
        engine, settings = make_parts(narrow(largest), ParallelConfig(engine="fsdp"), world)
        assert len(engine.parameters) == PARAMETERS
        ema = EMA(EMAConfig(), engine.local_weights())
        inputs = random_inputs(settings, 1)
        for step in range(1, WARM_UP + STEPS + 1):
            terms = accumulate(engine, inputs, settings)
            with lap("norm, clip, the one read"):
                numbers = agree(engine, terms, settings)
            with lap("AdamW, gradients dropped"):
                engine.step(1e-4, numbers.grad_norm)
            with lap("averages"):
                ema.update(engine.local_weights(), step)
            with lap("draws, made ahead by the loader's workers"):
                drawn = random_inputs(wide, SAMPLES, step)
            with lap("copies"):
                drawn.part(slice(0, SAMPLES), CPU)
    return {name: statistics.median(each[WARM_UP:]) * 1e3 for name, each in seconds.items()}


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes that a gather returns or a reduction takes, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
        if func.namespace == "c10d":
            kind = func.__name__.split(".")[0].strip("_").removesuffix("_base")
            tensors = [value for value in args if isinstance(value, Tensor)] + [
                each for value in args if isinstance(value, list) for each in value if isinstance(each, Tensor)
            ]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)
            key = f"{kind} {str(largest.dtype).removeprefix('torch.')}"
            self.calls[key] += 1
            self.bytes[key] += largest.nbytes
        return func(*args, **(kwargs or {}))


def count_collectives(
    parallel: ParallelConfig, model: ModelConfig | None = None, *, precision: str = "bf16", parts: int = 1
) -> dict[str, tuple[int, int]]:
    """Return the collectives of one step of rank 0 of 64, as "kind dtype" -> (calls, bytes).

    Args:
        parallel: the engine and its settings.
        model: its shape; None: FlowAR-H's with a few channels, for which only the calls are right, not the bytes.
        precision: of the step.
        parts: of the batch, of one sample each.
    """
    with imagined_ranks() as world:
        engine, settings = make_parts(model or narrow(variant_config("flowar-h")), parallel, world, precision, parts)
        inputs = random_inputs(settings, parts)
        for step in range(2):  # the first step sets things up
            with contextlib.nullcontext(Collectives()) if step == 0 else Collectives() as found:
                numbers = agree(engine, accumulate(engine, inputs, settings), settings)
                engine.step(1e-4, numbers.grad_norm)
    return {key: (found.calls[key], found.bytes[key]) for key in sorted(found.calls)}


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = time_gap()
    print(f"between two steps, {PARAMETERS} parameters, rank 0 of {RANKS}, {STEPS} steps, torch {torch.__version__}")
    for name, milliseconds in found.items():
        print(f"{name:42s} {milliseconds:6.2f} ms")
    print(f"{'sum without the draws':42s} {sum(ms for name, ms in found.items() if 'ahead' not in name):6.2f} ms")
    for changes in SETTINGS:
        print(f"one step, fsdp, precision=bf16, two parts, {changes or 'as by default'}:")
        parallel = ParallelConfig(engine="fsdp", **changes)
        print("   ", ", ".join(f"{calls} {key}" for key, (calls, _) in count_collectives(parallel, parts=2).items()))


if __name__ == "__main__":
    main()
