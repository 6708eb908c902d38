"""What all workers of `flowar prepare` agree on: the images, their chunks, the settings, and the files of the source.

The first worker lists the source and writes the plan; all others take it from there. The plan says which tar and
parquet files were listed (size and time of the last change), and each chunk says the same of the image files that it
read. Tars are compared at the start, whenever one is read, and before the dataset is finished; images before it is
finished. A copy of the source that keeps the times (cp -a, rsync -a) passes, all else is another source.
Read next: chunks.py.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from xxhash import xxh64_hexdigest

from data_prep.chunks import (
    CHUNK_CURE,
    PLAN_FILE,
    chunk_folder,
    finished_chunks,
    has_dataset,
    publish_dataset,
    read_chunk_record,
)
from data_prep.sources import ChangedSourceError, Source, describe_change, file_stamp, open_source
from flowar.base.errors import UserError
from flowar.base.files import MIB
from flowar.base.leases import WAIT_S, Leases
from flowar.base.records import hash_record, read_record, write_record
from flowar.config.data import PrepareConfig
from flowar.latents.schema import LISTING_FILE, SHARD_HASH
from flowar.latents.vae import VAE

NEAR_IMAGES = 8  # images before and after one that is gone: one of them still there means that it was removed
STATS_AT_ONCE = 16  # of a network file system


class EncodingJob(NamedTuple):
    """What a worker needs to know."""

    config: PrepareConfig
    settings: dict[str, Any]
    out_dir: Path
    partial: Path
    vae: VAE
    device: torch.device


@dataclass
class Plan:
    """Which images there are, cut into which chunks: the same for all workers."""

    source: Source
    listing_sha256: str
    chunk_images: int
    partial: Path
    hash: str  # of the record: chunks of another plan have another one

    def identity(self) -> dict[str, str]:
        """Return the source's fields of the passport."""
        return {"source_kind": self.source.kind, "listing_sha256": self.listing_sha256}

    @property
    def num_chunks(self) -> int:
        return -(-len(self.source) // self.chunk_images)

    def images_of(self, chunk: int) -> range:
        """Return the numbers of a chunk's images."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, len(self.source)))

    def unfinished(self) -> list[int]:
        """Return the chunks that are still to do; none once they are merged."""
        if has_dataset(self.partial):
            return []
        done = finished_chunks(self.partial)
        return [chunk for chunk in range(self.num_chunks) if chunk not in done]

    def done(self) -> int:
        """Return how many images are in finished chunks."""
        return len(self.source) - sum(len(self.images_of(chunk)) for chunk in self.unfinished())

    def check_files(self) -> None:
        """Raise a UserError if a tar or parquet file has changed since it was listed."""
        try:
            self.source.check_unchanged()
        except ChangedSourceError as error:
            raise UserError(f"{error}; {self.cure_of_change()}") from error
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; {self._cure_of_missing()}") from error

    def check_images(self) -> None:
        """Raise a UserError if an image file of a finished chunk has changed since it was read."""
        if self.source.kind == "folder":
            with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
                for chunk in sorted(finished_chunks(self.partial)):
                    self._check_images(chunk, pool)

    def _check_images(self, chunk: int, pool: ThreadPoolExecutor) -> None:
        record = read_chunk_record(self.partial, chunk)
        numbers, stamps = self.images_of(chunk), record["stamps"]
        again = CHUNK_CURE.format(self.partial / chunk_folder(chunk))
        if len(stamps) != len(numbers):
            raise UserError(f"chunk {chunk} has {len(stamps)} images, not {len(numbers)}; {again}")
        files = [Path(self.source.root, self.source.names[number]) for number in numbers]
        for number, file, needed, found in zip(numbers, files, stamps, pool.map(_stat, files), strict=True):
            if isinstance(found, OSError) and str(number) in record["skipped"]:
                continue  # it was left out anyway
            if isinstance(found, OSError):
                if not self.was_removed(number):
                    raise UserError(self.describe_unreachable(number, found))
                raise UserError(
                    f"{self.source.names[number]} in {self.source.root} was removed after it had been encoded; put it "
                    f"back as it was; or {again} and leaves it out with skip_unreadable=true; or {self._start_again()}"
                )
            if needed is not None and tuple(needed) != file_stamp(found):
                raise UserError(
                    f"{describe_change(file, needed, file_stamp(found))}; put it back as it was, or {again}"
                )

    def was_removed(self, number: int) -> bool:
        """Return whether an image file that isn't there was removed: others of its folder are still there."""
        file = Path(self.source.root, self.source.names[number])
        if self.source.kind != "folder" or os.path.lexists(file):
            return False
        near = range(max(number - NEAR_IMAGES, 0), min(number + NEAR_IMAGES + 1, len(self.source)))
        others = (Path(self.source.root, self.source.names[other]) for other in near if other != number)
        return any(other.parent == file.parent and other.exists() for other in others)

    def describe_removed(self, number: int) -> str:
        """Return the error about an image that was removed."""
        return (
            f"{self.source.names[number]} in {self.source.root} was removed after the images had been listed; put it "
            "back, or a readable one in its place; or leave it out, with what can't be read, by skip_unreadable=true; "
            f"or {self._start_again()}"
        )

    def describe_unreachable(self, number: int, error: OSError) -> str:
        """Return the error about an image that cannot be reached."""
        where = f"{self.source.names[number]} in {self.source.root}"
        return f"cannot read {where}: {error}; {self._cure_of_missing()}"

    def cure_of_damage(self) -> str:
        """Return what to do about images that can't be read."""
        fix = "put readable ones in their place"
        if self.source.kind != "folder":
            fix = f"write the file again without them and {self._start_again()}"
        removed = f" To remove them instead, also {self._start_again()}" if self.source.kind == "folder" else ""
        return f"{fix}, or leave them out, with a list in dataset.json, by skip_unreadable=true.{removed}"

    def cure_of_change(self) -> str:
        """Return what to do about a file of the source that has changed."""
        return f"put it back as it was (with its time: cp -p, rsync -a), or {self._start_again()}"

    def _cure_of_missing(self) -> str:
        return (
            "check that its storage is mounted, then run the same command again; if it was removed on purpose, "
            f"{self._start_again()}"
        )

    def _start_again(self) -> str:
        done = len(finished_chunks(self.partial)) if self.partial.exists() else 0
        lost = f"its {done} finished chunks are encoded again" if done else "no chunk in it is finished"
        return f"remove {self.partial} ({lost}) and run the command again, which lists the images again"


def _stat(file: Path) -> os.stat_result | OSError:
    try:
        return file.stat()
    except OSError as error:
        return error


def agree_on_plan(job: EncodingJob, leases: Leases) -> Plan | None:
    """Return the plan that the first worker made, or make it; None if the dataset is finished.

    Raises:
        UserError: if the plan was made with other settings, is damaged, or the source has changed since.
    """
    file = job.partial / PLAN_FILE
    has_said = False
    while not has_dataset(job.out_dir):
        is_merged = has_dataset(job.partial)  # and was interrupted while it was cleaned up
        if file.exists() and not is_merged:
            return read_plan(job)
        task = "merge" if is_merged else "plan"
        if not leases.claim(task):
            if not has_said:
                print(f"waiting for {leases.holder(task)}, which lists the images or tidies up")
                has_said = True
            time.sleep(WAIT_S)
        elif is_merged:
            publish_dataset(job.partial, job.out_dir)
        elif not file.exists() and not has_dataset(job.out_dir):
            make_plan(job, leases)
            leases.release("plan")
    return None


def make_plan(job: EncodingJob, leases: Leases) -> None:
    """List the source and write the plan, unless another worker has taken over."""
    strangers = finished_chunks(job.partial)
    if strangers:
        raise UserError(
            f"{job.partial} has {len(strangers)} finished chunks, but no {PLAN_FILE} that says what they are; put it "
            f"back, or remove {job.partial} and run the same command again"
        )
    source = list_images(job.config)
    listing = job.partial / LISTING_FILE
    source.save(listing)
    record = job.settings | {
        "listing_sha256": source.sha256(),
        f"listing_{SHARD_HASH}": xxh64_hexdigest(listing.read_bytes()),
        "source_files": source.stamps,
    }
    if leases.is_mine("plan"):
        write_record(job.partial / PLAN_FILE, record)


def read_plan(job: EncodingJob) -> Plan:
    """Return the plan that is there.

    Raises:
        UserError: if it was made with other settings, is damaged, or the source has changed since.
    """
    anew = f"remove {job.partial} and run the same command again"
    recorded = read_record(job.partial / PLAN_FILE, anew)
    if "source_files" not in recorded:
        raise UserError(f"{job.partial} was begun by an older flowar; finish it with that version, or {anew}")
    check_same_settings(job.settings, recorded, f"{job.partial} was begun with")
    listing = job.partial / LISTING_FILE
    if not listing.exists() and (job.partial / PLAN_FILE).exists():  # else another worker has just finished
        raise UserError(f"{listing} is missing, so that the images have no numbers; {anew}")
    content = listing.read_bytes()
    if xxh64_hexdigest(content) != recorded[f"listing_{SHARD_HASH}"]:
        raise UserError(f"{listing} is damaged, so that the images have no numbers; {anew}")
    stamps = {name: (stamp[0], stamp[1]) for name, stamp in recorded["source_files"].items()}
    source = replace(Source.parse(content, listing), stamps=stamps)
    plan = Plan(source, recorded["listing_sha256"], job.config.chunk_images, job.partial, hash_record(recorded))
    plan.check_files()
    return plan


def check_same_settings(settings: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raise a UserError that names the settings in which two workers, or a worker and a dataset, differ."""
    differing = [f"{key}={found.get(key)}, not {value}" for key, value in settings.items() if found.get(key) != value]
    if differing:
        raise UserError(f"{where} {'; '.join(differing)}; use the same settings, or another out_dir")


def list_images(config: PrepareConfig) -> Source:
    """Return the listing of the source."""
    return open_source(config.images, image_column=config.image_column, label_column=config.label_column)


def describe_plan(source: Source, settings: dict[str, Any], config: PrepareConfig) -> str:
    """Return what will be done, in one line."""
    rows = len(source) * settings["views"]
    num_bytes = rows * int(np.prod(settings["moments_shape"])) * np.dtype(settings["moments_dtype"]).itemsize
    return (
        f"{len(source):,} images of {len(source.class_names):,} classes in {config.images} ({source.kind}) x "
        f"{settings['views']} views ({config.crop}) -> moments {tuple(settings['moments_shape'])} of VAE "
        f"{settings['vae_name']}, {num_bytes / MIB:,.1f} MiB in {config.out_dir}"
    )
