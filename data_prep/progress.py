"""How far `flowar prepare` is: bars in a terminal, lines in a log file. Read next: encode.py."""

import os
import socket
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class PrepareProgress:
    """Images of this worker and of all of them, with images/s and the time that is left. A context."""

    def __init__(self, num_images: int, chunk_images: int, done: int) -> None:
        self.num_images = num_images
        self.done_before = self.done = done
        self.here = self.here_in_chunk = 0
        self.waits: list[str] = []
        self.started = time.monotonic()
        self.worker = f"{socket.gethostname()} process {os.getpid()}"
        console = Console()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.total_bar = self.bars.add_task("all workers", total=num_images, completed=done, note="")
        self.chunk_bar = self.bars.add_task("this worker's chunk", total=chunk_images, note="")

    def __enter__(self) -> "PrepareProgress":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bars.stop()
        if kind is None:
            print(f"{self.worker} encoded {self.here:,} images, {self._speed(self.here):.1f} images/s")

    def advance(self, images: int) -> None:
        """Note images that this worker has encoded."""
        self.waits = []
        self.here += images
        self.here_in_chunk += images
        note = f"{self._speed(self.here):.1f} images/s"
        self.bars.update(self.chunk_bar, completed=self.here_in_chunk, note=note)
        self.bars.update(self.total_bar, completed=self.done + self.here_in_chunk, note=self._total_note())

    def chunk_done(self, chunk: int, done: int) -> None:
        """Note a finished chunk, and how many images all workers together have finished."""
        self.done, self.here_in_chunk = done, 0
        if self.bars.disable:
            print(
                f"{self.worker}: chunk {chunk} done, {self._speed(self.here):.1f} images/s; all workers: {done:,} of "
                f"{self.num_images:,} images, {self._total_note()}",
                flush=True,
            )

    def wait_for(self, holders: list[str]) -> None:
        """Note who is waited for; said once."""
        if holders != self.waits:
            self.waits = holders
            self.bars.console.print(f"waiting for {', '.join(holders)}", highlight=False, markup=False, emoji=False)

    def _speed(self, images: int) -> float:
        return images / max(time.monotonic() - self.started, 1e-9)

    def _total_note(self) -> str:
        done = self.done + self.here_in_chunk
        speed = self._speed(done - self.done_before)
        left = timedelta(seconds=round((self.num_images - done) / speed)) if speed else "?"
        return f"{speed:.1f} images/s, {left} left"
