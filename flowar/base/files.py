"""Files that are there whole or not at all, whenever the process dies."""

import contextlib
import errno
import math
import os
import resource
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

MIB, GIB = 2**20, 2**30  # bytes
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what file systems without hard links say


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a hidden file beside `path`; give it its name when it is on the disk."""
    with _filled(path, write) as hidden:
        hidden.replace(path)


def create_whole(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file that is not there yet, whole; return whether it was this process that did.

    If several processes try at once, only one succeeds, because creating a hard link is atomic. Where the file system
    has no links (some of laptops and clouds) the file is created and then filled: so a process that dies there may
    leave half of it.
    """
    with _filled(path, write) as hidden, contextlib.suppress(FileExistsError):
        try:
            path.hardlink_to(hidden)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with path.open("xb") as file:
                file.write(hidden.read_bytes())
        return True
    return False


@contextlib.contextmanager
def _filled(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """Have a hidden file beside `path` filled, on the disk; it is gone in the end."""
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"  # other machines have the same numbers
    hidden = path.with_name(f".{path.name}.{unique}")
    try:
        write(hidden)
        _sync(hidden)
        yield hidden
    finally:
        hidden.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file, whole or not at all; a private one can be read by this user alone."""

    def write(hidden: Path) -> None:
        if private:
            hidden.touch(mode=0o600)
        hidden.write_text(text)

    write_whole(path, write)


def publish_folder(hidden: Path, folder: Path) -> None:
    """Rename a filled folder after its content is on the disk: not even a power cut leaves half a folder.

    Raises:
        OSError: if it can't be written, or `folder` is there already.
    """
    for path in (*hidden.rglob("*"), hidden):
        _sync(path)
    hidden.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_open_files() -> float:
    """Let this process open as many files and sockets as it may; return how many these are, maybe infinity."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return math.inf if hard == resource.RLIM_INFINITY else hard
