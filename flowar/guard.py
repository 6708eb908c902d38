"""Which steps went wrong, and what is kept of them. Read next: replay.py, train.py."""

import math
import shutil
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from flowar.config import GuardConfig, TrainConfig, describe_config
from flowar.data import Batch
from flowar.distributed import collect, share, wait_for_all
from flowar.errors import UserError
from flowar.files import write_text
from flowar.parallel import Engine
from flowar.run_folder import ANOMALIES, CONFIG_FILE
from flowar.step import Probe, accumulate, merge_maxima

BATCH_FILE = "batch.pt"
WEIGHTS_FOLDER = "weights"
HISTORY = 100  # good steps that a spike is measured against
LEAST_HISTORY = 20


class Guard:
    """Decides about each step from numbers that all ranks share, so that all decide alike."""

    def __init__(self, config: GuardConfig, recent: Iterable[float] = (), in_a_row: int = 0) -> None:
        self.config = config
        self.recent: deque[float] = deque(recent, maxlen=HISTORY)
        self.in_a_row = in_a_row

    def state(self) -> dict[str, object]:
        """Return what a resumed run goes on with."""
        return {"recent": list(self.recent), "in_a_row": self.in_a_row}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, or None; remembers good ones."""
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


def keep_anomaly(
    engine: Engine,
    batch: Batch,
    step: int,
    number: int,
    losses: Tensor,
    grad_norm: float,
    problem: str,
    config: TrainConfig,
    sizes: dict[str, float],
) -> Path | None:
    """Write a skipped step to RUN_DIR/anomalies, with all that `flowar replay` needs; return the folder.

    Only the first `guard.max_kept` of them, as each holds the weights; None for the others.

    Args:
        engine: whose weights and gradients these are.
        batch: this rank's samples.
        step: for the record.
        number: of the batch.
        losses: per scale, of all ranks.
        grad_norm: of all ranks.
        problem: what is wrong.
        config: of the run.
        sizes: micro_batch_size and latent_multiplier, as `accumulate` takes them.

    Raises:
        UserError: if it can't be written.
    """
    world = engine.world
    root = Path(config.run_dir) / ANOMALIES
    folder = root / f"batch_{number:08d}"
    kept = {path.name for path in root.glob("batch_*")} - {folder.name}
    if share(len(kept)) >= config.guard.max_kept:
        return None
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of the same batch, before the run was killed
    with Probe(engine.model) as probe:
        accumulate(engine, batch, number, config, **sizes)
    engine.skip()
    everyone = collect((batch, probe.activations, probe.gradients))
    weights = {key: value for key, value in engine.state().items() if key.startswith("model.")}
    group = world.control
    try:
        dcp.save(weights, checkpoint_id=folder / WEIGHTS_FOLDER, process_group=group, no_dist=group is None)
    except (OSError, CheckpointException) as error:
        raise UserError(f"step {step}: {problem}; and it can't be kept in {folder}: {error}; make room") from error
    if world.is_main:
        write_text(folder / CONFIG_FILE, describe_config(config))
        record = {
            "step": step,
            "number": number,
            "problem": problem,
            "losses": losses.tolist(),
            "grad_norm": grad_norm,
            "latent_multiplier": sizes["latent_multiplier"],
            "activations": merge_maxima([activations for _, activations, _ in everyone]),
            "gradients": merge_maxima([gradients for _, _, gradients in everyone]),
            **{name: torch.cat([getattr(own, name) for own, _, _ in everyone]) for name in Batch._fields},
        }
        torch.save(record, folder / BATCH_FILE)
    wait_for_all()
    return folder


def load_bundle(folder: Path) -> dict[str, object]:
    """Return the record of a skipped step.

    Raises:
        UserError: if `folder` is none.
    """
    file = folder / BATCH_FILE
    if not file.is_file():
        raise UserError(f"{folder} is no record of a skipped step: it has no {BATCH_FILE}; see RUN_DIR/anomalies")
    return torch.load(file, weights_only=True)
