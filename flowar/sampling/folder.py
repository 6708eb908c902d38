"""The layout of a folder of samples, and the settings that determine image i. Read next: job.py.

OUT_DIR/
    samples.json                    what is drawn: the settings, hashes of the weights, versions; written first, by one
    images/000123_class0045.png     image 123, of class 45; with names=true 000123_class0045_sneaker.png
    images.xxh64                    the hashes of all images, as `xxh64sum -c` reads them; written last
    hashes/                         hashes of images drawn since; each file is written before its images
    grid.png                        the first images
    features-NETWORK/               instead of images, if only features are kept: evaluation/store.py
    claims/                         which process draws what, while drawing
    model/                          a copy of a training run's weights, while drawing: weights.py
"""

import contextlib
import io
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.base.records import DamagedRecordError, read_record
from flowar.config.drawing import SampleConfig
from flowar.config.load import is_free

SAMPLES_FILE = "samples.json"
IMAGES_FOLDER = "images"
HASHES_FILE, NEW_HASHES = "images.xxh64", "hashes"
IDENTITY = "identity"  # in samples.json: a hash of all that determines image i
CLASS_NAMES = "class_names"  # in samples.json, by class number, if the model has its dataset's passport
ABOUT = (
    "variant",
    "step",
    "flowar",
    "torch",
    IDENTITY,
    CLASS_NAMES,
)  # in samples.json, beside the settings; these don't affect image i
SAMPLE_NAME = re.compile(r"(\d{6,})_class(\d{4,})(?:_[A-Za-z0-9-]+)?\.png")  # the name of the class may follow
LONGEST_NAME = 40  # characters of a class's name in a file name
HASH_LINE = re.compile(rf"([0-9a-f]{{16}})  {IMAGES_FOLDER}/({SAMPLE_NAME.pattern})")
OWNER_KEY = "flowar"  # text in a PNG file: the identity of its samples, and its number
SAMPLES_CURE = "restore it from a copy, or draw the samples again into another folder"


def hash_json(*parts: object) -> str:
    """Return a hash of values that JSON can hold."""
    return xxhash.xxh64(json.dumps(parts).encode()).hexdigest()


