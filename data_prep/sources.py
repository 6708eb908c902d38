"""Where images come from: folders, WebDataset tar shards, Hugging Face parquet. Lists them, reads their bytes.

A listing has a fixed order, so that image number i is the same image for every worker and after every restart.
Read next: crops.py.
"""

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.tars import IMAGE_SUFFIXES, list_tar_images, read_bytes_at

SOURCE_FORMS = "one sub-folder of images per class, or *.tar (WebDataset) or *.parquet files (Hugging Face)"


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

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Return a hash of all names and labels, in order."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(f"{name}\t{label}\n".encode())
        return digest.hexdigest()

    def read(self, number: int) -> bytes:
        """Return the encoded bytes of one image."""
        if self.kind == "folder":
            return Path(self.root, self.names[number]).read_bytes()
        file, *where = self.places[number]
        if self.kind == "webdataset":
            return read_bytes_at(file, *where)
        row_group, row, column = where
        content: bytes = _parquet_images(file, row_group, column)[row]
        return content

    def save(self, path: Path) -> None:
        """Write the listing as compressed JSON, the same bytes for the same listing."""
        text = json.dumps(self.__dict__)
        write_whole(path, lambda hidden: hidden.write_bytes(gzip.compress(text.encode(), mtime=0)))

    @staticmethod
    def load(path: Path) -> "Source":
        """Return the listing that `save` wrote."""
        return Source(**json.loads(gzip.decompress(path.read_bytes())))


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
            return _open_webdataset(root, files)
        if files:
            return _open_parquet(root, files, image_column, label_column)
    if not Path(root).is_dir():
        raise UserError(f"images={root} does not exist; it has to hold {SOURCE_FORMS}")
    return _open_folder(root)


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


def _images_below(folder: Path) -> Iterable[str]:
    for parent, _, files in os.walk(folder):
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.relpath(Path(parent, file), folder)


def _open_webdataset(root: str, files: list[str]) -> Source:
    images = list_tar_images(files)
    labels = [image.label for image in images]
    names = [f"{Path(image.file).name}:{image.key}" for image in images]
    places: list[list[Any]] = [[image.file, image.offset, image.size] for image in images]
    return Source(root, "webdataset", _numbered(labels, root), names, labels, places)


def _open_parquet(root: str, files: list[str], image_column: str, label_column: str) -> Source:
    import pyarrow
    import pyarrow.parquet

    names, labels, places, class_names = [], [], [], None
    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} is not a readable parquet file: {error}") from error
        for setting, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in table.schema_arrow.names:
                there = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file} has no column {setting}={column}; it has {there}")
        class_names = class_names or _parquet_class_names(table.schema_arrow.metadata, label_column)
        for group in range(table.num_row_groups):
            found = table.read_row_group(group, columns=[label_column])[label_column].to_pylist()
            labels += found
            names += [f"{Path(file).name}:{group}:{row}" for row in range(len(found))]
            places += [[file, group, row, image_column] for row in range(len(found))]
    numbered = _numbered(labels, root)
    if class_names and len(class_names) < len(numbered):
        raise UserError(f"{root} has label {len(numbered) - 1}, but only {len(class_names)} class names")
    return Source(root, "parquet", class_names or numbered, names, labels, places)


def _parquet_class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> list[str] | None:
    """Return the class names that Hugging Face's datasets keeps in the schema, if any."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names: list[str] | None = features.get(label_column, {}).get("names")
    return names


@lru_cache(maxsize=1)
def _parquet_images(file: str, group: int, column: str) -> list[bytes]:
    """Return the images of one row group; they are read one after the other, so the last group is kept."""
    import pyarrow.parquet

    images = pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[column])[column].to_pylist()
    return [image["bytes"] if isinstance(image, dict) else image for image in images]


def _numbered(labels: list[int], root: str) -> list[str]:
    if not labels:
        raise UserError(f"{root} holds no image")
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        raise UserError(f"{root} has label {wrong[0]!r}; class numbers from 0 on are needed (a test split has none)")
    return [str(label) for label in range(max(labels) + 1)]
