"""Random access to the rows of a prepared dataset, local or remote. Never writes a row; in no order of its own.

The shards are plain MDS, which mosaicml-streaming reads too; here they are read by their row numbers with one `pread`
each, and every row is checked against its checksum. A read error is an error, where a memory map would end the process
with a bus error, and StreamingDataset its epoch in silence. Remote shards are fetched whole, by mosaicml-streaming.
The index is compared with the passport, which has a hash of its own.
Read next: cache.py for the copies of remote shards, batches.py for the order, schema.py for what a row is.
"""

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import track

from flowar.base.errors import UserError
from flowar.base.failures import StorageError, is_passing
from flowar.base.files import MIB, raise_open_files
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.data import DataConfig
from flowar.latents.cache import fetch_passport, fetch_verified
from flowar.latents.schema import (
    FIRST_READ_VERSION,
    INDEX_FILE,
    SHARD_HASH,
    Passport,
    hash_row_settings,
    read_passport,
    row_checksum,
    row_dtype,
    row_place,
)

SPARE_FILES = 200  # open files that are left to everything else
FETCHED_AT_ONCE = 8
LONGEST_PAUSE_S = 30  # between two tries to read


@dataclass(frozen=True)
class Shard:
    """One file of rows, as the index has it."""

    name: str
    first_row: int
    num_rows: int
    num_bytes: int
    file_hash: str
    row_in_chunk: int  # its first row's number among those of its chunk

    @property
    def chunk(self) -> int:
        """Number of the chunk that it is of: the name of its folder."""
        return int(self.name.partition("/")[0])


