"""Claims on pieces of work, as files in a folder that all workers see: a work queue without a server.

A claim on NAME is the file NAME.0; whoever takes it over from a dead holder, or after it was given up, creates NAME.1,
and so on. Creating a file succeeds for one process only, on every file system that clusters share; the holder is who
created the last one, and nothing is deleted. A holder rewrites its file all the time: where the content has not changed
for a lease (by the observer's own clock: the clocks of the machines need not agree) the holder is taken for dead. A
process that was only suspended finds out from `is_mine`; until it checks, two processes may do the same piece.
Read next: data_prep/encode.py.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from flowar.base.errors import UserError

BEATS_PER_LEASE = 6
MAX_CLOCK_CHANGE_S = 60  # start times of one process, read before and after the clock was set, differ by less
GIVEN_UP = "given up"
CLAIMS_FOLDER = "claims"  # its usual name, in the folder of the work
WAIT_S = 1  # between two looks at what others do


@dataclass
class _Sighting:
    """What an observer has seen of somebody's claim; times by its own monotonic clock."""

    content: str
    unchanged_since: float
    looked_at: float


# Of all `Leases` of this process: one that is made anew for each look must not begin to wait for a dead holder anew.
_sightings: dict[Path, _Sighting] = {}


class Leases:
    """The claims of this process in `folder`; use it as a context, which keeps them alive and gives them up."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self._mine: dict[str, Path] = {}
        self._created: set[str] = set()
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._last_beat = self._last_success = time.monotonic()
        self._failure: OSError | None = None

    def __enter__(self) -> "Leases":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.release_all()

    def claim(self, name: str) -> bool:
        """Return whether this process has just got `name`: nobody held it, or the one who did is dead.

        Raises:
            UserError: if this process can't keep its claims alive.
            OSError: if the folder can't be written.
        """
        self._check_alive()
        for generation in itertools.count():
            path = self._path(name, generation)
            try:
                self._create(path)
            except FileExistsError:
                if self._path(name, generation + 1).exists() or self._is_free(path):
                    continue
                return False
            with self._lock:
                self._mine[name] = path
                self._created.add(path.name)
            return True
        raise AssertionError("unreachable")

    def _create(self, path: Path) -> None:
        """Create a claim; the folder too, if somebody has tidied up (whoever claims looks again at what is left)."""
        for is_last in (False, True):
            try:
                with path.open("x") as file:
                    file.write(_signature(0))
                return
            except FileNotFoundError:
                if is_last:
                    raise
                self.folder.mkdir(parents=True, exist_ok=True)

    def release(self, name: str) -> None:
        """Give up `name`, so that others can claim it."""
        with self._lock:
            path = self._mine.pop(name)
            with contextlib.suppress(FileNotFoundError), path.open("r+") as file:  # gone: somebody tidied up
                file.write(GIVEN_UP)
                file.truncate()

    def release_all(self) -> None:
        """Give up all that this process holds."""
        for name in list(self._mine):
            self.release(name)

    def is_mine(self, name: str) -> bool:
        """Return whether this process still holds `name`; one that slept for a lease may have lost it.

        Raises:
            UserError: if this process can't keep its claims alive.
        """
        self._check_alive()
        path = self._mine.get(name)
        return path is not None and not self._path(name, int(path.suffix[1:]) + 1).exists()

    def holder(self, name: str) -> str:
        """Return who holds `name`, for messages."""
        generations = sorted(self.folder.glob(f"{name}.*"), key=lambda path: int(path.suffix[1:]))
        # It may be given up while we look, or damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            owner = json.loads(generations[-1].read_text())
            return f"{owner['host']} process {owner['pid']}"
        return "nobody"

    def has_others(self) -> bool:
        """Return whether another process has ever claimed a chunk here."""
        with contextlib.suppress(FileNotFoundError):
            return any(path.name[0].isdecimal() and path.name not in self._created for path in self.folder.iterdir())
        return False

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

    def _is_free(self, path: Path) -> bool:
        """Return whether the holder has given up or is dead."""
        now = time.monotonic()
        longest_gap = 2 * self.lease_s / BEATS_PER_LEASE
        if now - self._last_beat > longest_gap:
            _sightings.clear()  # this process slept, and the others may have slept with it
        seen = _sightings.get(path.absolute())
        is_ours = seen is not None and seen.looked_at >= self._began  # else it is of an earlier `Leases` here
        if seen is not None and is_ours and now - seen.looked_at < self.lease_s / BEATS_PER_LEASE:
            return False  # it was alive a moment ago: spare the file system
        if seen is not None and not is_ours and now - seen.looked_at > longest_gap:
            seen = None  # this process may have slept since
        try:
            content = path.read_text(errors="replace")
        except FileNotFoundError:
            return False  # all work is done, and somebody tidies up
        since = seen.unchanged_since if seen is not None and seen.content == content else now
        _sightings[path.absolute()] = _Sighting(content, since, now)
        return content == GIVEN_UP or now - since > self.lease_s or _holder_is_gone(content)

    def _check_alive(self) -> None:
        if self._failure is not None and time.monotonic() - self._last_success > self.lease_s:
            raise UserError(f"can't keep the claims in {self.folder} alive: {self._failure}") from self._failure

    def _keep_alive(self) -> None:
        for beat in itertools.count(1):
            ended = self._ended.wait(self.lease_s / BEATS_PER_LEASE)
            if ended:
                return
            failure = None
            with self._lock:
                for path in self._mine.values():
                    try:
                        with path.open("r+") as file:
                            file.write(_signature(beat))
                    except FileNotFoundError:
                        continue  # all work is done, and somebody tidied up
                    except OSError as error:
                        failure = error  # `claim` and `is_mine` say so, if it lasts for a lease
            self._last_beat = time.monotonic()
            self._failure = failure
            if failure is None:
                self._last_success = self._last_beat


def claimed_chunks(
    leases: Leases,
    missing: Callable[[], list[int]],
    *,
    look: Callable[[list[int]], None] = lambda chunks: None,
    idle: Callable[[], bool] = lambda: False,
    wait: bool = True,
) -> Iterator[int]:
    """Yield one chunk after the other that this process has just claimed, until none is missing, whoever did them.

    The caller gives up each claim (`leases.release(claim_name(chunk))`) when the chunk is done.

    Args:
        leases: the claims.
        missing: -> the chunks that are not done yet.
        look: told what is missing, each time.
        idle: called when others hold all that is missing; returns whether it did something, so that it is worth
            looking again at once.
        wait: for what others hold; else this ends.
    """
    while chunks := missing():
        look(chunks)
        claimed = claim_one(leases, chunks)
        if claimed is None:
            if idle():
                continue
            if not wait:
                return
            time.sleep(WAIT_S)
        elif claimed in missing():
            yield claimed
        else:
            leases.release(claim_name(claimed))  # done by another one while we looked


def claim_one(leases: Leases, chunks: list[int]) -> int | None:
    """Return a chunk that this process has just claimed, or None if others hold all of them."""
    first = random.randrange(len(chunks)) if leases.has_others() else 0  # a thousand don't all try the same chunk
    return next((chunk for chunk in chunks[first:] + chunks[:first] if leases.claim(claim_name(chunk))), None)


def finish_together(leases: Leases, is_done: Callable[[], bool], finish: Callable[[], object]) -> bool:
    """Have one of all processes finish; return when that is done, whoever did it and whoever died at it.

    Returns:
        Whether this process did.
    """
    while not is_done():
        if not leases.claim("finish"):
            time.sleep(WAIT_S)
        elif not is_done():
            finish()
            shutil.rmtree(leases.folder, ignore_errors=True)
            return True
    return False


def claim_name(chunk: int) -> str:
    """Return the name under which a chunk is claimed."""
    return f"{chunk:06d}"


def any_live(folder: Path) -> bool:
    """Return whether a claim in a folder, which may not exist, is held by a process that may be alive."""
    held: dict[str, tuple[int, Path]] = {}
    with contextlib.suppress(OSError):  # nobody claims, or somebody tidies up
        for path in folder.iterdir():
            if path.suffix[1:].isdecimal():
                held[path.stem] = max(held.get(path.stem, (-1, path)), (int(path.suffix[1:]), path))
        contents = [path.read_text(errors="replace") for _, path in held.values()]
        return any(content != GIVEN_UP and not _holder_is_gone(content) for content in contents)
    return False


@cache
def _machine() -> str:
    """Return what two processes have in common if they see each other's process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # outside Linux the name has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


def _signature(beat: int) -> str:
    """Return the content of a claim: who holds it, and a number that grows. As long each time, as it is overwritten."""
    return json.dumps(describe_process() | {"beat": f"{beat:09d}"})


def _holder_is_gone(content: str) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    try:
        return process_is_gone(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # half-written or damaged: unless its writer is dead it will change


def describe_process() -> dict[str, Any]:
    """Return what tells this process from all others, on this machine and elsewhere."""
    started = f"{psutil.Process().create_time():.3f}"
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": started}


def is_of_this_machine(owner: dict[str, Any]) -> bool:
    """Return whether a process that described itself so can be looked up here."""
    return bool(owner["machine"] == _machine())


def process_is_gone(owner: dict[str, Any]) -> bool:
    """Return whether a process that described itself so was one of this machine, and has ended."""
    if not is_of_this_machine(owner):
        return False
    try:
        process = psutil.Process(owner["pid"])
        reused = abs(process.create_time() - float(owner["started"])) > MAX_CLOCK_CHANGE_S
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
