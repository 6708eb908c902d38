"""Processes that read ahead of the main one (torch's DataLoader), and their ends. Read next: batches.py."""

import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from flowar.base.errors import UserError
from flowar.base.failures import StorageError
from flowar.base.files import MIB

Item = TypeVar("Item")

WORKER_TIMEOUT_S = 60  # a reader that is silent for this long, on top of its patience, has died or hangs
BATCHES_AHEAD = 2  # per worker
SHARED_MEMORY = Path("/dev/shm")  # where workers leave batches for the main process


def from_workers(loader: Iterable[Item], source: str, setting: str) -> Iterator[Item]:
    """Yield what a DataLoader gives.

    Raises:
        StorageError: if its workers give nothing in time.
        UserError: if one of them is killed.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            kind = StorageError if "timed out" in str(error) else UserError
            raise kind(
                f"no batch arrived from {source}: {' '.join(str(error).split())}; check its storage and free memory, "
                f"or set {setting}=0 to read without workers"
            ) from error
        yield batch


def leave_stopping_to_main(worker: int) -> None:
    """Have a worker ignore Ctrl-C, which a terminal sends to all processes: the main one still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_shared_memory(workers: int, batch_bytes: int, setting: str) -> None:
    """Raise a UserError where the batches that workers hold ready don't fit: it would end in a bus error."""
    needed = workers * BATCHES_AHEAD * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if needed > free:
        raise UserError(
            f"{setting}={workers} need {needed / MIB:,.0f} MiB of {SHARED_MEMORY}, which has {free / MIB:,.0f} MiB "
            "free; use fewer workers (0 needs none), or give the container more (docker run --shm-size)"
        )
