"""Pieces of a dataset in the making: written each by one worker, put together at the end. Read next: encode.py.

While a dataset is made, its folder is called OUT_DIR.partial and also holds
    plan.json          the settings of all workers, and which listing and which files of the source they mean
    00012/             a finished chunk: shards, their index.json, and chunk.json with what was counted and measured,
                       of which plan, and from which images
    .00012.HOST.PID/   a chunk in the making; becomes 00012 by one rename
and beside it OUT_DIR.claims says who is at work on which chunk (flowar/base/leases.py).
"""

import json
import logging
import os
import shutil
import socket
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.sources import Stamp
from data_prep.statistics import MomentSums
from flowar.base.errors import UserError
from flowar.base.files import MIB, publish_folder, write_text
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import PASSPORT_FILE
from flowar.latents.schema import (
    INDEX_FILE,
    SHARD_HASH,
    Passport,
    hash_row_settings,
    row_checksum,
    row_place,
    shard_columns,
    write_passport,
)
from flowar.models.cards import CARD_FILE, data_card

PLAN_FILE = "plan.json"
CHUNK_FILE = "chunk.json"
CHUNK_CURE = "remove {} and run the same command again, which encodes that chunk again"


def chunk_folder(chunk: int) -> str:
    """Return the name of a chunk's folder."""
    return f"{chunk:05d}"


def finished_chunks(partial: Path) -> set[int]:
    """Return the numbers of the chunks that are done."""
    return {int(entry.name) for entry in os.scandir(partial) if entry.name.isdecimal()}


class ChunkWriter:
    """One chunk in the making. `publish` or `discard` ends it."""

    def __init__(
        self, partial: Path, chunk: int, settings: dict[str, Any], encoded_with: dict[str, str], plan_hash: str = ""
    ) -> None:
        from streaming import MDSWriter

        logging.getLogger("streaming").setLevel(logging.ERROR)
        self.chunk = chunk
        self.folder = partial / chunk_folder(chunk)
        self.hidden = partial / f".{chunk_folder(chunk)}.{socket.gethostname()}.{os.getpid()}"
        self.dtype = np.dtype(settings["moments_dtype"])
        self.encoded_with = encoded_with
        self.plan_hash = plan_hash
        self.made_how = hash_row_settings(settings)
        self.num_rows = 0
        self.stamps: list[Stamp | None] = []  # of the image files that were read, in order
        self.statistics = MomentSums()
        self.class_counts: Counter[int] = Counter()
        self.skipped: dict[str, str] = {}
        shutil.rmtree(self.hidden, ignore_errors=True)  # of an ended process with the same number
        self.writer = MDSWriter(
            out=str(self.hidden),
            columns=shard_columns(settings["moments_shape"], settings["moments_dtype"]),
            hashes=[SHARD_HASH],
            size_limit=settings["shard_size_mib"] * MIB,
        )

    def add(self, moments: NDArray[np.float32], labels: list[int], names: list[str]) -> None:
        """Write the moments (N V, 2 C, h, w) of N images, all views of one image after the other.

        Raises:
            UserError: if a value has no place in the stored dtype.
        """
        with np.errstate(over="ignore"):
            stored = moments.astype(self.dtype)
        views = len(moments) // len(labels)
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=(1, 2, 3)))
        if len(bad):
            worst = np.abs(moments[bad[0]]).max()
            raise UserError(
                f"the moments of image {names[bad[0] // views]} reach {worst:.4g}, which {self.dtype} can't hold; use "
                "moments_dtype=float32, or fix the VAE's weights if it is nan"
            )
        self.statistics += MomentSums.of(stored, moments)
        self.class_counts.update(labels)
        for row, sample in enumerate(stored):
            label = labels[row // views]
            checksum = row_checksum(sample, label, row_place(self.made_how, self.chunk, self.num_rows))
            self.writer.write({"checksum": checksum, "label": label, "moments": sample})
            self.num_rows += 1

    def skip(self, number: int, reason: str) -> None:
        """Record an image that can't be read."""
        self.skipped[str(number)] = reason

    def publish(self) -> None:
        """Make it a finished chunk, unless somebody else has done so.

        Raises:
            OSError: if it can't be written.
        """
        self.writer.finish()
        record = {
            "chunk": self.chunk,
            "plan": self.plan_hash,
            "shards": _list_shards(self.hidden),
            "stamps": self.stamps,
            "statistics": asdict(self.statistics),
            "class_counts": dict(sorted(self.class_counts.items())),
            "skipped": self.skipped,
            "encoded_with": self.encoded_with,
        }
        write_record(self.hidden / CHUNK_FILE, record)
        try:
            publish_folder(self.hidden, self.folder)
        except OSError:
            if not self.folder.exists():
                raise
            self.discard()  # finished by another, who took this process for dead

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.hidden, ignore_errors=True)


def _list_shards(folder: Path) -> list[list[Any]]:
    """Return [file, rows, bytes, hash] of each shard, as the index in the folder has it."""
    shards = json.loads((folder / INDEX_FILE).read_text())["shards"]
    return [[shard["raw_data"]["basename"], shard["samples"], *_size_and_hash(shard)] for shard in shards]


