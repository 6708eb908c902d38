"""Pieces of a dataset in the making: written each by one worker, put together at the end. Read next: encode.py.

While a dataset is made, its folder is called OUT_DIR.partial and also holds
    plan.json          the settings of all workers
    00012/             a finished chunk: shards, their index.json, and chunk.json with what was counted and measured
    .00012.HOST.PID/   a chunk in the making; becomes 00012 by one rename
and beside it OUT_DIR.claims says who is at work on which chunk (flowar/leases.py).
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

from data_prep.statistics import MomentSums
from flowar.base.errors import UserError
from flowar.base.files import MIB, publish_folder, write_text
from flowar.latents.schema import (
    INDEX_FILE,
    PASSPORT_FILE,
    SCHEMA_VERSION,
    SHARD_HASH,
    Passport,
    row_checksum,
    shard_columns,
    write_passport,
)

PLAN_FILE = "plan.json"
CHUNK_FILE = "chunk.json"


def chunk_folder(chunk: int) -> str:
    """Return the name of a chunk's folder."""
    return f"{chunk:05d}"


def finished_chunks(partial: Path) -> set[int]:
    """Return the numbers of the chunks that are done."""
    return {int(entry.name) for entry in os.scandir(partial) if entry.name.isdecimal()}


class ChunkWriter:
    """One chunk in the making. `publish` or `discard` ends it."""

    def __init__(self, partial: Path, chunk: int, settings: dict[str, Any], encoded_with: dict[str, str]) -> None:
        from streaming import MDSWriter

        logging.getLogger("streaming").setLevel(logging.ERROR)
        self.chunk = chunk
        self.folder = partial / chunk_folder(chunk)
        self.hidden = partial / f".{chunk_folder(chunk)}.{socket.gethostname()}.{os.getpid()}"
        self.dtype = np.dtype(settings["moments_dtype"])
        self.encoded_with = encoded_with
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
                "moments_dtype=float32, or mend the VAE's weights if it is nan"
            )
        self.statistics += MomentSums.of(stored, moments)
        self.class_counts.update(labels)
        for row, sample in enumerate(stored):
            label = labels[row // views]
            self.writer.write({"checksum": row_checksum(sample, label), "label": label, "moments": sample})

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
            "statistics": asdict(self.statistics),
            "class_counts": dict(sorted(self.class_counts.items())),
            "skipped": self.skipped,
            "encoded_with": self.encoded_with,
        }
        write_text(self.hidden / CHUNK_FILE, json.dumps(record))
        try:
            publish_folder(self.hidden, self.folder)
        except OSError:
            if not self.folder.exists():
                raise
            self.discard()  # finished by another, who took this process for dead

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.hidden, ignore_errors=True)


def merge_chunks(partial: Path, settings: dict[str, Any], class_names: list[str]) -> None:
    """Write the index of all shards and, as the last thing, the passport into `partial`, from finished chunks only."""
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
    for chunk in sorted(finished_chunks(partial)):
        folder = partial / chunk_folder(chunk)
        record = json.loads((folder / CHUNK_FILE).read_text())
        statistics += MomentSums(**record["statistics"])
        class_counts.update({int(label): count for label, count in record["class_counts"].items()})
        skipped |= record["skipped"]
        if record["encoded_with"] not in encoded_with:
            encoded_with.append(record["encoded_with"])
        for shard in json.loads((folder / INDEX_FILE).read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{folder.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    if not class_counts:
        raise UserError(f"none of the {len(skipped)} images in {settings['images']} can be read")
    write_text(partial / INDEX_FILE, json.dumps({"shards": shards, "version": 2}, sort_keys=True))
    passport = Passport(
        schema_version=SCHEMA_VERSION,
        num_images=class_counts.total(),
        class_names=class_names,
        class_counts=[class_counts[label] for label in range(len(class_names))],
        skipped=skipped,
        encoded_with=encoded_with,
        shard_hashes={shard["raw_data"]["basename"]: shard["raw_data"]["hashes"][SHARD_HASH] for shard in shards},
        **settings,
        **statistics.figures(),
    )
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
