"""The layout of a folder of samples, and which settings decide what image i is. Read next: job.py.

OUT_DIR/
    samples.json                    what was drawn: the settings, hashes of the weights, versions
    images/000123_class0045.png     image 123, of class 45
    images.xxh64                    the hashes of all images; written last
    grid.png                        the first images
    features-NETWORK/               instead of images, where only features are kept: evaluation/store.py
    claims/                         who draws what, while it is drawn
"""

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from flowar.config.drawing import SampleConfig
from flowar.config.load import is_free

SAMPLES_FILE = "samples.json"
IMAGES_FOLDER = "images"
HASHES_FILE = "images.xxh64"
ABOUT = ("variant", "step", "flowar", "torch")  # in samples.json, beside the settings; say nothing of image i
SAMPLE_NAME = re.compile(r"(\d{6,})_class(\d{4,})\.png")


def hash_json(*parts: object) -> str:
    """Return a hash of values that JSON can hold."""
    return xxhash.xxh64(json.dumps(parts).encode()).hexdigest()


def settings_of_images(record: dict[str, Any]) -> dict[str, Any]:
    """Return what in a samples.json decides what image i is."""
    plain = json.loads(json.dumps(record))
    return {key: value for key, value in plain.items() if key not in ABOUT and not is_free(SampleConfig, key)}


def identify(record: dict[str, Any]) -> str:
    """Return a hash of what decides what image i is."""
    return hash_json(sorted(settings_of_images(record).items()))


def read_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of what `flowar sample` drew, by the files' names below the folder."""
    file = folder / HASHES_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
