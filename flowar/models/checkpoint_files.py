"""The files of a checkpoint: hashed while they are written, checked while they are read, unpickled as data.

torch.distributed.checkpoint keeps in `.metadata` where each piece of a tensor lies; the hash of the piece is kept
beside that. `checksums.json`, written last, has the hashes of `.metadata`, of the small files, and of itself. A piece
is checked in memory when it is read, so that nothing is read twice. Read next: folders.py, training/checkpoint.py.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.base.run_folder import METADATA_FILE, STATE_FILE

CHECKSUMS_FILE = "checksums.json"
READ_AT_ONCE = 4  # pieces
BLOCK = 2**18  # bytes, hashed while they are in the processor's cache
PIECE_HASH = "xxh3"  # attribute of torch's record of where a piece lies
# What torch's metadata is made of: all that a `.metadata` may name.
METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
METADATA_CLASSES = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class DamagedCheckpointError(UserError):
    """A checkpoint isn't what was written. Made by `of`, so that ranks can send it to each other."""

    @classmethod
    def of(cls, folder: Path, problem: str) -> "DamagedCheckpointError":
        """Return the error about a folder."""
        return cls(f"checkpoint {folder} is damaged: {' '.join(problem.split())}")

    @classmethod
    def find_in(cls, error: BaseException, folder: Path) -> "DamagedCheckpointError | None":
        """Return the damage that made torch fail, maybe on another rank; it hands on errors of others as text."""
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        for cause, _ in failures:
            if isinstance(cause, cls):
                return cause
            if isinstance(cause, FileNotFoundError):
                return cls.of(folder, str(cause))
        start = f"checkpoint {folder} is damaged: "
        if start not in str(error):
            return None
        problem = str(error).partition(start)[2].partition("; rank local")[0]
        return cls.of(folder, problem.splitlines()[0])


class HashingStream:
    """Forwards what is written, and hashes what lies between two calls of `tell`: torch asks around each piece."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream = cast(IO[bytes], stream)
        self._digest = xxhash.xxh3_64()
        self._start = 0
        self.error: OSError | None = None  # of the system; torch hides it behind one of its own
        self.hashes: dict[tuple[int, int], str] = {}  # (offset, length) -> hash

    def write(self, content: Any) -> int:
        """Write and hash."""
        self._digest.update(content)
        try:
            return self._stream.write(content)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        """Return the place; end a piece."""
        place = self._stream.tell()
        if place > self._start:
            self.hashes[(self._start, place - self._start)] = self._digest.hexdigest()
            self._digest, self._start = xxhash.xxh3_64(), place
        return place

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the file's number, to have it written to the disk."""
        return self._stream.fileno()

    def close(self) -> None:
        """End."""
        self._stream.close()


class HashingFileSystem(FileSystem):
    """Files whose pieces are hashed while they are written."""

    def __init__(self) -> None:
        self.streams: dict[str, HashingStream] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file."""
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = self.streams[Path(path).name] = HashingStream(stream)
            yield cast(io.IOBase, hashing)


class HashingWriter(FileSystemWriter):
    """Writes a checkpoint, and the hash of each piece into its metadata."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.files = HashingFileSystem()
        self.fs = self.files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces; the hashes go with the results to the rank that writes the metadata."""
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            raise next((stream.error for stream in self.files.streams.values() if stream.error), error) from error
        for result in results:
            place = result.storage_data
            hashes = self.files.streams[place.relative_path].hashes
            setattr(place, PIECE_HASH, hashes[(place.offset, place.length)])
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what torch's metadata consists of: a checkpoint of somebody else's is data, never code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or module in METADATA_MODULES or (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")


class BufferReader(io.RawIOBase):
    """Bytes in memory as a file that torch.load reads without a copy in between."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content = content
        self._place = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, and return the place."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: len(self._content)}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is content, and return how many bytes that was."""
        content = self._content[self._place : self._place + len(buffer)]
        memoryview(buffer)[: len(content)] = content
        self._place += len(content)
        return len(content)


