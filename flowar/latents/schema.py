"""What a prepared dataset holds: the columns of its shards, and its passport `dataset.json`. No images, no shards.

A dataset is a folder:
    dataset.json             the passport; written last, so that without it the dataset is not finished
    listing.json.gz          every image of the source: name, class, where it lay
    index.json               MDS index of all shards
    00000/shard.00000.mds    shards, in one folder per chunk of the source

Row image x views + view is one view of one image; images are numbered in the order of the listing without the skipped.
Read next: data_prep/encode.py, which writes it; batches.py, which reads it.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from flowar.base.errors import UserError
from flowar.base.records import HASH_KEY, DamagedRecordError, hash_record, read_record, write_record
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.data import Crop
from flowar.config.load import free

SCHEMA_VERSION = 3
FIRST_READ_VERSION = (
    2  # of flowar 0.1: its passport has no hash of its own, and a row's checksum doesn't say where the row belongs
)
LISTING_FILE = "listing.json.gz"
INDEX_FILE = "index.json"
SHARD_HASH = "xxh64"
# What one view of one image, and its row, follows from.
ROW_SETTINGS = (
    *("image_size", "crop", "resize", "flip", "views", "seed"),
    *("vae_sha256", "latent_shift", "moments_shape", "moments_dtype"),
)
PASSPORT_CURE = "copy it again from where the dataset or the run came from, or prepare the dataset again"


def shard_columns(moments_shape: Sequence[int], moments_dtype: str) -> dict[str, str]:
    """Return the MDS columns: moments (2 C, h, w) as the VAE's encoder gives them, the class number, and a checksum."""
    shape = ",".join(str(size) for size in moments_shape)
    return {"checksum": "int", "label": "int", "moments": f"ndarray:{moments_dtype}:{shape}"}


def row_dtype(moments_shape: Sequence[int], moments_dtype: str) -> np.dtype[np.void]:
    """Return how one row lies in a shard: MDS puts columns of fixed size side by side, in the order of their names."""
    moments = np.dtype(moments_dtype).newbyteorder("<")
    return np.dtype([("checksum", "<i8"), ("label", "<i8"), ("moments", moments, tuple(moments_shape))])


def row_checksum(moments: NDArray[Any], label: int, place: int = 0) -> int:
    """Return the checksum of one row, 64 bits with a sign: XXH3 of the moments' bytes, seeded with label and place.

    Args:
        moments: of the row, as stored.
        label: its class number.
        place: where the row belongs, from `row_place`; 0 in datasets of version 0.1, whose rows don't say that.
    """
    seed = (place + label) % 2**64
    return int.from_bytes(xxhash.xxh3_64_digest(moments.tobytes(), seed=seed), "big", signed=True)


def hash_row_settings(settings: Mapping[str, Any]) -> int:
    """Return a hash, 64 bits, of how the rows of a dataset were made, from its settings or its passport's fields."""
    return int(hash_record({key: settings[key] for key in ROW_SETTINGS}), 16)


def row_place(made_how: int, chunk: int, row: int) -> int:
    """Return what tells a row's place from all others: a row or shard that was swapped has another checksum.

    Labels are below 2^20 (data_prep/limits.py), and a chunk has fewer than 2^24 rows in any sensible dataset; where it
    has more, two far places share a number.

    Args:
        made_how: from `hash_row_settings`: rows that were made in another way are of another place.
        chunk: its number.
        row: the row's number in the chunk.
    """
    return made_how + (chunk << 44) + (row << 20)


class LatentScale(NamedTuple):
    """What brings samples of moments to unit std: latents = (sample - shift) x multiplier; one each, or per channel."""

    multiplier: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0