def settings_of_images(record: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a samples.json that determine image i."""
    plain = json.loads(json.dumps(record))
    return {key: value for key, value in plain.items() if key not in ABOUT and not is_free(SampleConfig, key)}


def identify(record: dict[str, Any]) -> str:
    """Return a hash of all that determines image i; samples of version 0.1 don't record it."""
    return str(record.get(IDENTITY) or hash_json(sorted(settings_of_images(record).items())))


def read_samples(folder: Path) -> dict[str, Any]:
    """Return the content of samples.json.

    Raises:
        DamagedRecordError: if the file is not what was written.
        FileNotFoundError: if there is no such file.
    """
    file = folder / SAMPLES_FILE
    record = read_record(file, SAMPLES_CURE)
    number = record.get("num_images")
    if type(number) is not int or number < 1:
        raise DamagedRecordError(f"{file} is damaged (num_images is {number!r}); {SAMPLES_CURE}")
    return record


def drawn_names(folder: Path) -> list[str]:
    """Return the names of the images in a folder of samples."""
    images = folder / IMAGES_FOLDER
    names = [entry.name for entry in os.scandir(images)] if images.is_dir() else []
    return sorted(name for name in names if SAMPLE_NAME.fullmatch(name))


def number_of(name: str) -> int:
    """Return the number of the image with this file name."""
    return int(name.partition("_")[0])


def class_of(name: str) -> int:
    """Return the class number of the image with this file name."""
    match = SAMPLE_NAME.fullmatch(name)
    assert match is not None  # `drawn_names` gives only such names
    return int(match[2])


def file_safe(name: str) -> str:
    """Return the name of a class for file names: letters, digits and hyphens; "" if nothing is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:LONGEST_NAME].strip("-")


def find_drawn(folder: Path) -> Path | None:
    """Return a file or folder, apart from samples.json, that `flowar sample` wrote in a folder, or None."""
    drawn = [folder / IMAGES_FOLDER / name for name in drawn_names(folder)[:1]]
    return next((path for path in (*drawn, folder / HASHES_FILE, *folder.glob("features-*")) if path.exists()), None)


def refuse_unrecorded(folder: Path) -> None:
    """Raise a UserError if a folder holds samples, but not the record that describes them."""
    drawn = find_drawn(folder)  # before looking for the record, which a drawing process writes first
    if drawn is not None and not (folder / SAMPLES_FILE).exists():
        raise UserError(
            f"{folder} holds {drawn.relative_to(folder)}, but no {SAMPLES_FILE}, which records its model and seed; "
            f"restore {folder / SAMPLES_FILE} from a copy, or draw into another folder"
        )


def read_hashes(file: Path) -> dict[str, str]:
    """Return {image name: hash} from a file in the format of `xxh64sum`.

    Raises:
        UserError: if a line has another format, or an image has two hashes.
    """
    found: dict[str, str] = {}
    try:
        text = file.read_text()
    except ValueError as error:
        raise UserError(_damaged_hashes(file, str(error))) from error
    for number, line in enumerate(text.splitlines(), start=1):
        match = HASH_LINE.fullmatch(line)
        if match is None or match[2] in found or not text.endswith("\n"):
            raise UserError(_damaged_hashes(file, f"line {number} is {line[:60]!r}"))
        found[match[2]] = match[1]
    return found


def _damaged_hashes(file: Path, problem: str) -> str:
    return (
        f"{file} is damaged ({problem}); restore it from a copy, or delete it and run the same `flowar sample` again, "
        "which redraws the images without a hash"
    )


def write_new_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Record the hashes of images that are about to be written.

    Each call writes its own file, so any number of processes can call it. Hashes come before their images, so that a
    process that dies leaves no image without a hash.
    """
    file = folder / NEW_HASHES / f"{min(hashes)[:-4]}.{secrets.token_hex(4)}.xxh64"
    text = "".join(f"{digest}  {IMAGES_FOLDER}/{name}\n" for name, digest in hashes.items())
    for is_last in (False, True):
        file.parent.mkdir(exist_ok=True)
        try:
            write_text(file, text)
            return
        except FileNotFoundError:  # another process has just removed the folder
            if is_last:
                raise


class HashBook:
    """The hashes of all images of a folder: those in images.xxh64, and those of images drawn since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, set[str]] = {}
        self._read: dict[Path, int] = {}  # files that were read, and when they were written

    def new_files(self) -> list[Path]:
        """Return the files with hashes that are not in images.xxh64 yet."""
        return sorted((self.folder / NEW_HASHES).glob("[!.]*.xxh64"))

    def look(self) -> dict[str, set[str]]:
        """Return {name: its hashes} as of now. An image that was drawn twice has two, and either is valid.

        Raises:
            UserError: if one of the files is damaged.
        """
        for file in self.new_files():  # these never change
            if file not in self._read:
                with contextlib.suppress(FileNotFoundError):  # a finishing process has just merged them
                    self._add(file)
        file = self.folder / HASHES_FILE
        if file.exists() and self._read.get(file) != file.stat().st_mtime_ns:
            self._add(file)
        return self._hashes

    def _add(self, file: Path) -> None:
        stamp = file.stat().st_mtime_ns
        for name, digest in read_hashes(file).items():
            self._hashes.setdefault(name, set()).add(digest)
        self._read[file] = stamp


def read_drawn(file: Path, hashes: Collection[str], identity: str) -> bytes:
    """Return the bytes of an image.

    Args:
        file: the image.
        hashes: one of them must match.
        identity: of its samples; the image names it too, unless version 0.1 drew it.

    Raises:
        UserError: if the image is damaged, or belongs to other samples.
    """
    content = file.read_bytes()
    if xxhash.xxh64(content).hexdigest() not in hashes:
        raise UserError(
            f"{file} does not have the hash in {file.parent.parent / HASHES_FILE}; delete it and run the same `flowar "
            "sample` again, which redraws it"
        )
    check_owner(file, content, identity)
    return content


def check_owner(file: Path, content: bytes, identity: str) -> None:
    """Raise a UserError if an image says that it has another number, or belongs to other samples."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            owner = getattr(image, "text", {}).get(OWNER_KEY)
    except Exception as error:  # damaged images raise any kind
        raise UserError(f"{file} is damaged: {error}; delete it and run the same `flowar sample` again") from error
    if owner not in (None, f"{identity}/{number_of(file.name)}"):
        raise UserError(
            f"{file} should be image {identity}/{number_of(file.name)} by {file.parent.parent / SAMPLES_FILE}, but is "
            f"{owner}; delete it and run the same `flowar sample` again, or restore the record of these images"
        )


def merge_hashes(folder: Path, hashes: dict[str, set[str]], identity: str) -> dict[str, str]:
    """Return one hash for each image; for an image that was drawn twice, the hash of the existing file.

    Raises:
        UserError: as `read_drawn`.
    """
    found = {}
    for name, own in sorted(hashes.items()):
        if len(own) > 1:
            content = read_drawn(folder / IMAGES_FOLDER / name, own, identity)
            own = {xxhash.xxh64(content).hexdigest()}
        (found[name],) = own
    return found


def write_hashes(folder: Path, hashes: dict[str, str], merged: Iterable[Path]) -> None:
    """Write images.xxh64, which marks the samples as complete; remove the files that were merged."""
    text = "".join(f"{digest}  {IMAGES_FOLDER}/{name}\n" for name, digest in hashes.items())
    write_text(folder / HASHES_FILE, text)
    for file in merged:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process has just written there
        (folder / NEW_HASHES).rmdir()
