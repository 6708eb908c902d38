"""Copies of remote shards on this machine: in a folder of this user alone, each verified once. Read next: shards.py.

A cache is a folder with one sub-folder per passport, named after its hash, so that jobs that share the cache can't mix
datasets up. Beside each shard lies SHARD.verified: which hash was found in which file (its size and time), so that a
shard is hashed when it is fetched, and again only if its file has changed since.
"""

import contextlib
import getpass
import hashlib
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

from filelock import FileLock

from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.hashes import hash_file
from flowar.base.records import DamagedRecordError, read_record, write_record
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.data import DataConfig
from flowar.latents.schema import INDEX_FILE, SHARD_HASH

FETCH_TIMEOUT_S = 60
FETCH_ATTEMPTS = 3
PRIVATE = 0o700  # nobody else may read it, or put anything into it


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


def fetch_passport(config: DataConfig) -> Path:
    """Return the cache folder of a remote dataset, with its passport and index in it.

    Raises:
        UserError: if they can't be fetched, or the cache may be another user's.
    """
    root = Path(config.cache) if config.cache else Path(tempfile.gettempdir()) / f"flowar-{getpass.getuser()}"
    if config.cache is None:
        make_private(root)
    else:  # where the user says; what is below it is private
        root.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as fetched:
        for name in (PASSPORT_FILE, INDEX_FILE):
            fetch(f"{config.path.rstrip('/')}/{name}", Path(fetched) / name)
        folder = root / hashlib.sha256((Path(fetched) / PASSPORT_FILE).read_bytes()).hexdigest()[:16]
        make_private(folder)
        for name in (PASSPORT_FILE, INDEX_FILE):
            (Path(fetched) / name).replace(folder / name)
    return folder


def make_private(folder: Path) -> None:
    """Make a folder that only this user can enter, or make sure that one is.

    Raises:
        UserError: if it is a link, no folder, or belongs to somebody else: its content can't be trusted.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=PRIVATE)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        problem = "is a link" if stat.S_ISLNK(found.st_mode) else "is not a folder"
    elif found.st_uid != os.getuid():
        problem = f"belongs to user {found.st_uid}, not to {os.getuid()}"
    else:
        if stat.S_IMODE(found.st_mode) != PRIVATE:
            folder.chmod(PRIVATE)
        return
    raise UserError(f"the cache {folder} {problem}; remove it, or set data.cache to a folder of your own")


def fetch_verified(remote: str, file: Path, needed_hash: str, description: str) -> None:
    """Have a remote file here, with the right hash; once for all processes of this machine.

    Args:
        remote: its address.
        file: its place here.
        needed_hash: as the passport has it.
        description: of the file, for messages.

    Raises:
        UserError: if it can't be fetched, or doesn't have the hash.
    """
    if _is_verified(file, needed_hash):
        return
    try:
        file.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if _is_verified(file, needed_hash):
                return
            if file.exists() and hash_file(file) != needed_hash:
                print(f"{file} is not {description} any more: fetching it again")
                file.unlink()
            if not file.exists():
                for leftover in file.parent.glob(f".{file.name}.*"):  # of killed processes
                    leftover.unlink()
                write_whole(file, lambda hidden: _fetch_hashed(remote, hidden, needed_hash, description))
            write_record(_marker(file), _stamp(file) | {SHARD_HASH: needed_hash})
    except OSError as error:
        raise UserError(
            f"can't keep {description} in {file.parent}: {error}; is the disk of data.cache full?"
        ) from error


def _fetch_hashed(remote: str, file: Path, needed_hash: str, description: str) -> None:
    fetch(remote, file)
    if hash_file(file) != needed_hash:
        raise UserError(f"{description} does not have the {SHARD_HASH} of its {PASSPORT_FILE}; upload it again")


def _is_verified(file: Path, needed_hash: str) -> bool:
    """Return whether a file's hash was found to be right, and the file has not changed since."""
    try:
        return read_record(_marker(file), "") == _stamp(file) | {SHARD_HASH: needed_hash}
    except (FileNotFoundError, DamagedRecordError):
        return False


def _marker(file: Path) -> Path:
    return file.with_name(f"{file.name}.verified")


def _stamp(file: Path) -> dict[str, int]:
    """Return what changes when a file is written or replaced."""
    found = file.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}
