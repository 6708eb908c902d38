"""WebDataset tars: which images are in them, with which labels, and where their bytes lie."""

import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple, cast

from flowar.base.errors import UserError
from flowar.base.files import MIB

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
LABEL_SUFFIXES = (".cls", ".json")  # a class number, or an object with "label"
NOT_A_TAR = (ArithmeticError, ValueError, LookupError, TypeError, EOFError, RecursionError)  # of what is in it
LARGEST_LABEL_FILE = 16 * MIB  # bytes: a .json may hold more about its image, but it is read whole


class TarImage(NamedTuple):
    """One image in a tar."""

    file: str
    key: str  # of WebDataset: the name without suffixes
    label: int
    offset: int  # bytes from the start of the file
    size: int


def list_tar_images(files: Iterable[str]) -> list[TarImage]:
    """Return the images of uncompressed WebDataset tars, in the order in which they lie there.

    Raises:
        UserError: if a file is not such a tar, is cut off, or an image has no label.
    """
    listed = []
    for file in files:
        places, labels, end = {}, {}, 0
        try:
            if not Path(file).is_file():  # a named pipe would never end
                raise ValueError("it is not a regular file")
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                    key, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                    if suffix in (*IMAGE_SUFFIXES, *LABEL_SUFFIXES) and (not member.isreg() or member.issparse()):
                        raise ValueError(f"{member.name!r} is not a regular file")
                    if suffix in IMAGE_SUFFIXES:
                        if key in places:
                            raise ValueError(f"two images of one key, {key}")
                        places[key] = (member.offset_data, member.size)
                    elif suffix in LABEL_SUFFIXES and key not in labels:
                        labels[key] = _read_label(archive, member, suffix)
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            _check_tar_end(file, end)
        except (OSError, tarfile.TarError, *NOT_A_TAR) as error:
            raise UserError(
                f"{file} is not a readable WebDataset shard ({error!r}); uncompressed tar files with an image and a "
                '.cls or a .json with "label" per key are needed'
            ) from error
        without = [key for key in places if key not in labels]
        if without or not places:
            problem = (
                f"{len(without)} images have no label, the first is {without[0]}" if without else "there is no image"
            )
            raise UserError(f'{file}: {problem}; each needs a .cls or a .json with "label" of the same key')
        listed += [TarImage(file, key, labels[key], *place) for key, place in places.items()]
    return listed


def read_bytes_at(file: str | Path, offset: int, size: int) -> bytes:
    """Return some of a file's bytes; fewer where the file ends."""
    with open(file, "rb") as opened:  # noqa: PTH123 - os.pread needs no seek
        return os.pread(opened.fileno(), size, offset)


def _check_tar_end(file: str, end: int) -> None:
    """Raise an EOFError where a tar lacks its closing block: it was cut off, maybe between two members."""
    if read_bytes_at(file, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("it is cut off: its closing block is missing")


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int:
    """Return the class number that a label file of a tar holds."""
    if member.size > LARGEST_LABEL_FILE:
        raise ValueError(f"{member.name!r} has {member.size:,} bytes; a label file has {LARGEST_LABEL_FILE:,} at most")
    content = cast(IO[bytes], archive.extractfile(member)).read()
    label = content if suffix == ".cls" else json.loads(content)["label"]
    if isinstance(label, float) and not label.is_integer():
        raise ValueError(f"{member.name!r} has label {label}, not a class number")
    return int(label)
