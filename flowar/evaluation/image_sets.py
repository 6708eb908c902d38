"""Read images to be measured: a folder, what `flowar sample` wrote, an .npz, tars, MDS. Never resizes or crops.

Read next: store.py.
"""

import functools
import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowar.base.errors import UserError
from flowar.base.files import MIB
from flowar.base.records import read_record
from flowar.base.tars import list_tar_images, read_bytes_at
from flowar.latents.schema import INDEX_FILE
from flowar.sampling.folder import (
    CLASS_NAMES,
    HASHES_FILE,
    IMAGES_FOLDER,
    SAMPLES_FILE,
    HashBook,
    class_of,
    drawn_names,
    hash_json,
    identify,
    number_of,
    read_drawn,
    read_hashes,
    read_samples,
    refuse_unrecorded,
)

MEASURED_SUFFIXES = (".png", ".jpg", ".jpeg")

NO_LABEL = -1
MEASURABLE = "a folder of images, what `flowar sample` wrote, an .npz with arr_0, a folder of *.tar, or MDS"


@dataclass(frozen=True)
class ImageSet:
    """Images by place. `numbers` identify them: the numbers of `flowar sample`, otherwise the places."""

    root: Path
    kind: str  # folder, samples, npz, tar or mds
    numbers: list[int]
    labels: list[int]  # NO_LABEL for images without a label
    identity: str  # a hash that changes if the images are replaced
    read: Callable[[int], NDArray[np.uint8]] = field(repr=False)  # place -> uint8 (H, W, 3)
    class_names: tuple[str, ...] = ()  # by label, if the images have class names

    def __len__(self) -> int:
        return len(self.numbers)

    def read_many(self, places: range, mapped: Callable[..., Iterable[NDArray[np.uint8]]] = map) -> NDArray[np.uint8]:
        """Return images as uint8 (N, 3, H, W).

        Args:
            places: of the images.
            mapped: `map`, or the `map` of a pool.

        Raises:
            UserError: if an image can't be read or is damaged, or the images have different sizes.
        """
        images = list(mapped(self.read_checked, places))
        sizes = {image.shape for image in images}
        if len(sizes) > 1:
            (first, *_, last) = sorted(sizes)
            raise UserError(
                f"{self.root} holds images of several sizes, {first[1]} x {first[0]} and {last[1]} x {last[0]} pixels; "
                "resize and crop them to one size first"
            )
        return np.stack(images).transpose(0, 3, 1, 2)

    def read_checked(self, place: int) -> NDArray[np.uint8]:
        """Return an image as uint8 (H, W, 3); same errors as `read_many`."""
        try:
            return self.read(place)
        except UserError:
            raise
        except Exception as error:  # damaged images raise any kind
            raise UserError(f"{self.root}: image {self.numbers[place]} can't be read: {error}") from error


def open_images(path: str | Path, setting: str) -> ImageSet:
    """Return the images at a path.

    Args:
        path: see `MEASURABLE`.
        setting: that has this value, for messages.

    Raises:
        UserError: if there are no images, or drawing them is not finished.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{setting}={path} does not exist; give {MEASURABLE}")
    if path.suffix == ".npz":
        return _open_npz(path, setting)
    refuse_unrecorded(path)
    if path.is_dir() and (path / SAMPLES_FILE).is_file():
        return _open_samples(path, setting)
    if path.is_dir() and (path / INDEX_FILE).is_file():
        return _open_mds(path)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return _open_tars(path)
    if not path.is_dir():
        raise UserError(f"{setting}={path} holds no images; give {MEASURABLE}")
    return _open_folder(path, setting)


def _listed(files: list[Path]) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of files, which change when the files change."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def read_rgb(content: bytes) -> NDArray[np.uint8]:
    """Return an encoded image as uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _open_samples(path: Path, setting: str) -> ImageSet:
    """Return what `flowar sample` wrote, each image checked against its hash."""
    record = read_samples(path)
    if not (path / IMAGES_FOLDER).is_dir():
        kept = ", ".join(sorted(store.name.removeprefix("features-") for store in path.glob("features-*"))) or "nothing"
        raise UserError(
            f"{setting}={path} was drawn with features_only=true and has no images, only features by {kept}; set "
            "extractor.name to such a network, or draw images"
        )
    count, file = record["num_images"], path / HASHES_FILE
    hashes = read_hashes(file) if file.exists() else {}
    there = set(drawn_names(path))
    found = sorted((number_of(name), name) for name in there & hashes.keys())[:count]
    if [number for number, _ in found] != list(range(count)) or HashBook(path).new_files():
        raise UserError(
            f"{setting}={path} holds {len(there):,} images, {len(hashes):,} of them hashed, but {count:,} were "
            "requested; run the same `flowar sample` again to draw and hash the rest"
        )
    strange = sorted(name for name in there - hashes.keys() if number_of(name) < count)
    if strange:
        raise UserError(
            f"{path / IMAGES_FOLDER / strange[0]} is not one of these samples: it is not in {file}; move it elsewhere"
        )
    identity = identify(record)

    def read(place: int) -> NDArray[np.uint8]:
        name = found[place][1]
        return read_rgb(read_drawn(path / IMAGES_FOLDER / name, {hashes[name]}, identity))

    numbers = [number for number, _ in found]
    labels = [class_of(name) for _, name in found]
    return ImageSet(path, "samples", numbers, labels, identity, read, tuple(record.get(CLASS_NAMES, ())))


