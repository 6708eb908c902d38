"""Where images come from: folders, WebDataset tar shards, Hugging Face parquet. Lists them, reads their bytes.

A listing has a fixed order, so that image number i is the same image for every worker and after every restart.
Read next: crops.py.
"""

import glob
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.limits import MOST_CLASSES
from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.tars import IMAGE_SUFFIXES, list_tar_images

SOURCE_FORMS = "one sub-folder of images per class, or *.tar (WebDataset) or *.parquet files (Hugging Face)"

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns: it changes when a file is written or replaced


class ChangedSourceError(UserError):
    """A file of a source is not the one whose images were listed."""


class DamagedListingError(UserError):
    """A listing is not what was written."""


@dataclass(frozen=True)
class Source:
    """The images of one source in a fixed order, with their class numbers."""

    root: str
    kind: str  # folder, webdataset or parquet
    class_names: list[str]
    names: list[str]  # for messages, and for the hash; of a folder: the path below root
    labels: list[int]
    places: list[list[Any]] = field(
        repr=False
    )  # tar: file, offset, size; parquet: file, row group, row, column; else empty
    # Of each tar or parquet file, before it was listed. None of a folder: its images are compared one by one (plan.py).
    stamps: dict[str, Stamp] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Return a hash of all names and labels, in order."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(f"{name}\t{label}\n".encode())
        return digest.hexdigest()

    def read(self, number: int) -> bytes:
        """Return the encoded bytes of one image; raises as `read_stamped`."""
        return self.read_stamped(number)[0]

    def read_stamped(self, number: int) -> tuple[bytes, Stamp]:
        """Return the encoded bytes of one image, and the stamp of the file that they were read from.

        Raises:
            ChangedSourceError: if the file isn't the one that was listed.
            UserError: if it is not a regular file, or cannot be read as what it was.
            OSError: if it cannot be reached.
        """
        if self.kind == "folder":
            return read_regular_file(Path(self.root, self.names[number]))
        file, *where = self.places[number]
        if self.kind == "webdataset":
            offset, size = where
            content, stamp = read_regular_file(Path(file), offset, size)
        else:
            row_group, row, column = where
            images, stamp = _parquet_images(file, row_group, column)
            content = images[row]
        self._check_stamp(file, stamp)
        return content, stamp

    def check_unchanged(self) -> None:
        """Raise a ChangedSourceError, or an OSError, if a tar or parquet file isn't the one that was listed."""
        for file in self.stamps:
            self._check_stamp(file, file_stamp(Path(file).stat()))

    def _check_stamp(self, file: str, found: Stamp) -> None:
        needed = self.stamps.get(file, found)
        if found != needed:
            raise ChangedSourceError(describe_change(file, needed, found))

    def save(self, path: Path) -> None:
        """Write the listing as compressed JSON, the same bytes for the same listing."""
        text = json.dumps({name: value for name, value in self.__dict__.items() if name != "stamps"})
        write_whole(path, lambda hidden: hidden.write_bytes(gzip.compress(text.encode(), mtime=0)))

    @staticmethod
    def load(path: Path) -> "Source":
        """Return the listing that `save` wrote, without stamps.

        Raises:
            DamagedListingError: if it is missing, or not what was written.
        """
        try:
            return Source.parse(path.read_bytes(), path)
        except OSError as error:
            raise DamagedListingError(f"{path} can't be read: {error}; copy it again, or prepare it again") from error

    @staticmethod
    def parse(compressed: bytes, path: Path) -> "Source":
        """Return the listing that a file held; raises as `load`."""
        try:
            content = json.loads(gzip.decompress(compressed))
            source = Source(**content)
            for name in ("class_names", "names", "labels", "places"):
                if not isinstance(content[name], list):
                    raise TypeError(f"{name} is not a list")
            if len(source.names) != len(source.labels) or (source.places and len(source.places) != len(source)):
                raise ValueError("it has more names than labels or places, or fewer")
        except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedListingError(f"{path} can't be read: {error}; copy it again, or prepare it again") from error
        return source


