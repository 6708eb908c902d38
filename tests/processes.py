"""Real processes, quickly: each is forked from one server that has imported everything already. And their deaths.

A process has one fork server, which imports once, when it starts; so this is the only list of what it imports. Deaths
are told in events of the process itself, not in seconds: they come on a fast machine as on a slow one.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

PRELOADED = [
    "deepspeed",
    "diffusers",
    "streaming",
    "torch_fidelity",
    "torchvision",
    "flowar.evaluate",
    "flowar.sweep",
    "flowar.train",
    "flowar.training.torch_engine",
    "flowar.training.zero_engine",
    "data_prep.encode",
    "data_prep.train_vae",
    "tests.processes",
    "tests.warm",
]
PATIENCE_S = 600  # for what is sure to come; a process that hangs fails its test
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}  # audit events, of sys.addaudithook
MOST_CALLS = 30


@dataclasses.dataclass(frozen=True)
class Death:
    """A process's end by its own hand: a signal at its n-th use of a file in a folder, or a few calls after that.

    So it dies before, while and after it writes: with a file half-written, or one that has its name but was not noted.
    """

    at: int  # of the uses of files whose path begins with `below`, from 1
    below: str
    calls: int = 0  # and so many Python calls later, in the same thread, or at the next use
    signal: int = signal.SIGKILL
    pid: int = 0  # another process whose end it is; 0: its own

    def arm(self) -> None:
        """Begin to count."""
        uses = 0
        pid = os.getpid()

        def die() -> None:
            if os.getpid() == pid:  # and not one that it forked
                os.kill(self.pid or pid, self.signal)

        def count_calls(frame: object, event: str, argument: object) -> None:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                sys.setprofile(None)
                die()

        def count_uses(event: str, arguments: tuple) -> None:
            nonlocal uses
            if event not in CHANGES or not str(arguments[0]).startswith(self.below):
                return
            uses += 1
            if uses == self.at and self.calls:
                sys.setprofile(count_calls)
            elif uses == self.at + bool(self.calls):
                die()

        calls_left = self.calls
        sys.addaudithook(count_uses)


def draw_deaths(
    count: int, most: int, below: Path, *, least: int = 1, seed: int = 0, signals: tuple[int, ...] = (signal.SIGKILL,)
) -> list[Death]:
    """Return so many deaths at random moments, each within the first `most` uses of files below a path."""
    draw = random.Random(seed)
    return [
        Death(draw.randint(least, most - 1), str(below), draw.randint(0, MOST_CALLS), draw.choice(signals))
        for _ in range(count)
    ]


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Return where processes, and their queues, come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(
    target: Callable,
    *arguments: object,
    log: Path,
    environment: dict[str, object] | None = None,
    death: Death | None = None,
) -> BaseProcess:
    """Return a started process with this one's environment and one thread, whose output is added to a log."""
    whole = os.environ | {key: str(value) for key, value in (environment or {}).items()}
    process = fork_context().Process(target=_enter, args=(target, arguments, dict(whole), log, death))
    process.start()
    return process


def _enter(target: Callable, arguments: tuple, environment: dict[str, str], log: Path, death: Death | None) -> None:
    os.environ.clear()
    os.environ |= environment
    output = log.open("a", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1)
    if death is not None:
        death.arm()
    target(*arguments)


def start_ranks(
    target: Callable,
    *arguments: object,
    world_size: int,
    log: Path,
    deaths: dict[int, Death] | None = None,
    last_ones: Death | None = None,
) -> list[BaseProcess]:
    """Return the started processes of one job, as torchrun would start them.

    Args:
        target: what each of them calls.
        arguments: with these.
        world_size: how many they are.
        log: of all of them.
        deaths: of some ranks.
        last_ones: that of the last rank, by the hand of the first.
    """
    job = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    deaths, ranks = dict(deaths or {}), []
    for rank in reversed(range(world_size)):
        if rank == 0 and last_ones is not None:
            deaths[0] = dataclasses.replace(last_ones, pid=ranks[-1].pid if ranks else 0)
        place = job | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.insert(0, start(target, *arguments, log=log, environment=place, death=deaths.get(rank)))
    return ranks


def run_ranks(target: Callable, *arguments: object, world_size: int, log: Path) -> None:
    """Run a job to its end, which has to be a good one."""
    join(start_ranks(target, *arguments, world_size=world_size, log=log), log)


def join(processes: list[BaseProcess], log: Path, code: int = 0) -> None:
    """Wait until all have ended, all of them with this exit code."""
    for process in processes:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in processes]
    stop(processes)
    assert codes == [code] * len(processes), f"{codes}\n{log.read_text()[-3000:]}"


def stop(processes: list[BaseProcess]) -> None:
    """End what still runs, with SIGKILL."""
    for process in processes:
        process.kill()
        process.join()


def wait_until(is_so: Callable[[], object], processes: list[BaseProcess], log: Path) -> None:
    """Wait for something that some of these processes will bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        alive = any(process.is_alive() for process in processes)
        assert (alive or is_so()) and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def run_with_deaths(target: Callable, *arguments: object, num_workers: int, deaths: list[Death], log: Path) -> None:
    """Have workers die at their work, each of these deaths once, and others that take their places end it well.

    All that work before the last death have one themselves: so the work, if it is more than they can do, can't end
    before they do, however slow one of them and however quick the others are.
    """
    left, working = list(deaths), []
    while left or working:
        while left and len(working) < num_workers:
            death = left.pop(0)
            working.append((death, start(target, *arguments, log=log, death=death)))
        multiprocessing.connection.wait([process.sentinel for _, process in working], PATIENCE_S)
        ended = [(death, process) for death, process in working if not process.is_alive()]
        assert ended, log.read_text()[-3000:]
        for death, process in ended:
            process.join()
            is_as_told = process.exitcode == -death.signal
            if not is_as_told:
                stop([process for _, process in working])
            assert is_as_told, f"{death}, but exit code {process.exitcode}\n{log.read_text()[-3000:]}"
            working.remove((death, process))
    join([start(target, *arguments, log=log) for _ in range(num_workers)], log)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