class LatentShards:
    """The rows of a prepared dataset, by number.

    Raises:
        UserError: if it is not finished, its index isn't the one that its passport was written with, or (with
            `check_sizes`) a local shard is missing or has another size than the index says.
    """

    def __init__(self, config: DataConfig, *, check_sizes: bool = True) -> None:
        self.path = config.path
        self.is_remote = "://" in config.path
        self.patience_s = config.patience_s
        self.folder = fetch_passport(config) if self.is_remote else Path(config.path)
        self.passport: Passport = replace(read_passport(self.folder), normalize=config.normalize)
        self.shards = _read_index(self.folder, self.path)
        self.dtype = row_dtype(self.passport.moments_shape, self.passport.moments_dtype)
        self._made_how = hash_row_settings(vars(self.passport))
        self._first_rows = np.array([shard.first_row for shard in self.shards])
        _check_index(self.shards, self.passport, self.path)
        if self.is_remote:
            self._check_room()
        elif check_sizes:
            for shard in self.shards:
                self.check_size(shard)
        most = max(raise_open_files() - SPARE_FILES, SPARE_FILES)
        self._open = lru_cache(maxsize=int(min(len(self.shards), most)))(self._open_shard)

    def __len__(self) -> int:
        return self.passport.num_rows

    def read(self, rows: Sequence[int]) -> NDArray[np.void]:
        """Return rows as a structured array with the fields label and moments; see flowar/latents/schema.py.

        Raises:
            StorageError: if the storage gives none for `data.patience_s`, with the name of the shard.
            UserError: if a row can't be read or is damaged, with the name of the shard.
        """
        found = np.empty(len(rows), self.dtype)
        memory = found.view(np.uint8).data
        size = self.dtype.itemsize
        for place, (row, number) in enumerate(zip(rows, self._shards_of(rows), strict=True)):
            shard = self.shards[number]
            offset = shard.num_bytes - (shard.num_rows - (row - shard.first_row)) * size  # rows are a shard's last part
            read = self._read_patiently(number, memory[place * size : (place + 1) * size], offset)
            if read < size or not self.is_row(found[place], shard, row):
                cure = f"delete {self.folder / shard.name}" if self.is_remote else "copy it again, or prepare it"
                raise UserError(
                    f"row {row} in {self.describe(shard)} is damaged; `flowar check {self.path}` says what else; {cure}"
                )
        return found

    def _read_patiently(self, number: int, memory: memoryview, offset: int) -> int:
        """Fill `memory` from a shard; where the storage fails for a while, try again. Return how many bytes came."""
        shard, began = self.shards[number], time.monotonic()
        for wait_s in itertools.chain(range(1, LONGEST_PAUSE_S), itertools.repeat(LONGEST_PAUSE_S)):
            try:
                return os.preadv(self._open(number).fileno(), [memory], offset)
            except OSError as error:
                waited = time.monotonic() - began
                problem = f"can't read {self.describe(shard)}: {error}"
                if not is_passing(error):
                    raise UserError(problem) from error
                if waited + wait_s > self.patience_s:
                    raise StorageError(
                        f"{problem}, for {waited:.0f} s (data.patience_s={self.patience_s:g})"
                    ) from error
                print(f"{problem}; trying again in {wait_s} s", file=sys.stderr, flush=True)
                time.sleep(wait_s)
                self._open.cache_clear()  # a file that was replaced meanwhile has to be opened again
        raise AssertionError("unreachable")

    def read_labels(self) -> NDArray[np.int64]:
        """Return the class number of each image, (images,), as the shards have it; checksums are not looked at.

        Raises:
            UserError: if they are not as many of each class as the passport says.
        """
        labels = np.empty(len(self), dtype=np.int64)
        for number, shard in enumerate(self.shards):
            begin = shard.num_bytes - shard.num_rows * self.dtype.itemsize
            rows = np.memmap(self._open(number), self.dtype, mode="r", offset=begin, shape=(shard.num_rows,))
            labels[shard.first_row : shard.first_row + shard.num_rows] = rows["label"]
        of_images = labels[:: self.passport.views]
        counts = self.passport.class_counts
        is_known = bool(((labels >= 0) & (labels < len(counts))).all())
        if not is_known or np.bincount(of_images, minlength=len(counts)).tolist() != counts:
            raise UserError(
                f"the labels in the shards of data.path={self.path} are not as many as its dataset.json counts; "
                f"`flowar check {self.path}` says where; copy the dataset again, or prepare it again"
            )
        return of_images

    def is_row(self, row: np.void, shard: Shard, number: int) -> bool:
        """Return whether a row read from `shard` has its checksum, as the dataset's row `number`."""
        label = int(row["label"])
        place = self.place_of(shard, number)
        return label >= 0 and row_checksum(row["moments"], label, place) == int(row["checksum"])

    def place_of(self, shard: Shard, number: int) -> int:
        """Return what the checksum of row `number` has of its place: nothing in datasets of version 0.1."""
        if self.passport.schema_version == FIRST_READ_VERSION:
            return 0
        return row_place(self._made_how, shard.chunk, shard.row_in_chunk + int(number) - shard.first_row)

    def describe(self, shard: Shard) -> str:
        """Return the name of a shard for messages."""
        return f"shard {shard.name} of data.path={self.path}"

    def check_size(self, shard: Shard) -> None:
        """Raise a UserError if the local file of a shard is missing or has another size than the index says."""
        file = self.folder / shard.name
        found = file.stat().st_size if file.is_file() else None
        if found != shard.num_bytes:
            problem = "is missing" if found is None else f"has {found:,} bytes"
            raise UserError(
                f"{self.describe(shard)} {problem}, index.json says {shard.num_bytes:,} bytes; copy or prepare the "
                "dataset again"
            )

    def local_file(self, shard: Shard) -> Path:
        """Return the file of a shard on this machine; fetch it first if it is remote and not here yet.

        A remote one is hashed once per machine, also where it was here already.

        Raises:
            UserError: if it can't be fetched, or what comes doesn't have the hash of the passport.
        """
        file = self.folder / shard.name
        if self.is_remote:
            fetch_verified(f"{self.path.rstrip('/')}/{shard.name}", file, shard.file_hash, self.describe(shard))
        return file

    def fetch_all(self) -> None:
        """Fetch all shards that are not here yet, and verify the others: a random batch needs nearly all of them.

        Raises:
            UserError: if one can't be fetched.
        """
        missing = [shard for shard in self.shards if not (self.folder / shard.name).exists()]
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            here = pool.map(self.local_file, self.shards)
            for _ in track(here, escape(f"fetching {self.path}"), total=len(self.shards), disable=not missing):
                pass

    def _shards_of(self, rows: Sequence[int]) -> list[int]:
        numbers: list[int] = (np.searchsorted(self._first_rows, rows, side="right") - 1).tolist()
        return numbers

    def _open_shard(self, number: int) -> FileIO:
        return self.local_file(self.shards[number]).open("rb", buffering=0)

    def _check_room(self) -> None:
        missing = sum(shard.num_bytes for shard in self.shards if not (self.folder / shard.name).exists())
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise UserError(
                f"data.path={self.path} needs {missing / MIB:,.0f} MiB more in data.cache={self.folder}, which has "
                f"{free / MIB:,.0f} MiB free; set data.cache to a larger disk"
            )


