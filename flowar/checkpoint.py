"""Save and resume, with torch.distributed.checkpoint: sharded, in the background, by any number of ranks.

A checkpoint holds tensors by name, of the plain model's shapes, whatever engine wrote it; so any engine, and any number
of ranks, reads it. Does not decide when to save. Read next: train.py; run_folder.py has the layout.
"""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException

from data_prep.schema import Passport, write_passport
from flowar.config import ModelConfig
from flowar.distributed import World, background_group, has_lost_ranks
from flowar.errors import UserError
from flowar.files import publish_folder, write_text
from flowar.owner import Owner
from flowar.run_folder import (
    AVERAGES,
    CHECKPOINTS,
    STATE_FILE,
    checkpoint_step,
    list_checkpoints,
    step_name,
)

MODEL_CONFIG_FILE = "config.json"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is meant to be


class Checkpoints:
    """The checkpoints (or AVERAGES) that one run writes. All ranks call the same methods at the same steps."""

    def __init__(
        self,
        owner: Owner,
        world: World,
        *,
        model: ModelConfig,
        passport: Passport,
        kind: str = CHECKPOINTS,
        keep: int | None = None,
        keep_every_steps: int = 0,
    ) -> None:
        self.owner = owner
        self.run_dir = owner.run_dir
        self.kind = kind
        self.world = world
        self.model = model
        self.passport = passport
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self._group = background_group()
        self._pending: tuple[Future | None, Path, Path] | None = None

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        progress: dict[str, object],
        save_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Begin to save; returns when the values are copied. An earlier save is finished first.

        Args:
            step: number of finished steps.
            state: this rank's part of the tensors, `Engine.state` and the averages.
            progress: what else a run goes on with; JSON.
            save_more: writes files of its own into the folder, before this returns.

        Raises:
            UserError: if it, or the one before, can't be written; the older checkpoints are then still there.
        """
        self.wait()
        folder = self.run_dir / self.kind / step_name(step)
        if folder.exists():
            return
        hidden = folder.with_name(f".{folder.name}.{self.owner.token}")
        record = {"step": step, "world_size": self.world.size, **progress}
        try:
            if self.world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True, exist_ok=True)  # others may be quicker to make it
                write_text(hidden / STATE_FILE, json.dumps(record, indent=2) + "\n")
                write_text(hidden / MODEL_CONFIG_FILE, json.dumps(dataclasses.asdict(self.model), indent=2) + "\n")
                write_passport(self.passport, hidden)
            group = self._group
            future = dcp.async_save(state, checkpoint_id=hidden, process_group=group, no_dist=group is None)
            if save_more is not None:
                save_more(hidden)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(folder, error) from error
        self._pending = (future, hidden, folder)

    def finish_if_written(self) -> None:
        """Give the last save its name if all ranks have written it; otherwise return at once. Errors as `save`."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk and has its name. Errors as `save`."""
        if self._pending is None:
            return
        future, hidden, folder = self._pending
        self._pending = None
        try:
            future.result()
            if self.world.is_main:
                self.owner.check()
                publish_folder(hidden, folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(folder, error) from error
        if self.world.is_main:
            self._remove_old()

    def _failed(self, folder: Path, error: BaseException) -> BaseException:
        if has_lost_ranks(error):
            return error  # not the disk's fault
        failures = getattr(error, "failures", {})
        problem = next((str(cause[0]) for cause in failures.values()), str(error))
        return UserError(
            f"can't save checkpoint {folder}: {problem}; the older checkpoints are whole; make room or mend the folder "
            "and start the same command again"
        )

    def _remove_old(self) -> None:
        """Delete all but the newest `keep` and, for good, those at multiples of `keep_every_steps`."""
        for old in list_checkpoints(self.run_dir, self.kind)[: -self.keep if self.keep else 0]:
            if self.keep_every_steps and checkpoint_step(old) % self.keep_every_steps == 0:
                continue
            doomed = old.with_name("." + old.name)  # a name that no one takes for complete, before anything is deleted
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # somebody may be reading it; the next start removes the rest


def remove_averages_after(run_dir: Path, step: int) -> None:
    """Delete the averages that were kept after `step`: the run went back there."""
    for folder in list_checkpoints(run_dir, AVERAGES):
        if checkpoint_step(folder) > step:
            shutil.rmtree(folder)


def load_state(state: dict[str, Tensor], folder: Path, group: ProcessGroup | None = None) -> None:
    """Fill tensors from a checkpoint, whoever wrote it; with the ranks of `group`, or alone.

    Raises:
        UserError: if one of them is not in it, or of another shape.
    """
    try:
        dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
        if has_lost_ranks(error):
            raise
        raise UserError(f"checkpoint {folder} can't be read: {' '.join(str(error).split())[:300]}") from error


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a process that died while saving or deleting has left."""
    for kind in (CHECKPOINTS, AVERAGES):
        for entry in (run_dir / kind).glob(".step_*"):
            shutil.rmtree(entry)
