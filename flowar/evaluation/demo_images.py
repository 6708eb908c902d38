"""Real images for the demo, at 32 px: scikit-learn's digits, and Fashion-MNIST's clothes. Read next: demo.py."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from flowar.base.errors import UserError

IMAGE_SIZE = 32
NUM_CLASSES = 10
HELD_OUT_SHARE = 0.2  # 360 of 1,797 images
SPLIT_SEED = 0
GREY_LEVELS = 16  # of scikit-learn's 8 x 8 digits: 0 to 16

FASHION_SIDE, FASHION_MARGIN = 28, 2  # pixels; the margin pads it to IMAGE_SIZE
FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")  # Debian's; torchvision's
FASHION_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
IDX_HEADER = {1: 8, 3: 16}  # bytes, by the number of dimensions


class RealImages(NamedTuple):
    """Images of one split."""

    images: NDArray[np.uint8]  # (N, 32, 32, 3)
    labels: NDArray[np.int64]  # (N,)


def load_splits() -> dict[str, RealImages]:
    """Return {"train", "held_out"} of the digits, split by class with a fixed seed."""
    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    train_images, held_images, train_labels, held_labels = train_test_split(
        images, digits.target, test_size=HELD_OUT_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )
    return {"train": RealImages(train_images, train_labels), "held_out": RealImages(held_images, held_labels)}


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    grey = Image.fromarray((image / GREY_LEVELS * 255).round().astype(np.uint8))
    return np.asarray(grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def load_fashion(folder: str | None = None) -> dict[str, RealImages]:
    """Return {"train", "held_out"} of Fashion-MNIST: 60,000 and 10,000 images of clothes.

    Args:
        folder: with its four idx files, plain or as .gz; None: where Debian or torchvision puts them.

    Raises:
        UserError: if the files are missing or damaged.
    """
    places = [Path(place) for place in ((folder,) if folder is not None else FASHION_FOLDERS)]
    found = next((place for place in places if any(place.glob("train-images-idx3-ubyte*"))), None)
    if found is None:
        raise UserError(
            f"Fashion-MNIST is not in {' or '.join(map(str, places))}; install Debian's package dataset-fashion-mnist, "
            "or set images to the folder with its four idx files"
        )
    return {
        split: RealImages(
            _to_rgb(_read_idx(found, f"{name}-images-idx3-ubyte", 3)),
            _read_idx(found, f"{name}-labels-idx1-ubyte", 1).astype(np.int64),
        )
        for split, name in (("train", "train"), ("held_out", "t10k"))
    }


def _read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of an idx file of bytes."""
    file = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it begins with {content[:4].hex()}")
        shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).tolist()
        return np.frombuffer(content, dtype=np.uint8, offset=IDX_HEADER[dimensions]).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} is not readable as an idx file: {error}; install or download it again") from error


def _to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    margin = (FASHION_MARGIN, FASHION_MARGIN)
    return np.repeat(np.pad(grey, ((0, 0), margin, margin))[..., None], 3, axis=3)


def write_image_folders(
    root: Path, splits: dict[str, RealImages] | None = None, names: Sequence[str] | None = None
) -> None:
    """Write both splits as PNG files, root/SPLIT/CLASS/NUMBER.png, for `flowar prepare`.

    Args:
        root: the folder to write.
        splits: None: the digits.
        names: of the classes; None: their numbers.
    """
    for split, (images, labels) in (splits or load_splits()).items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / (str(label) if names is None else names[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:04d}.png")


def to_model_range(images: NDArray[np.uint8]) -> Tensor:
    """Return uint8 images (N, H, W, 3) as (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
