"""Save and resume, with torch.distributed.checkpoint: sharded, in the background, by any number of ranks.

A checkpoint holds tensors by name, in the plain model's shapes, whichever engine wrote it; so any engine with any
number of ranks can read it. The caller decides when to save. Read next: train.py; run_folder.py has the layout.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from flowar.base.distributed import World, background_group, broadcast_object, has_lost_ranks, wait_for_all
from flowar.base.errors import UserError
from flowar.base.failures import Failure, StorageError, failure_of
from flowar.base.files import publish_folder, write_text
from flowar.base.run_folder import (
    AVERAGES,
    CHECKPOINTS,
    MODEL_CONFIG_FILE,
    STATE_FILE,
    Progress,
    average_key,
    checkpoint_step,
    find_latest,
    is_checkpoint,
    list_checkpoints,
    read_progress,
    set_aside,
    step_name,
)
from flowar.config.models import ModelConfig
from flowar.latents.schema import Passport, write_passport
from flowar.models.checkpoint_files import DamagedCheckpointError, HashingWriter, write_checksums
from flowar.training.averages import EMA
from flowar.training.engine import Engine
from flowar.training.owner import Owner

Loaded = TypeVar("Loaded")


class Description(Protocol):
    """What every checkpoint of a run records beside its tensors."""

    def write(self, folder: Path) -> None:
        """Write the small files with the description."""


@dataclasses.dataclass(frozen=True)
class CheckpointContents:
    """What every checkpoint of a model in training records beside its tensors."""

    model: ModelConfig
    passport: Passport

    def write(self, folder: Path) -> None:
        """Write config.json and the passport of the shards."""
        write_text(folder / MODEL_CONFIG_FILE, json.dumps(dataclasses.asdict(self.model), indent=2) + "\n")
        write_passport(self.passport, folder)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which checkpoints are kept when newer ones exist."""

    newest: int | None = None  # how many; None: all
    every_steps: int = 0  # also keep, for good, those at multiples of this; 0: no others