def file_stamp(found: os.stat_result) -> Stamp:
    """Return the stamp of a file."""
    return found.st_size, found.st_mtime_ns


def describe_change(file: str | Path, needed: Stamp, found: Stamp) -> str:
    """Return the beginning of an error about a file that has changed."""

    def describe(stamp: Stamp) -> str:
        return f"{stamp[0]:,} bytes of {datetime.fromtimestamp(stamp[1] / 1e9).isoformat(sep=' ')}"

    return f"{file} was changed while the dataset was made: it had {describe(needed)}, now {describe(found)}"


def read_regular_file(file: Path, offset: int = 0, size: int | None = None) -> tuple[bytes, Stamp]:
    """Return bytes of a file, all from `offset` on if no size is given, and its stamp; never waits for a named pipe.

    Raises:
        UserError: if it is not a regular file.
        OSError: if it can't be read.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as opened:  # noqa: PTH123 - of a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file} is not a regular file; remove it")
        if size is not None:
            return os.pread(descriptor, size, offset), file_stamp(found)
        return opened.read(), file_stamp(found)


def open_source(root: str, *, image_column: str = "image", label_column: str = "label") -> Source:
    """Return the images at `root`: a folder, or a pattern of *.tar or *.parquet files.

    Args:
        root: a folder with one sub-folder of images per class (classes and files in the order of their names), a folder
            of *.tar or *.parquet files, or a pattern such as /data/train-*.parquet.
        image_column: parquet: bytes, or a struct with "bytes".
        label_column: parquet: the class number.

    Raises:
        UserError: if there is nothing of the kind, or something is missing in it.
    """
    for suffix in (".tar", ".parquet"):
        pattern = str(Path(glob.escape(root)) / f"*{suffix}") if Path(root).is_dir() else root
        files = [file for file in sorted(glob.glob(pattern)) if file.endswith(suffix)]  # noqa: PTH207 - an absolute pattern
        if files and suffix == ".tar":
            return _with_utf8_names(_open_webdataset(root, files))
        if files:
            return _with_utf8_names(_open_parquet(root, files, image_column, label_column))
    if not Path(root).is_dir():
        raise UserError(f"images={root} does not exist; it has to hold {SOURCE_FORMS}")
    try:
        return _with_utf8_names(_open_folder(root))
    except OSError as error:
        raise UserError(f"cannot list images={root}: {error}; check its storage and its permissions") from error


def _with_utf8_names(source: Source) -> Source:
    """Return the source, or raise a UserError if a name can't be written down."""
    for name in (source.root, *source.class_names, *source.names):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"images={source.root!a}: the name {os.fsencode(name)!r} is not UTF-8, so that it can't be listed; "
                "rename it (convmv renames whole folders)"
            ) from error
    return source


def _open_folder(root: str) -> Source:
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"images={root} has no sub-folders and no *.tar or *.parquet; it has to hold {SOURCE_FORMS}")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(Path(root, name)))
        if not found:
            folder = Path(root, name)
            raise UserError(f"class folder {folder} has no image ({', '.join(IMAGE_SUFFIXES)}); fill it or remove it")
        names += [f"{name}/{image}" for image in found]
        labels += [label] * len(found)
    return Source(root, "folder", classes, names, labels, [])


def _images_below(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the names below `folder` of all images in it and in its sub-folders; those of links count as files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(folder, entry.name), f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                if not entry.is_file(follow_symlinks=False) and not _is_link_to_file(entry):
                    raise UserError(f"{os.fsdecode(entry.path)!r} is not a regular file; remove it")
                yield f"{prefix}{entry.name}"


def _is_link_to_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link to a file, or to nothing: that is an error when it is read."""
    return entry.is_symlink() and (entry.is_file() or not Path(entry.path).exists())


def _stamps(files: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamps of some files.

    Raises:
        UserError: if one isn't there, or isn't a regular file.
    """
    stamps = {}
    for file in files:
        try:
            found = Path(file).stat()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error}; check its storage, or remove it") from error
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file} is not a regular file; remove it")
        stamps[file] = file_stamp(found)
    return stamps