def _read_index(folder: Path, path: str) -> list[Shard]:
    """Return the shards that the index names, in its order."""
    try:
        entries = json.loads((folder / INDEX_FILE).read_text())["shards"]
        shards: list[Shard] = []
        for entry in entries:
            data = entry["raw_data"]
            shards.append(_next_shard(shards, data["basename"], entry["samples"], data["bytes"], data["hashes"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"data.path={path} has no readable {INDEX_FILE} ({error}); copy the dataset again, or prepare it again"
        ) from error
    return shards


def _next_shard(before: list[Shard], name: Any, num_rows: Any, num_bytes: Any, hashes: dict[str, str]) -> Shard:
    """Return the shard that follows those before.

    Raises:
        ValueError: if a name leaves the dataset's folder, or a number can't be one.
    """
    parts = PurePosixPath(name).parts
    if (
        len(parts) != 2
        or not (parts[0].isascii() and parts[0].isdecimal())
        or parts[1] == ".."
        or "/".join(parts) != name
    ):
        raise ValueError(f"it names the file {name!r}; CHUNK/FILE below the dataset's folder is needed")
    if not (isinstance(num_rows, int) and isinstance(num_bytes, int) and 0 < num_rows < num_bytes):
        raise ValueError(f"{name} has {num_rows!r} rows in {num_bytes!r} bytes")
    first_row = before[-1].first_row + before[-1].num_rows if before else 0
    shard = Shard(name, first_row, num_rows, num_bytes, hashes[SHARD_HASH], 0)
    if before and before[-1].chunk == shard.chunk:
        return replace(shard, row_in_chunk=before[-1].row_in_chunk + before[-1].num_rows)
    return shard


def _check_index(shards: list[Shard], passport: Passport, path: str) -> None:
    """Raise a UserError if the index isn't the one that the passport was written with: names, order, sizes, hashes."""

    def refuse(problem: str) -> None:
        raise UserError(
            f"data.path={path}: {problem}; they are not of one dataset; copy both again, or prepare it again"
        )

    needed = passport.shards or [[name, None, None] for name in passport.shard_hashes]
    for number, (shard, (name, num_rows, num_bytes)) in enumerate(zip(shards, needed, strict=False)):
        if shard.name != name:
            refuse(f"{INDEX_FILE} has {shard.name} as shard {number}, {PASSPORT_FILE} has {name}")
        if passport.shards and (shard.num_rows, shard.num_bytes) != (num_rows, num_bytes):
            refuse(
                f"{INDEX_FILE} has {shard.num_rows} rows in {shard.num_bytes} bytes of {name}, {PASSPORT_FILE} has "
                f"{num_rows} in {num_bytes}"
            )
        if shard.file_hash != passport.shard_hashes.get(name):
            recorded = passport.shard_hashes.get(name)
            refuse(f"{name}: {INDEX_FILE} has hash {shard.file_hash}, {PASSPORT_FILE} has {recorded}")
    num_rows = sum(shard.num_rows for shard in shards)
    if len(shards) != len(needed) or num_rows != passport.num_rows:
        refuse(
            f"{INDEX_FILE} has {num_rows:,} rows, {PASSPORT_FILE} {passport.num_rows:,}, in {len(shards):,} and "
            f"{len(needed):,} shards"
        )
