"""The speed of training, and the share of the device's peak that it reaches. Read next: train.py."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from flowar.base.devices import peak_memory_gib
from flowar.base.distributed import World, gather_objects
from flowar.models.family import weigh
from flowar.training.step import StepNumbers


class StepMeter:
    """Sums and times of the steps since the last log record."""

    def __init__(self, step: int, loss_terms: dict[str, float], world: World) -> None:
        self.first_step = step
        self.loss_terms = loss_terms  # name -> weight
        self.world = world
        self.losses = torch.zeros(len(loss_terms))
        self.grad_norm = 0.0
        self.num_added = 0
        self.started = self.mark = time.perf_counter()
        self.seconds = {"data_wait": 0.0, "gradients": 0.0, "update": 0.0, "rest": 0.0}

    def data_arrived(self) -> None:
        """Note that the wait for the next batch is over."""
        self._lap("data_wait")

    def gradients_done(self) -> None:
        """Note that forward and backward pass are over, on the device too, as their numbers were read."""
        self._lap("gradients")

    def update_done(self) -> None:
        """Note that the work of the optimizer and the averages is queued."""
        self._lap("update")

    def step_ended(self) -> None:
        """Note that saves, previews and logging are over."""
        self._lap("rest")

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self.mark
        self.mark = now

    def add(self, numbers: StepNumbers) -> None:
        """Add one step that was not skipped."""
        self.losses += torch.tensor(numbers.losses)
        self.grad_norm += numbers.grad_norm
        self.num_added += 1

    def record(
        self, step: int, *, num_steps: int, lr: float, batch_size: int, mfu_per_speed: float | None
    ) -> dict[str, float]:
        """Return the means over the interval, speeds and the time that is left, as one record of metrics.jsonl.

        All ranks call it; the record names the rank that waited longest for data.

        Args:
            step, num_steps: finished steps, and those of the whole run.
            lr: learning rate of this step.
            batch_size: images of all ranks together.
            mfu_per_speed: share of the devices' peak rate that one image/s takes; None if the peak is not known.
        """
        steps = step - self.first_step
        losses = self.losses / self.num_added if self.num_added else torch.full_like(self.losses, torch.nan)
        elapsed_s = time.perf_counter() - self.started
        everyone = gather_objects((self.seconds["data_wait"] / elapsed_s, peak_memory_gib(self.world.device)))
        waits = [wait for wait, _ in everyone]
        images_per_s = steps * batch_size / elapsed_s
        record = {
            "step": step,
            "loss": weigh(losses, self.loss_terms.values()).item(),
            **{f"loss/{name}": loss for name, loss in zip(self.loss_terms, losses.tolist(), strict=True)},
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
        return record if mfu_per_speed is None else record | {"mfu": images_per_s * mfu_per_speed}


@contextlib.contextmanager
def profiled(span: tuple[int, int] | None, step: int, world: World, folder: Path) -> Iterator[None]:
    """Trace a step of rank 0 into FOLDER/step_N.json, for chrome://tracing, if it lies in the span (first, last)."""
    if span is None or not world.is_main or not span[0] <= step <= span[1]:
        yield
        return
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
