"""Claims on pieces of work, as files in a folder that all workers see: a work queue without a server.

A claim on NAME is the file NAME.0. A process that takes it over from a dead holder, or after it was given up, creates
NAME.1, and so on; NAME.done says that the work is done. On every file system that clusters share, only one process
succeeds in creating a file. The holder is the process that created the last one, and nothing is deleted. One listing of
the folder shows what is free, held and done, so that waiting costs each process the same, however many wait.

A holder rewrites its file all the time. If the content has not changed for a lease (by the observer's own clock: the
clocks of the machines need not agree), the holder counts as dead. A process that was only suspended finds out from
`is_mine`; until it checks, two processes may do the same piece.
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
DONE = "done"  # suffix of a name whose work is done, in place of a generation
CLAIMS_FOLDER = "claims"  # its usual name, in the folder of the work
WAIT_S = 1  # between two looks at what others do
LONGEST_WAIT_S = 2  # between two listings of claims, where nothing is free
WATCHED = 8  # claims of others that a waiting process reads between two waits, in turn


@dataclass
class _Sighting:
    """What an observer has seen of somebody's claim; times by its own monotonic clock."""

    content: str
    unchanged_since: float
    looked_at: float
    has_changed: bool = False  # since it was first seen: its holder was alive


# Shared by all `Leases` of this process: one created for each look must not start waiting for a dead holder again.
_sightings: dict[Path, _Sighting] = {}


