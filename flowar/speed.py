"""How fast training is, and how fast its device could be. Read next: train.py."""

import contextlib
import functools
import math
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flowar.config import ModelConfig, TrainConfig
from flowar.distributed import World, collect
from flowar.flow import weigh
from flowar.info import count_training_flops

MEASURED_SIDE, MEASURED_SIDE_CUDA, MEASURED_TIMES = 1024, 8192, 5  # of the matrix product that tells a device's rate

# Dense TFLOP/s by precision, from the makers' data sheets; the first name that the device's name contains counts.
PEAK_TFLOPS = (
    ("H200", {"bf16": 989, "tf32": 495, "fp32": 67}),
    ("H100 PCIe", {"bf16": 756, "tf32": 378, "fp32": 51}),
    ("H100", {"bf16": 989, "tf32": 495, "fp32": 67}),
    ("A100", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    ("A40", {"bf16": 150, "tf32": 75, "fp32": 37.4}),
    ("V100", {"bf16": 15.7, "tf32": 15.7, "fp32": 15.7}),
)


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the TFLOP/s that matrix products reach at most: from the table for GPUs, measured on a CPU.

    None for a GPU that is not in the table.
    """
    if device.type != "cuda":
        return measure_tflops()
    return table_tflops(torch.cuda.get_device_name(device), precision)


def table_tflops(name: str, precision: str) -> float | None:
    """Return the peak rate of a GPU by its name, or None if the table doesn't have it."""
    return next((rates[precision] for known, rates in PEAK_TFLOPS if known in name), None)


def measure_tflops(device: torch.device | None = None) -> float:
    """Return the TFLOP/s of a float32 matrix product on a device, the CPU if None; median of several."""
    side = MEASURED_SIDE_CUDA if device is not None and device.type == "cuda" else MEASURED_SIDE
    a = torch.randn(side, side, device=device)
    seconds = []
    for _ in range(MEASURED_TIMES):
        began = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds) / 1e12


class Interval:
    """Sums and times of the steps since the last log record."""

    def __init__(self, step: int, num_scales: int, world: World) -> None:
        self.first_step = step
        self.world = world
        self.losses = torch.zeros(num_scales, device=world.device)
        self.grad_norm = 0.0
        self.num_added = 0
        self.started = self.mark = time.perf_counter()
        self.seconds = {"data_wait": 0.0, "gradients": 0.0, "update": 0.0, "rest": 0.0}

    def data_arrived(self) -> None:
        """Note that the wait for the next batch is over."""
        self._lap("data_wait")

    def gradients_done(self) -> None:
        """Note that forward and backward pass are over, on the device too: their numbers were read."""
        self._lap("gradients")

    def update_done(self) -> None:
        """Note that the optimizer and the averages have been given their work."""
        self._lap("update")

    def step_ended(self) -> None:
        """Note that saves, previews and logging are over."""
        self._lap("rest")

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self.mark
        self.mark = now

    def add(self, losses: Tensor, grad_norm: float) -> None:
        """Add one step that was done, not skipped."""
        self.losses += losses
        self.grad_norm += grad_norm
        self.num_added += 1

    def record(self, step: int, num_steps: int, lr: float, config: TrainConfig, peak: float | None) -> dict[str, float]:
        """Return the means over the interval, speeds and the time that is left, as one record of metrics.jsonl.

        All ranks call it; the one that waited longest for data is named. `peak` is the TFLOP/s of one device.
        """
        steps = step - self.first_step
        losses = self.losses / self.num_added if self.num_added else torch.full_like(self.losses, torch.nan)
        elapsed_s = time.perf_counter() - self.started
        images_per_s = steps * config.batch_size / elapsed_s
        by_scale = {f"loss/scale_{side}": loss for side, loss in zip(config.model.scales, losses.tolist(), strict=True)}
        everyone = collect((self.seconds["data_wait"] / elapsed_s, peak_memory_gib(self.world.device)))
        waits = [wait for wait, _ in everyone]
        record = {
            "step": step,
            "loss": weigh(losses, config.model.scales).item(),
            **by_scale,
            "grad_norm": self.grad_norm / self.num_added if self.num_added else math.nan,
            "skipped_steps": steps - self.num_added,
            "lr": lr,
            "images_per_s": images_per_s,
            "data_wait_share": max(waits),
            "data_wait_rank": waits.index(max(waits)),
            **{f"{phase}_share": self.seconds[phase] / elapsed_s for phase in ("gradients", "update", "rest")},
            "peak_memory_gib": max(memory for _, memory in everyone),
            "remaining_s": (num_steps - step) * elapsed_s / steps,
        }
        if peak is not None:
            used = images_per_s * training_flops(config.model) / 1e12
            record["mfu"] = used / (peak * self.world.size)
        return record


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has had: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@functools.cache
def training_flops(model: ModelConfig) -> int:
    """Return the FLOPs of one image's forward and backward pass."""
    return count_training_flops(model)


@contextlib.contextmanager
def profiled(config: TrainConfig, step: int, world: World) -> Iterator[None]:
    """Trace a step of rank 0, if it is one of `profile_steps`: RUN_DIR/profile/step_N.json, for chrome://tracing."""
    span = config.profile_steps
    if span is None or not world.is_main or not span[0] <= step <= span[1]:
        yield
        return
    folder = Path(config.run_dir) / "profile"
    folder.mkdir(exist_ok=True)
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(folder / f"step_{step:08d}.json"))
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(folder / f"step_{step:08d}_memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
