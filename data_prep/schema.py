"""What a prepared dataset holds: the columns of its shards, and its passport `dataset.json`. No images, no shards.

Read next: encode.py, which writes both; flowar/data.py, which reads both.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from flowar.errors import UserError
from flowar.files import write_text

SCHEMA_VERSION = 1
PASSPORT_FILE = "dataset.json"  # written last: without it a dataset is not finished
MOMENTS_DTYPE = "float16"


def shard_columns(moments_shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the MDS columns: moments (2 C, h, w) as the VAE's encoder gives them, unscaled, and the class number."""
    shape = ",".join(str(size) for size in moments_shape)
    return {"label": "int", "moments": f"ndarray:{MOMENTS_DTYPE}:{shape}"}


@dataclass(frozen=True, kw_only=True)
class Passport:
    """Where a dataset came from; trainer and sampler refuse one that doesn't fit."""

    schema_version: int
    vae_name: str
    vae_sha256: str
    latent_multiplier: float
    latent_mean: list[float]  # measured, per channel, before the multiplier
    latent_std: list[float]
    image_size: int
    crop: str
    moments_shape: list[int]  # 2 C, h, w
    class_names: list[str]  # the class number is the place in this list
    class_counts: list[int]
    num_samples: int
    skipped: list[str]  # images that could not be read

    @property
    def latent_channels(self) -> int:
        return self.moments_shape[0] // 2

    @property
    def latent_size(self) -> int:
        return self.moments_shape[1]


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
