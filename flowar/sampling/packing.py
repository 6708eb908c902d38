"""Drawn images in the forms that others read: ADM's .npz, WebDataset tars, MDS. Read next: sample.py."""

import io
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowar.base.files import publish_folder, write_text, write_whole
from flowar.base.hashes import hash_file

PACKED_FILE = "packed.json"  # what was packed: how many images, and the xxh3 of every file
PERMUTATION_SEED = 0  # of the .npz: always the same order for as many images
IMAGES_PER_TAR = 10_000
MDS_COLUMNS = {"image": "png", "label": "int", "number": "int"}


def pack_images(kind: str, files: Sequence[Path], labels: Sequence[int], out_dir: Path) -> Path:
    """Write all images in one more form, whole or not at all; nothing if that was done before.

    Args:
        kind: npz, tar or mds.
        files: PNG files, image 0 first.
        labels: their classes.
        out_dir: gets samples.npz, tar/ or mds/, and packed.json.

    Returns:
        What was written.
    """
    record_file = out_dir / PACKED_FILE
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    target = _target(kind, out_dir)
    if is_packed(kind, len(files), out_dir):
        return target
    if target.is_dir():
        shutil.rmtree(target)  # of fewer images
    PACKERS[kind](files, labels, target)
    written = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(out_dir)): hash_file(path) for path in written}
    write_text(record_file, json.dumps(record | {kind: {"num_images": len(files), "xxh64": hashes}}, indent=2) + "\n")
    return target


def _target(kind: str, out_dir: Path) -> Path:
    return out_dir / ("samples.npz" if kind == "npz" else kind)


def is_packed(kind: str, num_images: int, out_dir: Path) -> bool:
    """Return whether so many images are packed in this form."""
    file = out_dir / PACKED_FILE
    record = json.loads(file.read_text()) if file.exists() else {}
    return record.get(kind, {}).get("num_images") == num_images and _target(kind, out_dir).exists()


def write_npz(files: Sequence[Path], labels: Sequence[int], target: Path) -> None:
    """Write arr_0, uint8 (N, H, W, 3), and arr_1, the labels, as ADM's evaluator reads them.

    In a fixed random order: that evaluator takes the Inception score over consecutive parts, which goes wrong where
    classes come one after the other.
    """
    order = np.random.default_rng(PERMUTATION_SEED).permutation(len(files))
    height, width, channels = read_pixels(files[0]).shape

    def write(hidden: Path) -> None:
        with zipfile.ZipFile(hidden, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                _write_header(member, np.uint8, (len(files), height, width, channels))
                for number in order:
                    member.write(read_pixels(files[number]).tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                _write_header(member, np.int64, (len(files),))
                member.write(np.asarray(labels, dtype=np.int64)[order].tobytes())

    write_whole(target, write)


def _write_header(member: object, dtype: type, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def write_tars(files: Sequence[Path], labels: Sequence[int], target: Path) -> None:
    """Write WebDataset tars of 000000.png and 000000.cls; the same bytes each time."""

    def write(hidden: Path) -> None:
        for first in range(0, len(files), IMAGES_PER_TAR):
            with tarfile.open(hidden / f"samples-{first // IMAGES_PER_TAR:05d}.tar", "w") as archive:
                for number in range(first, min(first + IMAGES_PER_TAR, len(files))):
                    for suffix, content in (("png", files[number].read_bytes()), ("cls", str(labels[number]).encode())):
                        member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))

    _write_folder(target, write)


def write_mds(files: Sequence[Path], labels: Sequence[int], target: Path) -> None:
    """Write MDS shards of image, label and number."""
    from streaming import MDSWriter

    logging.getLogger("streaming").setLevel(logging.ERROR)

    def write(hidden: Path) -> None:
        with MDSWriter(out=str(hidden), columns=MDS_COLUMNS, hashes=["xxh64"]) as writer:
            for number, (file, label) in enumerate(zip(files, labels, strict=True)):
                with Image.open(file) as image:
                    writer.write({"image": image.convert("RGB"), "label": int(label), "number": number})

    _write_folder(target, write)


def _write_folder(target: Path, write: Callable[[Path], None]) -> None:
    hidden = target.with_name(f".{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    write(hidden)
    publish_folder(hidden, target)


def read_pixels(file: Path) -> NDArray[np.uint8]:
    """Return an image as uint8 (H, W, 3)."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


PACKERS = {"npz": write_npz, "tar": write_tars, "mds": write_mds}
