"""Which of the processes that a launcher started this is, and how they agree. Everyone else asks this file.

Read next: train.py, training/engine.py.
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from flowar.base.errors import EXIT_INTERRUPTED, STOP_SIGNALS, UserError
from flowar.base.files import raise_open_files

T = TypeVar("T")

BACKGROUND_TIMEOUT = timedelta(minutes=30)

SETUP_TIMEOUT = timedelta(minutes=15)  # imports from a slow file system, images of containers, removing old files

LEAVING_KEY, LEAVING_S = "flowar_leaving", 60.0  # counts the ranks that are done; how long rank 0 waits for them

LOST_RANKS = re.compile(
    r"gloo|nccl|timed out|timeout|connection (closed|reset|was)|failed to (recv|listen|connect)|broken pipe|"
    r"address already in use",
    re.IGNORECASE,
)


class World(NamedTuple):
    """The processes of one job, and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None  # gloo, to read and write checkpoints while the training waits

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """Return how many processes the launcher started, as torchrun gives it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_many_processes(verb: str) -> None:
    """Stop where a launcher started several processes: each would do the whole work and write the same files."""
    if world_size() > 1:
        raise UserError(
            f"`flowar {verb}` runs in one process in this version, but WORLD_SIZE={world_size()}; start it once"
        )


def start_world(device: torch.device, *, with_group: bool, timeout: timedelta = SETUP_TIMEOUT) -> World:
    """Return the world; start its process groups where there are several processes or `with_group` asks for it.

    Ranks wait long for each other, until `limit_waiting`.

    Args:
        device: of this process.
        with_group: also for one process.
        timeout: how long they wait.
    """
    if world_size() == 1 and not with_group:
        return World(0, 1, device, None)
    raise_open_files()
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # ranks connect when they first talk, not each with each
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend=backend, timeout=timeout)
    else:
        dist.init_process_group(backend=backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device, _gloo_group(timeout))


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return a new group of all ranks."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert not isinstance(group, int)  # torch's mark for ranks outside of it
    return group


def limit_waiting(timeout_s: float) -> None:
    """Set the timeout of all process groups except the background ones."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group not in _background_groups:
                dist.set_timeout(timedelta(seconds=timeout_s), group)


_background_groups: list[dist.ProcessGroup] = []


def background_group() -> dist.ProcessGroup | None:
    """Return a gloo group of its own for what happens beside the training; all ranks call it alike.

    Groups must not be shared by two things that happen at once. A disk may be slow: it waits for half an hour.
    """
    if not dist.is_initialized():
        return None
    group = _gloo_group(BACKGROUND_TIMEOUT)
    _background_groups.append(group)
    return group


def has_lost_ranks(error: BaseException) -> bool:
    """Return whether an error says that other ranks died, or kept this one waiting for too long."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or LOST_RANKS.search(str(error)) is not None)


def leave_world() -> None:
    """Give up the process groups after an error of this rank alone.

    Ending them would wait for all other ranks, which wait for this one: they notice when it is gone (`exit_with`).
    """
    if world_size() == 1:
        stop_world()


def stop_world() -> None:
    """End the process groups, if there are any; all ranks call it alike."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            _wait_for_leaving()
        dist.destroy_process_group()
        _background_groups.clear()


def _wait_for_leaving() -> None:
    """Have rank 0, which may hold the store, wait until no rank needs it: ranks connect late, in a barrier too."""
    store = dist.distributed_c10d._get_default_store()
    leaving = store.add(LEAVING_KEY, 1)
    give_up = time.monotonic() + LEAVING_S
    while dist.get_rank() == 0 and leaving < dist.get_world_size() and time.monotonic() < give_up:
        time.sleep(0.01)
        leaving = store.add(LEAVING_KEY, 0)


@contextlib.contextmanager
def training_world(
    device: torch.device, *, with_group: bool, verb: str, timeout: str, latest: Callable[[], object]
) -> Iterator[World]:
    """A context that starts the world of a training, and ends it correctly after any error inside.

    Args:
        device: of this process.
        with_group: start process groups for a single process too.
        verb: for messages.
        timeout: the setting that limits how long ranks wait for each other, and its value.
        latest: returns what the same command would resume from, or None.
    """
    world = start_world(device, with_group=with_group)
    try:
        yield world
    except RuntimeError as error:
        if not has_lost_ranks(error):
            raise
        print(
            f"flowar {verb}: rank {world.rank} lost the other ranks: one of them died, or stalled longer than "
            f"{timeout}: {' '.join(str(error).split())[:200]}; the same command resumes from "
            f"{latest() or 'step 0'}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # a save in the background would wait for the other ranks for much longer
    except KeyboardInterrupt:
        resumes = f"the same command resumes from {latest() or 'step 0'}"
        print(f"flowar {verb}: stopped without saving; {resumes}", flush=True)
        os._exit(EXIT_INTERRUPTED)  # a second Ctrl-C must not wait for a save in the background
    except SystemExit:  # raised on all ranks
        stop_world()
        raise
    except Exception:  # raised on this rank alone
        leave_world()
        raise
    stop_world()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of all ranks' `values`, the same on all of them; in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's `value`, any picklable object, on all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value`, any picklable object, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


class StopSignals:
    """Notes which signal asked this process to stop. A context; it acts at the end of a step, when all ranks agree.

    Ctrl-C is one of them, and a second one ends the process at once; but not where torchrun started it, which forwards
    each Ctrl-C although the terminal has already sent it to its processes.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and not dist.is_torchelastic_launched():
            if self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step, then saving; Ctrl-C again ends at once, without saving\n")
        self.asked = number
