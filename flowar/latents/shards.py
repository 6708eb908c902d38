"""Random access to the rows of a prepared dataset, local or remote. Never writes a row; in no order of its own.

The shards are plain MDS, which mosaicml-streaming reads too; here they are read by their row numbers with one `pread`
each, and every row is checked against its checksum. A read error is an error, where a memory map would end the process
with a bus error, and StreamingDataset its epoch in silence. Remote shards are fetched whole, by mosaicml-streaming.
Read next: data.py for the order, data_prep/schema.py for what a row is.
"""

import getpass
import hashlib
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import track

from flowar.base.errors import UserError
from flowar.base.files import MIB, write_whole
from flowar.base.hashes import hash_file
from flowar.config.data import DataConfig
from flowar.latents.schema import (
    INDEX_FILE,
    PASSPORT_FILE,
    SHARD_HASH,
    Passport,
    read_passport,
    row_checksum,
    row_dtype,
)

SPARE_FILES = 200  # open files that are left to everything else
FETCH_TIMEOUT_S = 60
FETCH_ATTEMPTS = 3
FETCHED_AT_ONCE = 8


@dataclass(frozen=True)
class Shard:
    """One file of rows, as the index has it."""

    name: str
    first_row: int
    num_rows: int
    num_bytes: int
    file_hash: str


