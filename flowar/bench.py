"""`flowar bench`: a model against the plain baseline of its family, in one process, taking turns.

The baseline is `baseline.py` in the family's folder: the functions of family.py, computed as the paper's authors do.
Read next: config/benching.py, models/flowar/baseline.py.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowar.base.devices import drawing_precision, pick_device
from flowar.config.benching import BenchConfig
from flowar.config.drawing import DrawConfig
from flowar.config.training import ParallelConfig
from flowar.models.build import family_of
from flowar.models.costs import count_training_flops
from flowar.models.family import Model, weigh
from flowar.models.layers import set_attention
from flowar.models.tally import PeakMemory, Tally, tensors_in
from flowar.training.engine import prepare_blocks

OURS, BASELINE = "model", "baseline"
GEMM_SIDES, COPY_BYTES = {"cpu": 1024, "cuda": 8192}, {"cpu": 2**28, "cuda": 2**31}  # to measure a device's limits
LIMIT_RUNS = 7
PROFILE_ROWS = 15
DRAWING_COMPILES = any(each.name == "compile" for each in fields(DrawConfig))  # then the family compiles while drawing


@dataclass
class Measured:
    """What the model or the baseline took."""

    seconds: list[float] = field(default_factory=list)  # of each round
    peak_bytes: int = 0  # of one round, on top of weights and inputs
    operations: int = 0
    bytes: int = 0
    flops: int = 0

    @property
    def median_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)


def baseline_of(model: Any) -> Any | None:
    """Return the module of the plain baseline of a model's family, or None if it has no baseline."""
    family: Any = family_of(model)  # a module
    name = f"{family.__name__.rpartition('.')[0]}.baseline"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def make_work(config: BenchConfig, module: Any, model: Model, device: torch.device) -> Callable[[], object]:
    """Return the function that is measured; each call does the work once.

    Args:
        config: what to measure, and the model's shape.
        module: the family, or its baseline, with the losses and the sampler.
        model: made by `module`, on the device.
        device: also "meta".
    """
    shape, family, batch = config.measured_model, family_of(config.model), config.batch_size
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(batch) % shape.num_classes).to(device)
    if config.what == "sample":
        noise = torch.randn(batch, *family.noise_shape(shape), generator=generator).to(device)
        step_noise = functools.partial(draw_step_noise, batch, device)
        return lambda: module.generate(model.eval(), labels, noise, config, step_noise)
    latents = torch.randn(batch * shape.images_per_sample, *shape.latent_shape, generator=generator).to(device)
    draws = [family.draw(shape, generator) for _ in range(batch)]
    stacked = {name: torch.stack([each[name] for each in draws]).to(device) for name in draws[0]}
    weights = tuple(family.loss_terms(shape).values())
    model.train()

    def forward() -> Tensor:
        model.zero_grad()
        enabled = config.precision == "bf16" and device.type != "meta"
        with torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext():
            return weigh(module.losses(model, shape, latents, labels, stacked), weights)

    return attention_work(model, forward) if config.what == "attention" else lambda: forward().backward()


def draw_step_noise(batch: int, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Return the noise of one step of a stochastic solver."""
    return torch.randn(batch, *shape, device=device)


def attention_work(model: Model, forward: Callable[[], object]) -> Callable[[], object]:
    """Return a function that runs a model's first attention layer forward and backward, on a training step's inputs."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert layers, "the model has no module whose class ends with Attention"
    given: list[Any] = []
    handle = layers[0].register_forward_pre_hook(lambda _, *values: given.append(values), with_kwargs=True)
    forward()
    handle.remove()
    arguments, named = given[0]
    arguments = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]

    def work() -> None:
        attended = next(tensors_in(layers[0](*arguments, **named)))
        attended.sum().backward()

    return work


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that some work takes, including on the device."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of some work, on top of what was allocated before, in bytes."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak: int = torch.cuda.max_memory_allocated(device) - before
        return peak
    memory = PeakMemory()
    with memory:
        work()
    return memory.peak


