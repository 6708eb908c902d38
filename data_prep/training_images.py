"""Images of a source as batches to train a VAE on, in an order that is a function of (seed, step) alone.

Read next: train_vae.py, which trains; sources.py and crops.py, which read an image.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from data_prep.crops import RANDOM_RESIZE, centre_crop, decode_image
from data_prep.sources import Source
from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.base.seeding import Stream, make_generator
from flowar.config.tokenizing import TrainVAEConfig
from flowar.latents.batches import StepOrder
from flowar.latents.vae import from_uint8
from flowar.latents.workers import BATCHES_AHEAD, check_shared_memory, from_workers, leave_stopping_to_main

UNSEEN_SHARE, MOST_HELD_OUT = 0.05, 512  # of the images, which are never trained on, to measure the VAE by


class ImageBatch(NamedTuple):
    """This rank's images of one step."""

    images: Tensor  # (B, 3, H, W) uint8
    noise: Tensor  # (B, C, h, w), standard normal, for samples of the posterior


def split_held_out(num_images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the images to train on, and of those to measure by, evenly spaced; one is both if alone."""
    everything = np.arange(num_images)
    count = max(1, min(MOST_HELD_OUT, int(num_images * UNSEEN_SHARE)))
    held_out = np.unique(np.linspace(0, num_images - 1, count).round().astype(np.int64))
    return (np.setdiff1d(everything, held_out) if num_images > 1 else everything), held_out


def read_step_batches(
    source: Source, config: TrainVAEConfig, steps: range, world: World, latent_shape: tuple[int, ...]
) -> Iterator[ImageBatch]:
    """Yield this rank's images of each of `steps`, the same for any number of ranks and workers.

    Args:
        source: the images.
        config: of the training.
        steps: from 0.
        world: which part of each batch.
        latent_shape: (C, h, w) of one image's latents, for the noise.

    Raises:
        UserError: if an image can't be read.
    """
    numbers, _ = split_held_out(len(source))
    order = StepOrder(
        len(numbers),
        views=1,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=steps,
        rank=world.rank,
        world_size=world.size,
    )
    check_shared_memory(config.num_workers, len(order.part) * 3 * config.image_size**2, "num_workers")
    numbered: Any = zip(order.steps, order, strict=True)
    loader: DataLoader[Any] = DataLoader(
        _StepImages(source, config, numbers, order.part, latent_shape),
        batch_sampler=numbered,
        num_workers=config.num_workers,
        collate_fn=_unchanged,
        prefetch_factor=BATCHES_AHEAD if config.num_workers else None,
        multiprocessing_context="fork" if config.num_workers else None,
        worker_init_fn=leave_stopping_to_main,
    )
    for batch in from_workers(loader, config.images, "num_workers"):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def read_centres(source: Source, config: TrainVAEConfig, numbers: NDArray[np.int64]) -> Tensor:
    """Return the centre crops of some images, (N, 3, H, W) in [-1, 1]."""
    crops = [_to_tensor(centre_crop(_open_image(source, int(number)), config.image_size)) for number in numbers]
    return from_uint8(torch.stack(crops))


class _StepImages(Dataset[Any]):
    """Steps and places in the order -> batches, or the error as a value: so it leaves a worker without a traceback."""

    def __init__(
        self,
        source: Source,
        config: TrainVAEConfig,
        numbers: NDArray[np.int64],
        part: range,
        latent_shape: tuple[int, ...],
    ) -> None:
        self.source = source
        self.config = config
        self.numbers = numbers
        self.part = part
        self.latent_shape = latent_shape

    def __getitems__(self, step_and_rows: tuple[int, list[int]]) -> ImageBatch | UserError:
        step, rows = step_and_rows
        images, noise = [], []
        try:
            for place, row in zip(self.part, rows, strict=True):
                generator = make_generator(self.config.seed, Stream.TOKENIZER, step, place)
                image = _open_image(self.source, int(self.numbers[row]))
                images.append(_to_tensor(crop_randomly(image, self.config, generator)))
                noise.append(torch.randn(self.latent_shape, generator=generator))
        except UserError as error:
            return error
        return ImageBatch(torch.stack(images), torch.stack(noise))


def crop_randomly(image: Image.Image, config: TrainVAEConfig, generator: torch.Generator) -> Image.Image:
    """Return the square crop that one step sees of an image, mirrored or not."""
    down, right, mirrored = torch.rand(3, generator=generator).tolist()
    if config.crop == "center":
        cropped = centre_crop(image, config.image_size)
    else:
        image = F.resize(image, round(config.image_size * RANDOM_RESIZE), InterpolationMode.BILINEAR)
        top = int(down * (image.height - config.image_size + 1))
        left = int(right * (image.width - config.image_size + 1))
        cropped = F.crop(image, top, left, config.image_size, config.image_size)
    return F.hflip(cropped) if config.flip and mirrored < 0.5 else cropped


def _open_image(source: Source, number: int) -> Image.Image:
    try:
        return decode_image(source.read(number))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds; the image is named
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source.names[number]} in {source.root} can't be read ({problem}); put a readable image in its place, or "
            "remove it, and run the same command again"
        ) from error


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _unchanged(batch: Any) -> Any:
    return batch