class Checkpoints:
    """The checkpoints (or AVERAGES) that one run writes. All ranks call the same methods at the same steps."""

    def __init__(self, owner: Owner, world: World, contents: Description, kind: str, kept: Kept | None = None) -> None:
        self.owner = owner
        self.run_dir = owner.run_dir
        self.kind = kind
        self.world = world
        self.contents = contents
        self.kept = kept or Kept()
        self._group = background_group()
        self._publisher = ThreadPoolExecutor(1)  # of rank 0, so that nobody waits for a slow disk
        self._pending: tuple[Future[Any], Path] | None = None  # the last save, and its folder

    def save(
        self,
        state: dict[str, Tensor],
        progress: Progress,
        save_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Start a save; returns when the values are copied. Waits for an earlier save first.

        Threads do the rest, including giving the folder its final name and deleting old ones.

        Args:
            state: this rank's part of the tensors, `Engine.state` and the averages.
            progress: how far the run is.
            save_more: writes more files into the folder, before this returns.

        Raises:
            UserError: if this save, or the one before, can't be written; older checkpoints are then intact.
        """
        self.wait()
        folder = self.run_dir / self.kind / step_name(progress.step)
        if broadcast_object(folder.exists()):  # rank 0 checks, as file systems may show ranks different states
            return
        hidden = folder.with_name(f".{folder.name}.{self.owner.token}")
        record = progress.as_record() | {"world_size": self.world.size, "checksums": True}
        try:
            if self.world.is_main:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True, exist_ok=True)  # another rank may have made it
                write_text(hidden / STATE_FILE, json.dumps(record, indent=2) + "\n")
                self.contents.write(hidden)
            group = self._group
            future = dcp.async_save(
                state, storage_writer=HashingWriter(hidden), process_group=group, no_dist=group is None
            )
            assert isinstance(future, Future)  # another process would give another type
            if save_more is not None:
                save_more(hidden)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(folder, error) from error
        self._pending = (self._publisher.submit(self._publish, future, hidden, folder), folder)

    def check(self) -> None:
        """Raise the error of the last save, if it has failed; returns at once. Same errors as `save`."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on disk and, on rank 0, has its final name. Same errors as `save`."""
        if self._pending is None:
            return
        saving, folder = self._pending
        self._pending = None
        try:
            saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(folder, error) from error

    def _publish(self, written: Future[Any], hidden: Path, folder: Path) -> None:
        """Wait until all ranks have written, give the folder its final name, and delete old ones; runs in a thread."""
        written.result()
        if self.world.is_main:
            self.owner.check()
            write_checksums(hidden)
            publish_folder(hidden, folder)
            self._remove_old()

    def _failed(self, folder: Path, error: BaseException) -> BaseException:
        if has_lost_ranks(error):
            return error  # not the disk's fault
        failures = getattr(error, "failures", {})
        problem = next((str(cause[0]) for cause in failures.values()), str(error))
        kind = StorageError if failure_of(error) == Failure.STORAGE else UserError
        return kind(
            f"can't save checkpoint {folder}: {problem}; older checkpoints are intact; free some space or fix the "
            "folder's permissions, then run the same command again"
        )

    def _remove_old(self) -> None:
        """Delete the checkpoints that `kept` doesn't name."""
        for old in list_checkpoints(self.run_dir, self.kind)[: -self.kept.newest if self.kept.newest else 0]:
            if self.kept.every_steps and checkpoint_step(old) % self.kept.every_steps == 0:
                continue
            doomed = old.with_name("." + old.name)  # hide it first, so that nobody reads a half-deleted one
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # if a reader holds files open, the next start deletes them


def whole_state(engine: Engine, ema: EMA) -> dict[str, Tensor]:
    """Return all tensors that a run resumes with, this rank's part."""
    return engine.state() | averages_state(engine, ema, ema.averages)


def averages_state(engine: Engine, ema: EMA, names: Iterable[str]) -> dict[str, Tensor]:
    """Return some of the averages, this rank's part."""
    state: dict[str, Tensor] = {}
    for average in names:
        tensors = engine.to_state(ema.averages[average])
        state |= {average_key(average, name): tensor for name, tensor in tensors.items()}
    return state


def restore(engine: Engine, ema: EMA, folder: Path) -> Progress:
    """Load a checkpoint into engine and averages; return its progress.

    Raises:
        DamagedCheckpointError: on all ranks, if the checkpoint is not what was written.
    """
    engine.load(folder)
    for average, tensors in ema.averages.items():
        engine.load_local(tensors, functools.partial(average_key, average), folder)
    progress = read_progress(folder)
    engine.set_step(progress.updates)
    return progress


def restore_newest(engine: Engine, ema: EMA, run_dir: Path) -> tuple[Progress, Path] | None:
    """Load the newest whole checkpoint; return its progress and folder, or None if there is no checkpoint.

    Raises:
        UserError: as `find_whole`.
    """
    return find_whole(functools.partial(restore, engine, ema), run_dir, engine.world)


def find_whole(load: Callable[[Path], Loaded], run_dir: Path, world: World) -> tuple[Loaded, Path] | None:
    """Load the newest whole checkpoint; return what `load` returns, and the folder. None if there is no checkpoint.

    Rank 0 searches, so that all ranks resume from the same one. Damaged checkpoints are reported and set aside.

    Args:
        load: reads a checkpoint; raises a DamagedCheckpointError, on all ranks, if it is not what was written.
        run_dir: of the run.
        world: all ranks call this.

    Raises:
        UserError: if all checkpoints are damaged; starting with fresh weights would hide the loss.
    """
    damaged = None
    while True:
        latest = broadcast_object(find_latest(run_dir) if world.is_main else None)
        if latest is None and damaged is not None:
            raise UserError(
                f"run_dir={run_dir} has no whole checkpoint left: {damaged}; copy one back from a backup into "
                f"{run_dir / CHECKPOINTS}, or start again in another run_dir"
            )
        if latest is None:
            return None
        try:
            return load(latest), latest
        except DamagedCheckpointError as error:
            damaged = error
            if world.is_main:
                print(f"DAMAGED: {error}; moved to {set_aside(latest)}, trying the checkpoint before it")
            wait_for_all()


def remove_averages_after(run_dir: Path, step: int) -> None:
    """Delete the averages that were kept after `step`, which the run rolled back to."""
    for folder in list_checkpoints(run_dir, AVERAGES):
        if checkpoint_step(folder) > step:
            shutil.rmtree(folder)


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a process left when it died while saving or deleting; set aside incomplete checkpoints."""
    for kind in (CHECKPOINTS, AVERAGES):
        for entry in (run_dir / kind).glob(".step_*"):
            shutil.rmtree(entry)
        for entry in (run_dir / kind).glob("step_*"):
            if not is_checkpoint(entry):
                print(f"DAMAGED: {entry} is an incomplete checkpoint; moved to {set_aside(entry)}")