def _size_and_hash(shard: dict[str, Any]) -> tuple[int, str]:
    return shard["raw_data"]["bytes"], shard["raw_data"]["hashes"][SHARD_HASH]


def read_chunk_record(partial: Path, chunk: int, plan_hash: str | None = None) -> dict[str, Any]:
    """Return what the worker recorded that made a chunk.

    Raises:
        UserError: if it is missing or damaged, or of another chunk or (if that is given) another plan.
    """
    folder = partial / chunk_folder(chunk)
    file, cure = folder / CHUNK_FILE, CHUNK_CURE.format(folder)
    if not file.exists() and (partial / PLAN_FILE).exists():  # else another worker has just finished
        raise UserError(f"{file} is missing; {cure}")
    record = read_record(file, cure)
    if record.get("chunk") != chunk:
        raise UserError(f"{folder} holds chunk {record.get('chunk')}; {cure}, or give it its own name back")
    if plan_hash is not None and record.get("plan") != plan_hash:
        raise UserError(f"{folder} was made by another plan than {partial / PLAN_FILE}: other images; {cure}")
    return record


def _read_chunk_index(partial: Path, chunk: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a chunk's shards for the index of all of them.

    Raises:
        UserError: if the chunk's index or a shard isn't what the worker wrote.
    """
    folder = partial / chunk_folder(chunk)
    try:
        found = _list_shards(folder)
        sizes = [(folder / name).stat().st_size for name, *_ in record["shards"]]
        entries: list[dict[str, Any]] = json.loads((folder / INDEX_FILE).read_text())["shards"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({error}); {CHUNK_CURE.format(folder)}") from error
    if found != record["shards"] or sizes != [shard[2] for shard in record["shards"]]:
        raise UserError(
            f"{folder} is damaged (its {INDEX_FILE} or its shards are not what was written); "
            f"{CHUNK_CURE.format(folder)}"
        )
    for shard in entries:
        shard["raw_data"]["basename"] = f"{folder.name}/{shard['raw_data']['basename']}"
    return entries


def merge_chunks(
    partial: Path,
    settings: dict[str, Any],
    class_names: list[str],
    *,
    num_chunks: int,
    plan_hash: str,
    psnr_db: float,
) -> None:
    """Write the index of all shards and, as the last thing, the passport into `partial`, from finished chunks only.

    Args:
        partial: where the chunks are.
        settings: the fields of the passport that say what was encoded, and how.
        class_names: of all classes.
        num_chunks: how many there have to be.
        plan_hash: of the plan that they have to be of.
        psnr_db: of images that the VAE gave back; 0: not measured.

    Raises:
        UserError: if a chunk is damaged, or isn't of this plan.
    """
    for leftover in partial.glob(".*"):  # of killed workers
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    statistics = MomentSums()
    class_counts: Counter[int] = Counter()
    skipped: dict[str, str] = {}
    encoded_with: list[dict[str, str]] = []
    shards: list[dict[str, Any]] = []
    stray = sorted(finished_chunks(partial) - set(range(num_chunks)))
    if stray:
        raise UserError(f"{partial / chunk_folder(stray[0])} belongs to no chunk of this dataset; remove it")
    for chunk in range(num_chunks):
        record = read_chunk_record(partial, chunk, plan_hash)
        statistics += MomentSums(**record["statistics"])
        class_counts.update({int(label): count for label, count in record["class_counts"].items()})
        skipped |= record["skipped"]
        if record["encoded_with"] not in encoded_with:
            encoded_with.append(record["encoded_with"])
        shards += _read_chunk_index(partial, chunk, record)
    if not class_counts:
        raise UserError(f"none of the {len(skipped)} images in {settings['images']} can be read")
    write_text(partial / INDEX_FILE, json.dumps({"shards": shards, "version": 2}, sort_keys=True))
    names = [shard["raw_data"]["basename"] for shard in shards]
    sizes_and_hashes = [_size_and_hash(shard) for shard in shards]
    passport = Passport(
        psnr_db=psnr_db,
        num_images=class_counts.total(),
        class_names=class_names,
        class_counts=[class_counts[label] for label in range(len(class_names))],
        skipped=skipped,
        skip_unreadable=bool(skipped),
        encoded_with=encoded_with,
        shard_hashes={name: found for name, (_, found) in zip(names, sizes_and_hashes, strict=True)},
        shards=[
            [name, shard["samples"], size]
            for name, shard, (size, _) in zip(names, shards, sizes_and_hashes, strict=True)
        ],
        **settings,
        **statistics.figures(),
    )
    write_text(partial / CARD_FILE, data_card(passport))
    write_passport(passport, partial)


def publish_dataset(partial: Path, out_dir: Path) -> None:
    """Give a merged dataset its name, without what only its making needed; can be cut off and repeated anywhere."""
    for chunk in finished_chunks(partial):
        folder = partial / chunk_folder(chunk)
        for name in (CHUNK_FILE, INDEX_FILE):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):  # none of its images could be read
            folder.rmdir()
    (partial / PLAN_FILE).unlink(missing_ok=True)
    if out_dir.exists():
        out_dir.rmdir()
    publish_folder(partial, out_dir)


def has_dataset(out_dir: Path) -> bool:
    """Return whether `out_dir` holds a finished dataset."""
    return (out_dir / PASSPORT_FILE).exists()