@dataclass(frozen=True, kw_only=True)
class Passport:
    """Where a dataset came from; trainer and sampler refuse one that doesn't fit."""

    schema_version: int
    # What was encoded.
    images: str = free()  # as given to `flowar prepare`; the hashes say what it held
    source_kind: str
    listing_sha256: str  # of the names and labels of all images of the source
    num_images: int  # that are in the dataset
    class_names: list[str]  # the class number is the place in this list
    class_counts: list[int]  # images, not views
    skipped: dict[str, str]  # number of an image in the listing -> its name, and why it could not be read
    # How.
    image_size: int
    crop: Crop
    resize: int  # short side in pixels before the crop
    flip: bool
    views: int  # stored of each image
    seed: int  # of random crops
    vae_name: str
    vae_sha256: str
    latent_multiplier: float
    latent_shift: float
    moments_shape: list[int]  # 2 C, h, w
    moments_dtype: str
    batch_size: int
    chunk_images: int
    shard_size_mib: int
    precision: str
    skip_unreadable: bool
    encoded_with: list[dict[str, str]] = free()  # versions and device of the workers, each combination once
    # Measured.
    latent_mean: list[float]  # of the latents before the multiplier, per channel
    latent_std: list[float]
    measured_multiplier: float  # 1 / std of all latents: what latent_multiplier should be near to
    rounding_error_max: float  # of the moments by moments_dtype, absolute
    rounding_error_rms: float
    shard_hashes: dict[str, str]  # file -> xxh64
    shards: list[list[Any]] = field(default_factory=list)  # [file, rows, bytes] in order; none in datasets of 0.1
    psnr_db: float = 0.0  # of some images that the VAE gave back; 0: none was measured, as by 0.1
    normalize: str = "vae"  # in the copy of a training run: its data.normalize

    @property
    def latent_scale(self) -> LatentScale:
        """What a run's `data.normalize` takes: the VAE's one multiplier, or the mean and std of each channel."""
        if self.normalize == "vae":
            return LatentScale(self.latent_multiplier)
        return LatentScale(tuple(1 / std for std in self.latent_std), tuple(self.latent_mean))

    @property
    def latent_channels(self) -> int:
        return self.moments_shape[0] // 2

    @property
    def latent_size(self) -> int:
        return self.moments_shape[1]

    @property
    def num_rows(self) -> int:
        return self.num_images * self.views


def write_passport(passport: Passport, folder: Path) -> None:
    """Write dataset.json into `folder`."""
    write_record(folder / PASSPORT_FILE, dataclasses.asdict(passport))


def read_passport(folder: str | Path) -> Passport:
    """Return the passport of a prepared dataset.

    Raises:
        UserError: if the folder is missing, unfinished, or of another schema version, or the passport is damaged.
    """
    file = Path(folder) / PASSPORT_FILE
    if not Path(folder).is_dir():
        raise UserError(f"data.path={folder} does not exist; write it with `flowar prepare`")
    if not file.is_file():
        raise UserError(
            f"data.path={folder} has no {PASSPORT_FILE}, so it is not a finished dataset; write one with `flowar "
            "prepare`"
        )
    try:
        content = read_record(file, PASSPORT_CURE)
        has_hash = f'"{HASH_KEY}"' in file.read_text()
    except OSError as error:
        raise UserError(f"can't read {file}: {error}; check its storage and its permissions") from error
    version: Any = content.get("schema_version")
    if version not in range(FIRST_READ_VERSION, SCHEMA_VERSION + 1):
        raise UserError(
            f"{file} has schema version {version}, this flowar reads {FIRST_READ_VERSION} to {SCHEMA_VERSION}; prepare "
            "it again"
        )
    problem = _problem_of(content)
    if problem is None and not has_hash and version > FIRST_READ_VERSION:
        problem = f'its hash "{HASH_KEY}" is missing: it was edited'
    if problem is not None:
        raise DamagedRecordError(f"{file} is damaged ({problem}); {PASSPORT_CURE}")
    return Passport(**content)


def _problem_of(content: dict[str, Any]) -> str | None:
    """Return what keeps values from being a passport's: a field that is missing, unknown, or of another type."""
    hints = typing.get_type_hints(Passport)
    fields = dataclasses.fields(Passport)
    needed = {item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING}
    strange = sorted((needed - content.keys()) | (content.keys() - hints.keys()))
    if strange:
        return f"{strange[0]} is {'missing' if strange[0] in hints else 'not a field of a passport'}"
    for name, value in content.items():
        kind = typing.get_origin(hints[name]) or hints[name]
        if kind is typing.Literal:
            is_right = value in typing.get_args(hints[name])
        else:
            is_right = isinstance(value, (int, float) if kind is float else kind)
        if not is_right:
            return f"{name} is {str(value)[:40]!r}, but {hints[name]} is needed"
    if len(content["class_counts"]) != len(content["class_names"]):
        return f"{len(content['class_names'])} classes have {len(content['class_counts'])} class_counts"
    return None
