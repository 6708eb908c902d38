"""Share a sampling job among any number of processes, by claims. Read next: images.py for where images go.

evaluation/store.py has the other sink, which keeps only features of the images.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flowar.base.devices import decoding_precision, drawing_precision
from flowar.base.errors import UserError
from flowar.base.leases import CLAIMS_FOLDER, Leases, claim_name, claimed_chunks, finish_together
from flowar.base.seeding import StepNoise, draw_image_noise
from flowar.config.drawing import SampleConfig
from flowar.models.build import family_of
from flowar.sampling.job import (
    SamplingJob,
    agree_on_samples,
    check_not_fewer,
    check_same_samples,
    describe_samples,
    open_job,
)
from flowar.sampling.weights import find_weights, keep_weights, remove_kept

WRITER_THREADS = 4


class Sink(Protocol):
    """Where drawn images go. `str()` describes the place, for messages."""

    def start(self) -> None:
        """Make the folder."""

    def missing_chunks(self) -> list[int]:
        """Return the chunks that are not complete."""

    def is_missing(self, chunk: int) -> bool:
        """Return whether a chunk is not complete; cheaper than `missing_chunks`."""

    def needs(self, numbers: range) -> bool:
        """Return whether any of these images, one batch of a chunk, is missing."""

    def add(self, decoded: Tensor, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Take images (B, 3, H, W) in [-1, 1] of one chunk; return the writes that run in the background.

        Raises:
            UserError: if an image is not finite; the returned futures may raise it instead.
        """

    def end_chunk(self, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Write the rest of the chunk whose images were added."""

    def is_finished(self) -> bool:
        """Return whether everything exists, including what `finish` makes."""

    def finish(self) -> None:
        """Make what needs all images; one process does this at the end."""


def draw_samples(config: SampleConfig, make_sink: Callable[[SamplingJob], Sink], dry_run: bool = False) -> None:
    """Draw the missing images, together with all other processes that have the same settings.

    Args:
        config: the settings.
        make_sink: job -> where its images go.
        dry_run: only check, and print what would be done.

    Raises:
        UserError: if something is missing or does not fit, or the folder holds images drawn with other settings.
    """
    job = open_job(config, find_weights(config) if dry_run else keep_weights(config))
    draw_job(job, make_sink(job), dry_run)


def draw_job(job: SamplingJob, sink: Sink, dry_run: bool = False) -> None:
    """Draw the missing images of a job; see `draw_samples`."""
    config = job.config
    check_same_samples(job.out_dir, describe_samples(job))
    check_not_fewer(job.out_dir, config.num_images)
    missing = sum(len(job.chunk(chunk)) for chunk in sink.missing_chunks())
    print(
        f"{config.num_images:,} images, {len(set(job.classes)):,} classes from {job.weights.folder}, "
        f"{missing:,} still to draw"
    )
    if not dry_run:
        draw_missing(job, sink)


def draw_missing(job: SamplingJob, sink: Sink, *, wait: bool = True) -> bool:
    """Draw what is missing, sharing the work with other processes, and finish; return whether this process drew any.

    If another process is already finishing, this one leaves, as finishing needs only one.

    Args:
        job: what to draw.
        sink: where it goes.
        wait: whether to wait until other processes have drawn the rest.

    Raises:
        UserError: if the folder can't be written.
    """
    try:
        job.out_dir.mkdir(parents=True, exist_ok=True)
        with Leases(job.out_dir / CLAIMS_FOLDER, job.config.lease_s) as leases:
            agree_on_samples(job, leases)
            sink.start()
            has_drawn = draw_chunks(job, sink, leases, wait=wait)
            if wait:
                finish_together(leases, sink.is_finished, sink.finish, wait=False)
                if sink.is_finished():
                    remove_kept(job.out_dir)
                    shutil.rmtree(leases.folder, ignore_errors=True)
                    print(f"{job.config.num_images:,} {sink}")
                else:
                    print(f"{job.config.num_images:,} images are drawn; {leases.holder('finish')} is finishing them")
            return has_drawn
    except OSError as error:
        raise UserError(f"can't write to {job.out_dir}: {error}; fix that and run the same command again") from error


def draw_chunks(job: SamplingJob, sink: Sink, leases: Leases, *, wait: bool) -> bool:
    """Claim chunks and draw them until every image exists, whichever process drew it.

    Returns whether this process drew any. Without `wait` it returns before other processes have drawn their chunks.
    Threads check and write the images of one chunk while the next is drawn.
    """
    total = job.config.num_images
    writing: list[tuple[int, list[Future[None]]]] = []  # claimed chunks whose images are still being written
    has_drawn = False

    def settle(keep: int) -> bool:
        """Wait until all but `keep` chunks are written, and release their claims; return whether there were any."""
        has_settled = len(writing) > keep
        while len(writing) > keep:
            chunk, writes = writing.pop(0)
            for write in writes:
                write.result()
            leases.finish(claim_name(chunk))
        return has_settled

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    bar = Progress(TextColumn("sampling, all workers"), *columns, disable=not wait)
    with bar, ThreadPoolExecutor(WRITER_THREADS) as pool:
        task = bar.add_task("sampling", total=total, speed=0.0)
        began, first_completed = time.monotonic(), -1

        def show(missing: list[int]) -> None:
            nonlocal first_completed
            completed = total - sum(len(job.chunk(chunk)) for chunk in missing)
            first_completed = completed if first_completed < 0 else first_completed
            speed = (completed - first_completed) / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=completed, speed=speed)

        work = claimed_chunks(
            leases,
            sink.missing_chunks,
            is_missing=sink.is_missing,
            look=show,
            idle=lambda: settle(keep=0),
            wait=wait,
        )
        for chunk in work:
            has_drawn = True
            writing.append((chunk, draw_chunk(job, sink, job.chunk(chunk), pool)))
            settle(keep=1)
        settle(keep=0)
        show([])
    return has_drawn


def draw_chunk(job: SamplingJob, sink: Sink, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Draw the images of one chunk that the sink needs, and pass them to it."""
    size, writes = job.config.batch_size, []
    for first in range(0, len(numbers), size):
        batch = numbers[first : first + size]
        if sink.needs(batch):
            for decoded, part in decode(job, draw_batch(job, batch), batch):
                writes += sink.add(decoded, part, pool)
    return writes + sink.end_chunk(numbers, pool)


def draw_batch(job: SamplingJob, numbers: range) -> Tensor:
    """Return the latents of one batch of images."""
    config, shape = job.config, job.model.config
    family = family_of(shape)
    labels = torch.tensor([job.label(number) for number in numbers], device=job.device)
    noise = draw_image_noise(family.noise_shape(shape), numbers, config.seed).to(job.device)
    with drawing_precision(config.precision, job.device):
        *_, latents = family.generate(job.model, labels, noise, config, StepNoise(numbers, config.seed, job.device))
    return latents


def decode(job: SamplingJob, latents: Tensor, numbers: range) -> Iterator[tuple[Tensor, range]]:
    """Yield images in [-1, 1], decoded in batches of `decode_batch_size`, with their numbers."""
    size = job.config.decode_batch_size or len(numbers)
    for first in range(0, len(numbers), size):
        with torch.inference_mode(), decoding_precision(job.config.precision, job.device):
            images = job.vae.decode(latents[first : first + size].float())
        yield images, numbers[first : first + size]