def _open_webdataset(root: str, files: list[str]) -> Source:
    stamps = _stamps(files)  # before they are listed: what changes after that is noticed
    images = list_tar_images(files)
    labels = [image.label for image in images]
    names = [f"{Path(image.file).name}:{image.key}" for image in images]
    places: list[list[Any]] = [[image.file, image.offset, image.size] for image in images]
    return Source(root, "webdataset", _numbered(labels, root), names, labels, places, stamps)


def _open_parquet(root: str, files: list[str], image_column: str, label_column: str) -> Source:
    import pyarrow
    import pyarrow.parquet

    names, labels, places = [], [], []
    class_names: list[str] | None = None
    stamps = _stamps(files)  # before they are listed: what changes after that is noticed
    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(file, table.schema_arrow, image_column, label_column)
            for group in range(table.num_row_groups):
                found = table.read_row_group(group, columns=[label_column])[label_column].to_pylist()
                labels += found
                names += [f"{Path(file).name}:{group}:{row}" for row in range(len(found))]
                places += [[file, group, row, image_column] for row in range(len(found))]
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} is not a readable parquet file: {error}") from error
        its_names = _parquet_class_names(file, table.schema_arrow.metadata, label_column)
        if file != files[0] and its_names != class_names:
            raise UserError(f"{file} has other class names than {files[0]}: their labels don't mean the same")
        class_names = its_names
    numbered = _numbered(labels, root)
    if class_names and len(class_names) < len(numbered):
        raise UserError(f"{root} has label {len(numbered) - 1}, but only {len(class_names)} class names")
    return Source(root, "parquet", class_names or numbered, names, labels, places, stamps)


def _check_columns(file: str, schema: Any, image_column: str, label_column: str) -> None:
    """Raise a UserError if a parquet file lacks a column, or its images are not bytes."""
    import pyarrow

    for setting, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in schema.names:
            raise UserError(f"{file} has no column {setting}={column}; it has {', '.join(schema.names)}")
    kind = schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_null(kind)):
        raise UserError(f'{file}: image_column={image_column} holds {kind}; bytes, or a struct with "bytes", is needed')


def _parquet_class_names(file: str, metadata: dict[bytes, bytes] | None, label_column: str) -> list[str] | None:
    """Return the class names that Hugging Face's datasets keeps in the schema, if any.

    Raises:
        UserError: if what it keeps there is something else.
    """
    try:
        content = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = content.get("info", {}).get("features", {})
        names = features.get(label_column, {}).get("names")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"the names of {label_column} are {str(names)[:80]}")
        return names
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{file}: the metadata "huggingface" of its schema, which has the class names, is damaged ({error}); write '
            "the file again, or remove that metadata: classes are then named by their numbers"
        ) from error


@lru_cache(maxsize=1)
def _parquet_images(file: str, group: int, column: str) -> tuple[list[bytes], Stamp]:
    """Return the images of one row group, and the file's stamp before; they are read one after the other, so the last
    group is kept.
    """
    import pyarrow
    import pyarrow.parquet

    stamp = file_stamp(Path(file).stat())
    try:
        images = pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[column])[column].to_pylist()
    except MemoryError:  # some of pyarrow's are of both kinds
        raise
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) is not None:  # of the storage, not of what is in the file
            raise
        raise UserError(f"row group {group} of {file} is damaged: {error}; copy the file again") from error
    return [image["bytes"] if isinstance(image, dict) else image for image in images], stamp


def _numbered(labels: list[int], root: str) -> list[str]:
    if not labels:
        raise UserError(f"{root} holds no image")
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        raise UserError(f"{root} has label {wrong[0]!r}; class numbers from 0 on are needed (a test split has none)")
    if max(labels) >= MOST_CLASSES:
        raise UserError(
            f"{root} has label {max(labels)}; class numbers below {MOST_CLASSES:,} are accepted: number the classes "
            "from 0 on"
        )
    return [str(label) for label in range(max(labels) + 1)]
