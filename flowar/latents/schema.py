"""What a prepared dataset holds: the columns of its shards, and its passport `dataset.json`. No images, no shards.

A dataset is a folder:
    dataset.json             the passport; written last, so that without it the dataset is not finished
    listing.json.gz          every image of the source: name, class, where it lay
    index.json               MDS index of all shards
    00000/shard.00000.mds    shards, in one folder per chunk of the source

Row image x views + view is one view of one image; images are numbered in the order of the listing without the skipped.
Read next: encode.py, which writes it; flowar/data.py, which reads it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.config.data import Crop
from flowar.config.load import free

SCHEMA_VERSION = 2
PASSPORT_FILE = "dataset.json"
LISTING_FILE = "listing.json.gz"
INDEX_FILE = "index.json"
SHARD_HASH = "xxh64"


def shard_columns(moments_shape: Sequence[int], moments_dtype: str) -> dict[str, str]:
    """Return the MDS columns: moments (2 C, h, w) as the VAE's encoder gives them, the class number, and a checksum."""
    shape = ",".join(str(size) for size in moments_shape)
    return {"checksum": "int", "label": "int", "moments": f"ndarray:{moments_dtype}:{shape}"}


def row_dtype(moments_shape: Sequence[int], moments_dtype: str) -> np.dtype[np.void]:
    """Return how one row lies in a shard: MDS puts columns of fixed size side by side, in the order of their names."""
    moments = np.dtype(moments_dtype).newbyteorder("<")
    return np.dtype([("checksum", "<i8"), ("label", "<i8"), ("moments", moments, tuple(moments_shape))])


def row_checksum(moments: NDArray[Any], label: int) -> int:
    """Return the checksum of one row, 64 bits with a sign: XXH3 of the moments' bytes, seeded with the label."""
    return int.from_bytes(xxhash.xxh3_64_digest(moments.tobytes(), seed=label), "big", signed=True)


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
    write_text(folder / PASSPORT_FILE, json.dumps(dataclasses.asdict(passport), indent=2) + "\n")


def read_passport(folder: str | Path) -> Passport:
    """Return the passport of a prepared dataset.

    Raises:
        UserError: if the folder is missing, unfinished, or of another schema version.
    """
    file = Path(folder) / PASSPORT_FILE
    if not Path(folder).is_dir():
        raise UserError(f"data.path={folder} does not exist; write it with `flowar prepare`")
    if not file.is_file():
        raise UserError(
            f"data.path={folder} has no {PASSPORT_FILE}, so it is no finished dataset; write one with `flowar prepare`"
        )
    try:
        content = json.loads(file.read_text())
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{file} has schema version {version}, this flowar reads {SCHEMA_VERSION}; prepare it again"
            )
        return Passport(**content)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}; prepare the dataset again") from error