class CheckedReader(FileSystemReader):
    """Reads a checkpoint, and checks each piece against its hash.

    Raises:
        DamagedCheckpointError: if a file or a piece is not what was written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._local = threading.local()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, checked and unpickled as data."""
        self._has_hashes = check_small_files(Path(self.path))
        try:
            metadata = _MetadataUnpickler(io.BytesIO((Path(self.path) / METADATA_FILE).read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # damaged pickles raise any kind
            raise DamagedCheckpointError.of(Path(self.path), f"{METADATA_FILE} can't be read: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's pieces, several at once."""
        parts = [dataclasses.replace(plan, items=plan.items[start::READ_AT_ONCE]) for start in range(READ_AT_ONCE)]
        read = super().read_data
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            done, *_ = pool.map(lambda part: read(part, planner), parts)
        return done

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        return cast(IO[bytes], BufferReader(self.read_piece(file, sinfo)))

    def read_piece(self, file: IO[bytes], place: Any) -> memoryview:
        """Return the bytes of a piece, checked; they are good until this thread reads the next.

        It has one buffer, because fresh memory for each piece costs more time than its hash.
        """
        if len(getattr(self._local, "buffer", b"")) < place.length:
            self._local.buffer = bytearray(place.length)
        content = memoryview(self._local.buffer)[: place.length]
        digest, length = xxhash.xxh3_64(), 0
        file.seek(place.offset)
        for start in range(0, place.length, BLOCK):
            block = content[start : start + BLOCK]
            block = block[: cast(io.BufferedIOBase, file).readinto(block)]
            digest.update(block)
            length += len(block)
        is_right = digest.hexdigest() == getattr(place, PIECE_HASH, None) if self._has_hashes else True
        if not is_right or length < place.length:
            raise DamagedCheckpointError.of(
                Path(self.path),
                f"bytes {place.offset:,} to {place.offset + place.length:,} of {place.relative_path} are not what was "
                "written",
            )
        return content


def write_checksums(folder: Path) -> None:
    """Write checksums.json: the hashes of all files of a checkpoint that are not hashed piece by piece."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".distcp")
    hashes = {name: xxhash.xxh3_64_hexdigest((folder / name).read_bytes()) for name in names}
    write_text(folder / CHECKSUMS_FILE, json.dumps({"files": hashes, "xxh3": _hash_of(hashes)}, indent=2) + "\n")


def check_small_files(folder: Path) -> bool:
    """Check a checkpoint's small files against checksums.json; return whether it has such hashes.

    Checkpoints of version 0.1 have none, which their state.json says by not saying "checksums".

    Raises:
        DamagedCheckpointError: if one of them is missing, or not what was written.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text()) if (folder / STATE_FILE).exists() else {}
        if not state.get("checksums") and not (folder / CHECKSUMS_FILE).exists():
            return False
        record = json.loads((folder / CHECKSUMS_FILE).read_text())
        hashes, whole = record["files"], record["xxh3"]
        found = {name: xxhash.xxh3_64_hexdigest((folder / name).read_bytes()) for name in hashes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError.of(folder, str(error)) from error
    wrong = [name for name in hashes if found[name] != hashes[name]]
    if wrong or whole != _hash_of(hashes) or METADATA_FILE not in hashes:
        raise DamagedCheckpointError.of(folder, f"{(wrong or [CHECKSUMS_FILE])[0]} is not what was written")
    return True


def _hash_of(hashes: dict[str, str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(hashes, sort_keys=True).encode())


def check_pieces(folder: Path) -> int:
    """Read a whole checkpoint, several files at once, and return how many bytes of tensors it has.

    Raises:
        DamagedCheckpointError: if something is not what was written.
    """
    reader = CheckedReader(folder)
    places = sorted(reader.read_metadata().storage_data.values(), key=lambda place: (place.relative_path, place.offset))

    def check_piece(place: Any) -> int:
        try:
            with (folder / place.relative_path).open("rb") as file:
                return len(reader.read_piece(file, place))
        except OSError as error:
            raise DamagedCheckpointError.of(folder, str(error)) from error

    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return sum(pool.map(check_piece, places))