def _open_folder(path: Path, setting: str) -> ImageSet:
    files = [
        file for file in path.rglob("*") if file.suffix.lower() in MEASURED_SUFFIXES and not _is_hidden(file, path)
    ]
    files.sort(key=str)  # torch-fidelity's order
    if not files:
        raise UserError(f"{setting}={path} holds no images ({', '.join(MEASURED_SUFFIXES)}); give {MEASURABLE}")
    folders = sorted({file.relative_to(path).parts[0] for file in files if file.parent != path})
    by_folder = {name: label for label, name in enumerate(folders)}
    labels = [by_folder.get(file.relative_to(path).parts[0], NO_LABEL) for file in files]
    return ImageSet(
        path,
        "folder",
        list(range(len(files))),
        labels,
        hash_json(_listed(files)),
        lambda place: read_rgb(files[place].read_bytes()),
        tuple(folders),
    )


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _open_npz(path: Path, setting: str) -> ImageSet:
    """Return the images of ADM's format: arr_0 uint8 (N, H, W, 3), and labels in arr_1 if it exists."""
    try:
        with np.load(path) as content:
            names = content.files
            labels = content["arr_1"].astype(np.int64) if "arr_1" in names else None
        if "arr_0" not in names:
            raise ValueError(f"it holds {', '.join(names)}")
        images = _map_member(path, "arr_0.npy")
    except Exception as error:  # damaged archives raise any kind
        raise UserError(
            f"{setting}={path} is not an .npz with images in arr_0: {error}; copy or make it again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{setting}={path} has arr_0 of {images.dtype} {images.shape}; give one with uint8 (N, height, width, 3)"
        )
    if labels is not None and labels.shape != (len(images),):
        raise UserError(
            f"{setting}={path} has arr_1 of shape {labels.shape}, but {len(images)} images; give one label per image"
        )
    given = [NO_LABEL] * len(images) if labels is None else [int(label) for label in labels]
    places = list(range(len(images)))
    return ImageSet(path, "npz", places, given, hash_json(_listed([path])), lambda place: np.asarray(images[place]))


def _map_member(path: Path, member: str) -> NDArray[Any]:
    """Return an array of an .npz: memory-mapped if it is stored uncompressed, otherwise read."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as file:
                array: NDArray[Any] = np.lib.format.read_array(file)
            return array
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            is_first = version == (1, 0)
            reader: Any = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = reader(file)
            header_bytes = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects")
    stat = path.stat()
    _check_member(path, member, stat.st_size, stat.st_mtime_ns)
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        local = raw.read(30)  # the local header: its name and extra field may differ from the directory's
    start = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    order: Literal["F", "C"] = "F" if is_fortran else "C"
    mapped: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r", offset=start + header_bytes, shape=shape, order=order)
    return mapped


@functools.lru_cache
def _check_member(path: Path, member: str, size: int, mtime_ns: int) -> None:
    """Raise a BadZipFile error if a member of an archive doesn't match its checksum, which memory-mapping ignores.

    This reads the whole member once more, some seconds for 10 GB, but only once per process, file size and time.
    """
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        while file.read(MIB):  # zipfile compares at the end
            continue


def _open_tars(path: Path) -> ImageSet:
    files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    images = list_tar_images(map(str, files))
    numbers = _numbers([int(image.key) if image.key.isdigit() else None for image in images])

    def read(place: int) -> NDArray[np.uint8]:
        image = images[place]
        return read_rgb(read_bytes_at(image.file, image.offset, image.size))

    return ImageSet(path, "tar", numbers, [image.label for image in images], hash_json(_listed(files)), read)


def _open_mds(path: Path) -> ImageSet:
    """Return the column "image" of an MDS dataset, with "label" and "number" if they exist."""
    from streaming.base.format import reader_from_json

    cure = "copy the dataset again"
    try:
        shards = read_record(path / INDEX_FILE, cure)["shards"]
        readers: list[Any] = [reader_from_json(str(path), None, shard) for shard in shards]
        for reader in readers:
            reader.validate(allow_unsafe_types=False)  # no pickles, which run code when read
            if Path(reader.raw_data.basename).is_absolute() or ".." in Path(reader.raw_data.basename).parts:
                raise ValueError(f"its shard {reader.raw_data.basename} is outside of the folder")
        times = _listed([path / reader.raw_data.basename for reader in readers])
        rows = [(reader, row) for reader in readers for row in range(reader.size)]
        columns = readers[0].column_names if readers else []
        labels = [int(reader[row]["label"]) for reader, row in rows] if "label" in columns else [NO_LABEL] * len(rows)
        numbers = _numbers([int(reader[row]["number"]) if "number" in columns else None for reader, row in rows])
    except UserError:
        raise
    except Exception as error:  # damaged shards raise any kind
        raise UserError(
            f"{path} is not a readable MDS dataset: {error!r}; give one with uncompressed shards"
        ) from error
    if "image" not in columns:
        raise UserError(
            f"{path} is an MDS dataset without a column image; give one with images, not moments of `flowar prepare`"
        )

    def read(place: int) -> NDArray[np.uint8]:
        reader, row = rows[place]
        return np.asarray(reader[row]["image"].convert("RGB"))

    return ImageSet(path, "mds", numbers, labels, hash_json(times), read)


def _numbers(given: list[int | None]) -> list[int]:
    """Return the numbers of images if each has its own, otherwise their places."""
    known = [number for number in given if number is not None]
    return known if len(set(known)) == len(given) else list(range(len(given)))