def measure_limits(device: torch.device, precision: str) -> tuple[float, float]:
    """Return a device's limits: FLOP/s of a large matrix product, and bytes/s of a large copy, read plus written."""
    side, size = GEMM_SIDES[device.type], COPY_BYTES[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, source = torch.randn(side, side, device=device, dtype=dtype), torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    with drawing_precision(precision, device):
        times = [(timed(lambda: a @ a, device), timed(lambda: target.copy_(source), device)) for _ in range(LIMIT_RUNS)]
    product_s, copy_s = (min(each) for each in zip(*times, strict=True))
    return 2 * side**3 / product_s, 2 * size / copy_s


def count_worked(config: BenchConfig) -> int:
    """Return how many images are processed at once; a training sample can be a sequence of images."""
    return config.batch_size * (1 if config.what == "sample" else config.measured_model.images_per_sample)


def useful_flops(config: BenchConfig, found: dict[str, Measured]) -> int:
    """Return the FLOPs of one image that count for the MFU of both: the smallest known count that does the work."""
    shape, known = config.measured_model, [one.flops // count_worked(config) for one in found.values() if one.flops]
    if config.what == "train":
        known.append(count_training_flops(shape))
    elif config.what == "sample":
        known.append(family_of(shape).sampling_flops(shape, config))
    return min(known, default=0)


def measure(config: BenchConfig, device: torch.device) -> dict[str, Measured]:
    """Return what the model and its baseline took."""
    shape = config.measured_model
    family, plain = family_of(shape), baseline_of(shape) if config.baseline else None
    modules = {OURS: family} | ({BASELINE: plain} if plain else {})
    found = {name: Measured() for name in modules}
    if config.counts:
        for name, module in modules.items():
            with torch.device("meta"):
                model = module.create(shape)
            work = make_work(config, module, model, torch.device("meta"))
            with Tally() as tally:
                work()
            found[name].operations, found[name].bytes = sum(tally.operations.values()), tally.bytes
            found[name].flops = tally.flops
    works = {}
    for name, module in modules.items():
        torch.manual_seed(0)
        model = module.create(shape).to(device)
        if name == OURS:
            set_attention(model, config.attention)
            blocks = config.what != "sample" or not DRAWING_COMPILES
            prepare_blocks(family.blocks(model), ParallelConfig(compile=config.compile and blocks))
        works[name] = make_work(config, module, model, device)
    with ExitStack() as stack:
        tf32 = "fp32" if config.precision == "fp32" else "tf32"
        stack.enter_context(drawing_precision(config.precision if config.what == "sample" else tf32, device))
        for name, work in works.items():
            work()  # compiles, and warms up the allocator
            found[name].peak_bytes = peak_of(work, device)
        for _ in range(config.rounds):
            for name, work in works.items():
                found[name].seconds.append(timed(work, device))
        if config.profile:
            for name, work in works.items():
                show_profile(name, work, device)
    return found


def show_profile(name: str, work: Callable[[], object], device: torch.device) -> None:
    """Print which operations take the time."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        synchronize(device)
    sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(f"{name}:\n{profiler.key_averages().table(sort_by=sort, row_limit=PROFILE_ROWS)}")


def main(config: BenchConfig, dry_run: bool = False) -> None:
    """Measure and print."""
    device = pick_device(config.device)
    _ = config.measured_model  # raises if depth is wrong
    if dry_run:
        return
    before = measure_limits(device, config.precision)
    found = measure(config, device)
    after = measure_limits(device, config.precision)  # other work on the machine may have come or gone
    flops_per_s, bytes_per_s = map(max, before, after)
    images, useful = count_worked(config), useful_flops(config, found)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    depth = "" if config.depth is None else f", {config.depth} blocks each"
    table = Table(
        "",
        *found,
        title=f"{config.what}: {config.model.variant}{depth}, batch {config.batch_size}, {config.precision}; {kind}",
    )

    def row(name: str, text: Callable[[Measured], str]) -> None:
        table.add_row(name, *(text(one) for one in found.values()))

    row(f"seconds, median of {config.rounds}", lambda one: f"{one.median_s:.4g}")
    row("images/s", lambda one: f"{images / one.median_s:.4g}")
    if useful:
        row("MFU by useful FLOPs", lambda one: f"{useful * images / one.median_s / flops_per_s:.1%}")
    row("peak memory without weights, GiB", lambda one: f"{one.peak_bytes / 2**30:.3f}")
    if config.counts:
        row("operations", lambda one: f"{one.operations:,}")
        row("GFLOPs per image", lambda one: f"{one.flops / images / 1e9:,.1f}")
        row("GB per image, nothing fused", lambda one: f"{one.bytes / images / 1e9:,.2f}")
        row("limit by arithmetic, seconds", lambda one: f"{one.flops / flops_per_s:.4g}")
        row("limit by traffic, seconds", lambda one: f"{one.bytes / bytes_per_s:.4g}")
    Console().print(table)
    print(
        f"Limits measured in this run: {flops_per_s / 1e12:.3g} TFLOP/s of matrix products, "
        f"{bytes_per_s / 1e9:.3g} GB/s of copies. Useful FLOPs: {useful / 1e9:,.1f} G per image."
    )
    if BASELINE in found:
        pairs = zip(found[OURS].seconds, found[BASELINE].seconds, strict=True)
        ratio = statistics.median(base / ours for ours, base in pairs)
        print(f"The model is {ratio:.2f} times as fast as the baseline (median of {config.rounds} pairs of runs).")