class LatentShards:
    """The rows of a prepared dataset, by number.

    Raises:
        UserError: if it is not finished, or (with `check_sizes`) a local shard is missing or has another size than the
            index says.
    """

    def __init__(self, config: DataConfig, *, check_sizes: bool = True) -> None:
        self.path = config.path
        self.is_remote = "://" in config.path
        self.folder = _fetch_passport(config) if self.is_remote else Path(config.path)
        self.passport: Passport = read_passport(self.folder)
        self.shards = _read_index(self.folder, self.path)
        self.dtype = row_dtype(self.passport.moments_shape, self.passport.moments_dtype)
        self._first_rows = np.array([shard.first_row for shard in self.shards])
        found = sum(shard.num_rows for shard in self.shards)
        if found != self.passport.num_rows:
            raise UserError(
                f"data.path={self.path}: index.json has {found:,} rows, dataset.json {self.passport.num_rows:,}; "
                "they are not of one dataset; copy or prepare it again"
            )
        if self.is_remote:
            self._check_room()
        elif check_sizes:
            for shard in self.shards:
                self.check_size(shard)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        most = len(self.shards) if hard == resource.RLIM_INFINITY else max(hard - SPARE_FILES, SPARE_FILES)
        self._open = lru_cache(maxsize=min(len(self.shards), most))(self._open_shard)

    def __len__(self) -> int:
        return self.passport.num_rows

    def read(self, rows: Sequence[int]) -> NDArray[np.void]:
        """Return rows as a structured array with the fields label and moments; see data_prep/schema.py.

        Raises:
            UserError: if a row can't be read or is damaged, with the name of the shard.
        """
        found = np.empty(len(rows), self.dtype)
        memory = found.view(np.uint8).data
        size = self.dtype.itemsize
        for place, (row, number) in enumerate(zip(rows, self._shards_of(rows), strict=True)):
            shard = self.shards[number]
            offset = shard.num_bytes - (shard.num_rows - (row - shard.first_row)) * size  # rows are a shard's last part
            try:
                read = os.preadv(self._open(number).fileno(), [memory[place * size : (place + 1) * size]], offset)
            except OSError as error:
                raise UserError(f"can't read {self.describe(shard)}: {error}") from error
            label = int(found["label"][place])
            if read < size or label < 0 or row_checksum(found["moments"][place], label) != found["checksum"][place]:
                cure = f"delete {self.folder / shard.name}" if self.is_remote else "copy it again, or prepare it"
                raise UserError(
                    f"row {row} in {self.describe(shard)} is damaged; `flowar check {self.path}` says what else; {cure}"
                )
        return found

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

        Raises:
            UserError: if it can't be fetched, or what comes doesn't have the hash of the index.
        """
        file = self.folder / shard.name
        if not self.is_remote or file.exists():
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # once for all processes of this machine
            if not file.exists():
                for leftover in file.parent.glob(f".{file.name}.*"):  # of killed processes
                    leftover.unlink()
                write_whole(file, lambda hidden: self._fetch_shard(shard, hidden))
        return file

    def fetch_all(self) -> None:
        """Fetch all shards that are not here yet: a random batch needs nearly all of them.

        Raises:
            UserError: if one can't be fetched.
        """
        missing = [shard for shard in self.shards if not (self.folder / shard.name).exists()]
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            fetched = pool.map(self.local_file, missing)
            for _ in track(fetched, escape(f"fetching {self.path}"), total=len(missing), disable=not missing):
                pass

    def _shards_of(self, rows: Sequence[int]) -> list[int]:
        numbers: list[int] = (np.searchsorted(self._first_rows, rows, side="right") - 1).tolist()
        return numbers

    def _open_shard(self, number: int) -> FileIO:
        return self.local_file(self.shards[number]).open("rb", buffering=0)

    def _fetch_shard(self, shard: Shard, file: Path) -> None:
        fetch(f"{self.path.rstrip('/')}/{shard.name}", file)
        if hash_file(file) != shard.file_hash:
            raise UserError(f"{self.describe(shard)} does not have the {SHARD_HASH} of its index; upload it again")

    def _check_room(self) -> None:
        missing = sum(shard.num_bytes for shard in self.shards if not (self.folder / shard.name).exists())
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise UserError(
                f"data.path={self.path} needs {missing / MIB:,.0f} MiB more in data.cache={self.folder}, which has "
                f"{free / MIB:,.0f} MiB free; set data.cache to a larger disk"
            )


def fetch(remote: str, file: Path) -> None:
    """Copy a remote file to a local one that doesn't exist yet.

    Raises:
        UserError: if it can't be fetched.
    """
    from streaming.base.storage.download import CloudDownloader

    logging.getLogger("streaming").setLevel(logging.ERROR)
    for attempt in range(FETCH_ATTEMPTS):
        try:
            CloudDownloader.direct_download(remote, str(file), timeout=FETCH_TIMEOUT_S)
        except Exception as error:  # each kind of storage has exceptions of its own
            file.unlink(missing_ok=True)
            if attempt == FETCH_ATTEMPTS - 1:
                raise UserError(f"can't fetch {remote}: {' '.join(str(error).split())}") from error
            time.sleep(2**attempt)
        else:
            return


def _fetch_passport(config: DataConfig) -> Path:
    """Return the cache folder of a remote dataset, with its passport and index in it.

    The folder is named after the passport, which has the hash of every shard: jobs that share it can't mix datasets up.
    """
    root = Path(config.cache or Path(tempfile.gettempdir()) / f"flowar-{getpass.getuser()}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as fetched:
        for name in (PASSPORT_FILE, INDEX_FILE):
            fetch(f"{config.path.rstrip('/')}/{name}", Path(fetched) / name)
        folder = root / hashlib.sha256((Path(fetched) / PASSPORT_FILE).read_bytes()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        for name in (PASSPORT_FILE, INDEX_FILE):
            (Path(fetched) / name).replace(folder / name)
    return folder


def _read_index(folder: Path, path: str) -> list[Shard]:
    try:
        entries = json.loads((folder / INDEX_FILE).read_text())["shards"]
        shards, first_row = [], 0
        for entry in entries:
            data = entry["raw_data"]
            shards.append(
                Shard(data["basename"], first_row, entry["samples"], data["bytes"], data["hashes"][SHARD_HASH])
            )
            first_row += entry["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.path={path} has no readable index.json ({error}); prepare the dataset again") from error
    return shards
