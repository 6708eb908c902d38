"""Claims on pieces of work, as files in a folder that all workers see: a work queue without a server.

A claim on NAME is the file NAME.0; whoever takes it over from a dead holder creates NAME.1, and so on. Creating a file
succeeds for one process only, on every file system that clusters share, so a piece of work never has two holders. A
holder rewrites its file all the time; where the content has not changed for a lease (by the observer's own clock: the
clocks of the machines need not agree) the holder is dead. Read next: data_prep/encode.py.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from flowar.errors import UserError

BEATS_PER_LEASE = 6
MAX_CLOCK_CHANGE_S = 60  # start times of one process, read before and after the clock was set, differ by less


@dataclass
class _Sighting:
    """What an observer has seen of somebody's claim; times by its own monotonic clock."""

    content: str
    unchanged_since: float
    looked_at: float


class Leases:
    """The claims of this process in `folder`; use it as a context, which keeps them alive and gives them up."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self._mine: dict[str, Path] = {}
        self._seen: dict[str, _Sighting] = {}
        self._failure: OSError | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> "Leases":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._mine):
            self.release(name)

    def claim(self, name: str) -> bool:
        """Return whether this process now holds `name`: nobody did, or the one who did is dead."""
        for generation in itertools.count():
            path = self.folder / f"{name}.{generation}"
            try:
                with path.open("x") as file:
                    file.write(_signature(0))
            except FileExistsError:
                if self._path(name, generation + 1).exists() or self._is_dead(path):
                    continue
                return False
            with self._lock:
                self._mine[name] = path
            return True
        raise AssertionError("unreachable")

    def release(self, name: str) -> None:
        """Give up `name`, so that others can claim it."""
        with self._lock:
            path = self._mine.pop(name)
        path.unlink(missing_ok=True)

    def is_mine(self, name: str) -> bool:
        """Return whether this process still holds `name`; a process that slept for a lease may have lost it.

        Raises:
            UserError: if the claims can't be kept alive.
        """
        if self._failure is not None:
            raise UserError(f"can't keep the claims in {self.folder} alive: {self._failure}")
        path = self._mine[name]
        return path.exists() and not self._path(name, int(path.suffix[1:]) + 1).exists()

    def holder(self, name: str) -> str:
        """Return who holds `name`, for messages."""
        generations = sorted(self.folder.glob(f"{name}.*"), key=lambda path: int(path.suffix[1:]))
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):  # it may go while we look
            signature = json.loads(generations[-1].read_text())
            return f"{signature['host']} process {signature['pid']}"
        return "nobody"

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

    def _is_dead(self, path: Path) -> bool:
        now = time.monotonic()
        seen = self._seen.get(path.name)
        if seen is not None and now - seen.looked_at < self.lease_s / BEATS_PER_LEASE:
            return False  # it was alive a moment ago: spare the file system
        try:
            content = path.read_text()
        except FileNotFoundError:
            return False  # given up just now; the next try will get it
        since = seen.unchanged_since if seen is not None and seen.content == content else now
        self._seen[path.name] = _Sighting(content, since, now)
        return now - since > self.lease_s or _process_is_gone(content)

    def _keep_alive(self) -> None:
        for beat in itertools.count(1):
            if self._ended.wait(self.lease_s / BEATS_PER_LEASE):
                return
            with self._lock:
                try:
                    for path in self._mine.values():
                        with path.open("r+") as file:
                            file.write(_signature(beat))
                except FileNotFoundError:
                    continue  # somebody removed it: is_mine will say so
                except OSError as error:
                    self._failure = error
                    return


def _machine() -> str:
    """Return what two processes have in common if they see each other's process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # outside Linux the name has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


def _signature(beat: int) -> str:
    """Return the content of a claim: who holds it, and a number that grows. As long each time, as it is overwritten."""
    started = psutil.Process().create_time()
    owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": round(started, 3)}
    return json.dumps(owner | {"beat": f"{beat:09d}"})


def _process_is_gone(content: str) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    try:
        owner = json.loads(content)
    except json.JSONDecodeError:
        return False  # half-written: unless its writer is dead it will change
    if owner["machine"] != _machine():
        return False
    try:
        process = psutil.Process(owner["pid"])
        reused = abs(process.create_time() - owner["started"]) > MAX_CLOCK_CHANGE_S
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
