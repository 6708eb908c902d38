"""Image bytes -> the square views that are stored, by a crop policy. Read next: encode.py."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from data_prep.limits import LARGEST_ASPECT, LARGEST_IMAGE
from flowar.base.seeding import Stream, derive_seed
from flowar.config.data import PrepareConfig

RANDOM_RESIZE = 288 / 256  # the authors' recipe: short side 288, then a random crop of 256
OUT_OF_MEMORY = "out of memory"  # the message of Pillow's decoders, in an OSError
TEN_CROP_RESIZE = 1.1  # the usual ratio where autoregressive image models store ten crops (LlamaGen)


def num_views(config: PrepareConfig) -> int:
    """Return how many views of each image are stored."""
    if config.crop == "center":
        return 2 if config.flip else 1
    return 10 if config.crop == "ten_crop" else config.views


def resize_side(config: PrepareConfig) -> int:
    """Return the length in pixels to which the short side is resized before the crop."""
    ratio = {"center": 1.0, "random": RANDOM_RESIZE, "ten_crop": TEN_CROP_RESIZE}[config.crop]
    return config.resize or round(config.image_size * ratio)


def decode_image(content: bytes) -> Image.Image:
    """Return an upright RGB image; the first frame of an animated one, the 8 highest bits of a 16-bit one.

    Raises:
        MemoryError: if memory runs out, which says nothing about the image.
        Exception: if it can't be read, or is beyond the limits (limits.py); Pillow raises many kinds.
    """
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # LARGEST_IMAGE says more
        image: Image.Image = Image.open(io.BytesIO(content))
    check_image_size(*image.size)
    try:
        return _to_rgb(image)
    except OSError as error:
        if OUT_OF_MEMORY in str(error):
            raise MemoryError(str(error)) from error
        raise


def check_image_size(width: int, height: int) -> None:
    """Raise a ValueError if an image is beyond the limits."""
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{width} x {height} pixels; at most {LARGEST_IMAGE:,} in all are accepted")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels; at most {LARGEST_ASPECT} times as long as wide is accepted")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(
        image
    )  # ADM and the authors ignore EXIF; ImageNet's few turned images are upright here
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no known range")
    return image.convert("RGB")


def make_views(image: Image.Image, config: PrepareConfig, number: int) -> NDArray[np.uint8]:
    """Return the views of image `number` of the source, (views, size, size, 3) uint8; a function of these arguments.

    center: ADM's centre crop, then its mirror image. random: `views` independent crops after a resize of the short
    side, each mirrored or not, as the authors' training does (torchvision's Resize, RandomCrop, RandomHorizontalFlip).
    ten_crop: the corners and the centre of ADM's centre crop of a larger size, then their mirror images.
    """
    size, resized = config.image_size, resize_side(config)
    if config.crop == "center":
        cropped = centre_crop(image, size)
        views = [cropped, F.hflip(cropped)] if config.flip else [cropped]
    elif config.crop == "ten_crop":
        views = F.ten_crop(centre_crop(image, resized), size)
    else:
        image = F.resize(image, resized, InterpolationMode.BILINEAR)
        views = [_random_view(image, config, number, view) for view in range(config.views)]
    return np.stack([np.asarray(view) for view in views])


def _random_view(image: Image.Image, config: PrepareConfig, number: int, view: int) -> Image.Image:
    random = np.random.default_rng(derive_seed(config.seed, Stream.CROP, number, view))
    top = int(random.integers(image.height - config.image_size + 1))
    left = int(random.integers(image.width - config.image_size + 1))
    cropped: Image.Image = F.crop(image, top, left, config.image_size, config.image_size)
    return F.hflip(cropped) if config.flip and random.random() < 0.5 else cropped


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of `image`, resized as ADM does (Dhariwal & Nichol, 2021).

    Halved by box averages while the short side is at least twice `size`, then bicubic to `size`, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
