"""Pack drawn images in formats that other tools read: ADM's .npz, WebDataset tars, MDS. Read next: sample.py."""

import io
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from flowar.base.errors import UserError
from flowar.base.files import publish_folder, write_whole
from flowar.base.hashes import hash_file
from flowar.base.records import DamagedRecordError, read_record, write_record

PACKED_FILE = "packed.json"  # what was packed: how many images, and the hash and size of every file
PERMUTATION_SEED = 0  # of the .npz: the same number of images always has the same order
IMAGES_PER_TAR = 10_000
MDS_COLUMNS = {"image": "png", "label": "int", "number": "int"}
Read = Callable[[Path], bytes]


def pack_images(
    kind: str, files: Sequence[Path], labels: Sequence[int], out_dir: Path, read: Read = Path.read_bytes
) -> Path:
    """Write all images in another format, whole or not at all; does nothing if that was done before.

    Args:
        kind: npz, tar or mds.
        files: PNG files, image 0 first.
        labels: their classes.
        out_dir: gets samples.npz, tar/ or mds/, and packed.json.
        read: returns the bytes of a file, and may check them.

    Returns:
        The file or folder that was written.
    """
    record = _read_packed(out_dir)
    target = _target(kind, out_dir)
    if is_packed(kind, len(files), out_dir):
        return target
    if target.is_dir():
        shutil.rmtree(target)  # of fewer images
    PACKERS[kind](files, labels, target, read)
    written = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(out_dir)): hash_file(path) for path in written}
    sizes = {str(path.relative_to(out_dir)): path.stat().st_size for path in written}
    about = {"num_images": len(files), "xxh64": hashes, "sizes": sizes}
    write_record(out_dir / PACKED_FILE, record | {kind: about})
    return target


def _read_packed(out_dir: Path) -> dict[str, Any]:
    """Return what is packed, by format; "sizes" are missing if version 0.1 wrote the record."""
    file, cure = out_dir / PACKED_FILE, "delete it and run again, which packs the images again"
    record = read_record(file, cure) if file.exists() else {}
    for kind, own in record.items():
        is_whole = isinstance(own, dict) and type(own.get("num_images")) is int
        if not is_whole or not all(isinstance(part, dict) for part in (own.get("xxh64"), own.get("sizes", {}))):
            raise DamagedRecordError(f"{file} is damaged (its {kind} does not name packed files); {cure}")
    return record


def find_half_packed(out_dir: Path) -> list[Path]:
    """Return half-packed files and folders, except those that a process on this machine is still writing.

    Only the process that holds the claim on finishing the samples writes there, so anything else was left by processes
    that died.
    """
    files = (path for path in out_dir.glob(f".{_target('npz', out_dir).name}.*") if not _is_alive(path))
    folders = (hidden for kind in ("tar", "mds") if (hidden := _hidden(_target(kind, out_dir))).is_dir())
    return [*files, *folders]


def _is_alive(hidden: Path) -> bool:
    """Return whether a temporary file of `write_whole` belongs to a process that is alive on this machine."""
    pid = hidden.name.split(".")[-2]
    return pid.isdigit() and psutil.pid_exists(int(pid))


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _target(kind: str, out_dir: Path) -> Path:
    return out_dir / ("samples.npz" if kind == "npz" else kind)


def is_packed(kind: str, num_images: int, out_dir: Path) -> bool:
    """Return whether `num_images` images are packed in this format, and all files exist with their size."""
    own = _read_packed(out_dir).get(kind)
    if own is None or own["num_images"] != num_images or not own["xxh64"]:
        return False
    sizes = own.get("sizes", {})
    return all(_has_size(out_dir / name, sizes.get(name)) for name in own["xxh64"])


def _has_size(file: Path, size: int | None) -> bool:
    """Return whether a file exists with this size; None: with any size but 0."""
    if not file.is_file():
        return False
    return file.stat().st_size == size if size is not None else file.stat().st_size > 0


def check_packed(out_dir: Path) -> str:
    """Hash all packed files; return how many images they hold.

    Raises:
        UserError: if a file is damaged or missing.
    """
    record = _read_packed(out_dir)
    for kind, own in record.items():
        for name, digest in own["xxh64"].items():
            file = out_dir / name
            if not file.is_file() or hash_file(file) != digest:
                found = "does not have the hash in" if file.is_file() else "is missing, but listed in"
                raise UserError(
                    f"{file} {found} {out_dir / PACKED_FILE}; delete {_target(kind, out_dir)} and run the same `flowar "
                    "sample` again, which packs it again"
                )
    return ", ".join(f"{own['num_images']:,} images as {kind}" for kind, own in record.items())


def write_npz(files: Sequence[Path], labels: Sequence[int], target: Path, read: Read) -> None:
    """Write arr_0, uint8 (N, H, W, 3), and arr_1, the labels, as ADM's evaluator reads them.

    The order is random but fixed, as that evaluator computes the Inception score over consecutive parts, which goes
    wrong if the images are sorted by class.
    """
    order = np.random.default_rng(PERMUTATION_SEED).permutation(len(files))
    height, width, channels = read_pixels(files[0], read).shape

    def write(hidden: Path) -> None:
        with zipfile.ZipFile(hidden, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                _write_header(member, np.uint8, (len(files), height, width, channels))
                for number in order:
                    member.write(read_pixels(files[number], read).tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                _write_header(member, np.int64, (len(files),))
                member.write(np.asarray(labels, dtype=np.int64)[order].tobytes())

    write_whole(target, write)


def _write_header(member: object, dtype: type, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def write_tars(files: Sequence[Path], labels: Sequence[int], target: Path, read: Read) -> None:
    """Write WebDataset tars of 000000.png and 000000.cls, always with the same bytes."""

    def write(hidden: Path) -> None:
        for first in range(0, len(files), IMAGES_PER_TAR):
            with tarfile.open(hidden / f"samples-{first // IMAGES_PER_TAR:05d}.tar", "w") as archive:
                for number in range(first, min(first + IMAGES_PER_TAR, len(files))):
                    for suffix, content in (("png", read(files[number])), ("cls", str(labels[number]).encode())):
                        member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))

    _write_folder(target, write)


def write_mds(files: Sequence[Path], labels: Sequence[int], target: Path, read: Read) -> None:
    """Write MDS shards of image, label and number."""
    from streaming import MDSWriter

    logging.getLogger("streaming").setLevel(logging.ERROR)

    def write(hidden: Path) -> None:
        with MDSWriter(out=str(hidden), columns=MDS_COLUMNS, hashes=["xxh64"]) as writer:
            for number, (file, label) in enumerate(zip(files, labels, strict=True)):
                image = Image.fromarray(read_pixels(file, read))
                writer.write({"image": image, "label": int(label), "number": number})

    _write_folder(target, write)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


def _write_folder(target: Path, write: Callable[[Path], None]) -> None:
    hidden = _hidden(target)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    write(hidden)
    publish_folder(hidden, target)


def read_pixels(file: Path, read: Read = Path.read_bytes) -> NDArray[np.uint8]:
    """Return an image as uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(read(file))) as image:
        return np.asarray(image.convert("RGB"))


PACKERS = {"npz": write_npz, "tar": write_tars, "mds": write_mds}
