"""Detect steps that went wrong, and keep what is needed to replay them. Read next: replay.py, train.py."""

import dataclasses
import math
import shutil
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from flowar.base.distributed import broadcast_object, gather_objects, wait_for_all
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import ANOMALIES, CONFIG_FILE, Progress
from flowar.base.tensors import load_tensors, save_tensors
from flowar.config.load import save_described
from flowar.config.training import GuardConfig, TrainConfig
from flowar.latents.batches import Batch
from flowar.models.build import family_of
from flowar.models.checkpoint_files import HashingWriter, write_checksums
from flowar.models.family import Model
from flowar.training.engine import Engine
from flowar.training.step import StepNumbers, StepSettings, TrainingInputs, accumulate

ANOMALY_FILE, BATCH_FILE = "anomaly.json", "batch.safetensors"
WEIGHTS_FOLDER = "weights"
HISTORY = 100  # good steps that a spike is measured against
LEAST_HISTORY = 20


class Guard:
    """Judges each step from numbers that all ranks share, so that all ranks decide the same."""

    def __init__(self, config: GuardConfig, progress: Progress) -> None:
        self.config = config
        self.recent: deque[float] = deque(progress.recent_losses, maxlen=HISTORY)
        self.in_a_row = progress.bad_in_a_row

    def note_in(self, progress: Progress) -> Progress:
        """Return the progress of a run with the state that the guard needs to resume."""
        return dataclasses.replace(progress, recent_losses=tuple(self.recent), bad_in_a_row=self.in_a_row)

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, or None; remembers the losses of good steps."""
        problem = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            problem = f"loss {loss} and gradient norm {grad_norm} are not both finite"
        elif self.config.spike_factor and len(self.recent) >= LEAST_HISTORY:
            usual = statistics.median(self.recent)
            if loss > self.config.spike_factor * usual:
                problem = f"loss {loss:.4g} is more than {self.config.spike_factor:g} times the usual {usual:.4g}"
        if problem is None:
            self.recent.append(loss)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
        return problem


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """A step that went wrong."""

    step: int
    problem: str
    numbers: StepNumbers


def keep_anomaly(
    engine: Engine, inputs: TrainingInputs, anomaly: Anomaly, settings: StepSettings, config: TrainConfig
) -> Path | None:
    """Write a skipped step to RUN_DIR/anomalies, with all that `flowar replay` needs; return the folder.

    Only the first `guard.max_kept` skipped steps are written, as each holds the weights; returns None for the others.

    Args:
        engine: with the weights and gradients of the step.
        inputs: this rank's samples.
        anomaly: what went wrong.
        settings: of the step.
        config: of the run.

    Raises:
        UserError: if the folder can't be written.
    """
    world = engine.world
    root = Path(config.run_dir) / ANOMALIES
    folder = root / f"batch_{inputs.number:08d}"
    kept = {path.name for path in root.glob("batch_*")} - {folder.name}
    if broadcast_object(len(kept)) >= config.guard.max_kept:
        return None
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # left by the same batch before the run was killed
    with BlockMaxima(engine.model) as maxima:
        accumulate(engine, inputs, settings)
    engine.skip()
    everyone = gather_objects((inputs.batch, maxima.activations, maxima.gradients))
    group = world.control
    try:
        dcp.save(
            engine.weights(),
            storage_writer=HashingWriter(folder / WEIGHTS_FOLDER),
            process_group=group,
            no_dist=group is None,
        )
    except (OSError, CheckpointException) as error:
        raise UserError(
            f"step {anomaly.step}: {anomaly.problem}; and the step can't be kept in {folder}: {error}; free some "
            "space, or set guard.max_kept=0"
        ) from error
    if world.is_main:
        write_checksums(folder / WEIGHTS_FOLDER)
        tensors = {name: torch.cat([getattr(part, name) for part, _, _ in everyone]) for name in Batch._fields}
        save_tensors(tensors, folder / BATCH_FILE)
        save_described(config, folder / CONFIG_FILE)
        record = {
            "step": anomaly.step,
            "number": inputs.number,
            "problem": anomaly.problem,
            "losses": anomaly.numbers.losses,
            "grad_norm": anomaly.numbers.grad_norm,
            "latent_scale": settings.latent_scale,
            "activations": merge_maxima([activations for _, activations, _ in everyone]),
            "gradients": merge_maxima([gradients for _, _, gradients in everyone]),
        }
        write_record(folder / ANOMALY_FILE, record)  # last: it marks the folder as complete
    wait_for_all()
    return folder


def load_bundle(folder: Path) -> dict[str, Any]:
    """Return the record of a skipped step.

    Raises:
        UserError: if `folder` is not a record of a skipped step.
    """
    if not (folder / ANOMALY_FILE).is_file():
        raise UserError(
            f"{folder} must be the record of a skipped step, but has no {ANOMALY_FILE}; see RUN_DIR/anomalies"
        )
    cure = "it can't be replayed; choose another one"
    bundle = read_record(folder / ANOMALY_FILE, cure, ("step", "number", "problem", "losses", "grad_norm"))
    return bundle | load_tensors(folder / BATCH_FILE, cure)


class BlockMaxima:
    """Largest activations and gradients of every block during one forward and backward pass. A context manager."""

    def __init__(self, model: Model) -> None:
        blocks = family_of(model.config).blocks(model)
        self.blocks = {name: module for name, module in model.named_modules() if any(module is b for b in blocks)}
        self.activations: dict[str, float] = {}
        self.gradients: dict[str, float] = {}

    def __enter__(self) -> "BlockMaxima":
        self._handles = []
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.activations[name] = max_abs(tensor, self.activations.get(name, 0.0))
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._note_gradient(name, grad))

        return note

    def _note_gradient(self, name: str, grad: Tensor) -> None:
        self.gradients[name] = max_abs(grad, self.gradients.get(name, 0.0))


def max_abs(tensor: Tensor, before: float) -> float:
    """Return the larger of `before` and the largest magnitude in the tensor; nan if the tensor has one."""
    found = tensor.detach().abs().amax().item()
    return before if found <= before else found


def merge_maxima(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return the maxima over several ranks; nan wins."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) if value <= merged.get(name, 0.0) else value
    return merged
