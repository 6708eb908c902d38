"""The layout of a folder of samples, and which settings decide what image i is. Read next: job.py.

OUT_DIR/
    samples.json                    what is drawn: the settings, hashes of the weights, versions; written first, by one
    images/000123_class0045.png     image 123, of class 45; with names=true 000123_class0045_sneaker.png
    images.xxh64                    the hashes of all images, as `xxh64sum -c` reads them; written last
    hashes/                         of images that were drawn since; each file is written before its images
    grid.png                        the first images
    features-NETWORK/               instead of images, where only features are kept: evaluation/store.py
    claims/                         who draws what, while it is drawn
    model/                          a copy of a training run's weights, while it is drawn: weights.py
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
IDENTITY = "identity"  # in samples.json: a hash of what decides what image i is
CLASS_NAMES = "class_names"  # in samples.json, by class number, where the model comes with its dataset's passport
ABOUT = (
    "variant",
    "step",
    "flowar",
    "torch",
    IDENTITY,
    CLASS_NAMES,
)  # in samples.json, beside the settings; nothing of image i
SAMPLE_NAME = re.compile(r"(\d{6,})_class(\d{4,})(?:_[A-Za-z0-9-]+)?\.png")  # the name of the class may follow
LONGEST_NAME = 40  # characters of a class's name in a file name
HASH_LINE = re.compile(rf"([0-9a-f]{{16}})  {IMAGES_FOLDER}/({SAMPLE_NAME.pattern})")
OWNER_KEY = "flowar"  # text in a PNG file: the identity of its samples, and its number
SAMPLES_CURE = "restore it from a copy, or draw the samples again into another folder"


def hash_json(*parts: object) -> str:
    """Return a hash of values that JSON can hold."""
    return xxhash.xxh64(json.dumps(parts).encode()).hexdigest()


def settings_of_images(record: dict[str, Any]) -> dict[str, Any]:
    """Return what in a samples.json decides what image i is."""
    plain = json.loads(json.dumps(record))
    return {key: value for key, value in plain.items() if key not in ABOUT and not is_free(SampleConfig, key)}


def identify(record: dict[str, Any]) -> str:
    """Return a hash of what decides what image i is; samples of version 0.1 don't name theirs."""
    return str(record.get(IDENTITY) or hash_json(sorted(settings_of_images(record).items())))


def read_samples(folder: Path) -> dict[str, Any]:
    """Return what samples.json says.

    Raises:
        DamagedRecordError: if it is not what was written.
        FileNotFoundError: if there is none.
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
    """Return the number of an image with this name."""
    return int(name.partition("_")[0])


def class_of(name: str) -> int:
    """Return the class of an image with this name, whatever the class is called."""
    match = SAMPLE_NAME.fullmatch(name)
    assert match is not None  # `drawn_names` gives no others
    return int(match[2])


def file_safe(name: str) -> str:
    """Return the name of a class as it stands in file names: letters, digits and hyphens; "" if nothing is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:LONGEST_NAME].strip("-")


def find_drawn(folder: Path) -> Path | None:
    """Return something that `flowar sample` drew or noted in a folder, beside samples.json, or None."""
    drawn = [folder / IMAGES_FOLDER / name for name in drawn_names(folder)[:1]]
    return next((path for path in (*drawn, folder / HASHES_FILE, *folder.glob("features-*")) if path.exists()), None)


def refuse_unrecorded(folder: Path) -> None:
    """Raise a UserError if a folder holds samples, but not the record that says what they are."""
    drawn = find_drawn(folder)  # before looking for the record, which whoever draws writes first
    if drawn is not None and not (folder / SAMPLES_FILE).exists():
        raise UserError(
            f"{folder} holds {drawn.relative_to(folder)}, but no {SAMPLES_FILE}, which says of which model and seed it "
            f"is; restore {folder / SAMPLES_FILE} from a copy, or draw into another folder"
        )


def read_hashes(file: Path) -> dict[str, str]:
    """Return the hashes of a file as `xxh64sum` writes it, by the images' names.

    Raises:
        UserError: if a line of it is not of that form, or an image has two.
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
        "which draws again what has no hash"
    )


def write_new_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Note the hashes of images that are about to be written.

    In a file of its own, so that any number of processes can, and before the images, so that whenever a process dies
    there is no image of its without a hash.
    """
    file = folder / NEW_HASHES / f"{min(hashes)[:-4]}.{secrets.token_hex(4)}.xxh64"
    text = "".join(f"{digest}  {IMAGES_FOLDER}/{name}\n" for name, digest in hashes.items())
    for is_last in (False, True):
        file.parent.mkdir(exist_ok=True)
        try:
            write_text(file, text)
            return
        except FileNotFoundError:  # the folder was tidied up
            if is_last:
                raise


class HashBook:
    """The hashes of all images of a folder: those in images.xxh64, and those of what was drawn since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, set[str]] = {}
        self._read: dict[Path, int] = {}  # files that were read, and when they were written

    def new_files(self) -> list[Path]:
        """Return the files with hashes that are not in images.xxh64 yet."""
        return sorted((self.folder / NEW_HASHES).glob("[!.]*.xxh64"))

    def look(self) -> dict[str, set[str]]:
        """Return {name: its hashes} as of now. An image that was drawn twice has two, and either will do.

        Raises:
            UserError: if one of the files is damaged.
        """
        for file in self.new_files():  # which never change
            if file not in self._read:
                with contextlib.suppress(FileNotFoundError):  # whoever finishes has put them together meanwhile
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
        hashes: of which it must have one.
        identity: of its samples, which it names itself, unless it is of version 0.1.

    Raises:
        UserError: if it is not what was drawn, or of other samples.
    """
    content = file.read_bytes()
    if xxhash.xxh64(content).hexdigest() not in hashes:
        raise UserError(
            f"{file} does not have the hash in {file.parent.parent / HASHES_FILE}; delete it and run the same `flowar "
            "sample` again, which draws it anew"
        )
    check_owner(file, content, identity)
    return content


def check_owner(file: Path, content: bytes, identity: str) -> None:
    """Raise a UserError if an image says that it is another one, or of other samples."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            owner = getattr(image, "text", {}).get(OWNER_KEY)
    except Exception as error:  # damaged images raise any kind
        raise UserError(f"{file} is damaged: {error}; delete it and run the same `flowar sample` again") from error
    if owner not in (None, f"{identity}/{number_of(file.name)}"):
        raise UserError(
            f"{file} is image {owner} of other samples than {file.parent.parent / SAMPLES_FILE} says, which are "
            f"{identity}; delete it and run the same `flowar sample` again, or put back the record of the images"
        )


def merge_hashes(folder: Path, hashes: dict[str, set[str]], identity: str) -> dict[str, str]:
    """Return one hash for each image; where one was drawn twice that of the file that is there.

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
    """Write images.xxh64, which says that all is done; remove the files that were put together."""
    text = "".join(f"{digest}  {IMAGES_FOLDER}/{name}\n" for name, digest in hashes.items())
    write_text(folder / HASHES_FILE, text)
    for file in merged:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has just noted something
        (folder / NEW_HASHES).rmdir()