class Leases:
    """The claims of this process in `folder`; use it as a context, which keeps them alive and gives them up."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self._mine: dict[str, Path] = {}
        self._created: set[str] = set()
        self._listed: dict[str, int] | None = None  # by the last listing: the newest generation of each name
        self._appeared: set[Path] = set()  # claims that were made between two listings: who made them was alive
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
            if self._take(name, generation):
                return True
            if not (self._path(name, generation + 1).exists() or self._is_free(self._path(name, generation))):
                return False
        raise AssertionError("unreachable")

    def _create(self, path: Path) -> None:
        """Create a claim, and the folder if another process removed it (the caller looks again at what is left)."""
        for is_last in (False, True):
            try:
                with path.open("x") as file:
                    file.write(_signature(0))
                return
            except FileNotFoundError:
                if is_last:
                    raise
                self.folder.mkdir(parents=True, exist_ok=True)

    def look(self) -> tuple[dict[str, int], set[str]] | None:
        """Return what one listing of the folder shows: {name: newest generation} and the names that are done.

        None if the folder is gone: all work was done, and another process cleaned up.
        """
        generations: dict[str, int] = {}
        done: set[str] = set()
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name, _, suffix = entry.name.rpartition(".")
                    if suffix == DONE:
                        done.add(name)
                    elif suffix.isdecimal():
                        generations[name] = max(generations.get(name, 0), int(suffix))
        except FileNotFoundError:
            return None
        if self._listed is not None:
            new = (item for item in generations.items() if self._listed.get(item[0], -1) < item[1])
            self._appeared |= {self._path(*item) for item in new}
        self._listed = generations
        return generations, done

    def claim_any(self, names: list[str], generations: dict[str, int]) -> str | None:
        """Return one of `names` that this process has just got, or None if none of those that it tried is free.

        Those that nobody ever claimed come first. Of the others a few are looked at, other ones each time.

        Args:
            names: what is wanted, the first one first, unless others are at work: then from anywhere.
            generations: what `look` has just shown.

        Raises:
            UserError, OSError: as `claim`.
        """
        self._check_alive()
        new = [name for name in names if name not in generations]
        if any(f"{name}.{newest}" not in self._created for name, newest in generations.items()):
            first = random.randrange(len(new)) if new else 0  # a thousand don't all try the same one
            new = new[first:] + new[:first]
        for name in new:
            if self._take(name, 0):
                return name
        held = [name for name in names if name in generations and name not in self._mine]
        for name in random.sample(held, min(WATCHED, len(held))):
            newest = generations[name]
            if self._is_free(self._path(name, newest)) and self._take(name, newest + 1):
                return name
        return None

    def _take(self, name: str, generation: int) -> bool:
        path = self._path(name, generation)
        try:
            self._create(path)
        except FileExistsError:
            return False
        with self._lock:
            self._mine[name] = path
            self._created.add(path.name)
        return True

    def finish(self, name: str) -> None:
        """Say that the work called `name`, which this process holds, is done, and give it up."""
        with contextlib.suppress(FileNotFoundError):  # another process cleaned up
            self.folder.joinpath(f"{name}.{DONE}").touch()
        self.release(name)

    def is_at_work(self, name: str) -> bool:
        """Return whether another process, seen alive, holds `name`, by the last `look` and a `claim` that failed.

        Seen alive: the claim was made since an earlier listing, its holder is a process of this machine, or its content
        has changed.
        """
        newest = (self._listed or {}).get(name)
        if newest is None or name in self._mine:
            return False
        path = self._path(name, newest)
        seen = _sightings.get(path.absolute())
        if seen is None or seen.content == GIVEN_UP:
            return False
        return path in self._appeared or seen.has_changed or _holder_is_here(seen.content)

    def release(self, name: str) -> None:
        """Give up `name`, so that others can claim it."""
        with self._lock:
            path = self._mine.pop(name)
            with contextlib.suppress(FileNotFoundError), path.open("r+") as file:  # gone: another process cleaned up
                file.write(GIVEN_UP)
                file.truncate()

    def release_all(self) -> None:
        """Give up all that this process holds."""
        for name in list(self._mine):
            self.release(name)

    def is_mine(self, name: str) -> bool:
        """Return whether this process still holds `name`; a process that was suspended for a lease may have lost it.

        Raises:
            UserError: if this process can't keep its claims alive.
        """
        self._check_alive()
        path = self._mine.get(name)
        return path is not None and not self._path(name, int(path.suffix[1:]) + 1).exists()

    def holder(self, name: str) -> str:
        """Return who holds `name`, for messages."""
        generations = [path for path in self.folder.glob(f"{name}.*") if path.suffix[1:].isdecimal()]
        generations.sort(key=lambda path: int(path.suffix[1:]))
        # It may be given up while we look, or damaged.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            owner = json.loads(generations[-1].read_text())
            return f"{owner['host']} process {owner['pid']}"
        return "nobody"

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
        is_same = seen is not None and seen.content == content
        since = seen.unchanged_since if seen is not None and is_same else now
        has_changed = seen is not None and (seen.has_changed or not is_same)
        _sightings[path.absolute()] = _Sighting(content, since, now, has_changed)
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
                        continue  # all work is done, and another process cleaned up
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
    is_missing: Callable[[int], bool] | None = None,
    look: Callable[[list[int]], None] = lambda chunks: None,
    idle: Callable[[], bool] = lambda: False,
    wait: bool = True,
) -> Iterator[int]:
    """Yield the chunks that this process claims, one after the other, until all are done; other processes do the rest.

    The caller says of each when it is done: `leases.finish(claim_name(chunk))`. In between others are told by that
    alone; what is really there is looked at before the first chunk and after the last one, and of a claimed chunk.

    Args:
        leases: the claims.
        missing: -> the chunks that are not done yet, by what is there.
        is_missing: chunk -> whether it is one of them; None: by `missing`.
        look: told what is missing, each time.
        idle: called when others hold all that is missing; returns whether it did something, so that it is worth
            looking again at once.
        wait: for what others hold; else this ends.
    """
    wait_s: float = WAIT_S
    while chunks := missing():
        left = {claim_name(chunk): chunk for chunk in chunks}
        outdated: set[str] | None = None  # said to be done before we looked, but they are missing
        while left and (listing := leases.look()) is not None:
            generations, done = listing
            outdated = done & left.keys() if outdated is None else outdated
            for name in done - outdated:
                left.pop(name, None)
            look(list(left.values()))
            free = leases.claim_any(list(left), generations)
            if free is None:
                if not left or idle():
                    continue
                if not wait:
                    return
                time.sleep(wait_s)
                wait_s = min(1.5 * wait_s, LONGEST_WAIT_S)
                continue
            chunk, wait_s = left[free], WAIT_S
            if is_missing(chunk) if is_missing is not None else chunk in missing():
                yield chunk
            else:
                left.pop(free)
                leases.finish(free)  # by another one, who could not say so


def finish_together(
    leases: Leases, is_done: Callable[[], bool], finish: Callable[[], object], *, wait: bool = True
) -> bool:
    """Have one of all processes finish the work; return when it is done, even if some of them die.

    Args:
        leases: the claims; the process that finishes removes them.
        is_done: -> whether there is nothing to finish any more.
        finish: does it.
        wait: for another one that does; else this returns when it is seen at work.

    Returns:
        Whether this process did.
    """
    while not is_done():
        leases.look()
        if not leases.claim("finish"):
            if not wait and leases.is_at_work("finish"):
                return False
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


def _holder_is_here(content: str) -> bool:
    """Return whether the holder is a process of this machine that runs."""
    try:
        owner = json.loads(content)
        return is_of_this_machine(owner) and not process_is_gone(owner)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # half-written or damaged


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
