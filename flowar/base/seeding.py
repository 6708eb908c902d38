"""Seeds derived from what a number is for, so that no draw depends on what was drawn before it."""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are for: each use has seeds of its own. A number is never given to another use."""

    ORDER = 1  # order of the images of an epoch
    TRAINING_DRAW = 2  # everything drawn for one sample of one step
    NOISE = 3  # from which image i is drawn
    VIEW = 4  # view of each image in an epoch
    CROP = 5  # random crops of `flowar prepare`
    DROPOUT = 6  # masks of one step on one rank
    STEP_NOISE = 7  # of stochastic solvers, for image i; in 0.1 it was VIEW's
    SEQUENCE = 8  # which images make one sample of one step, where a sample is a sequence of images
    LABEL = 9  # the class of image i, where classes are drawn
    TOKENIZER = 10  # everything drawn for one image of one step of `flowar train-vae`


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """Return a 64-bit seed that is a function of the arguments alone, for example (run seed, stream, epoch)."""
    return int(np.random.SeedSequence((seed, stream, *place)).generate_state(1, np.uint64)[0])


def make_generator(seed: int, stream: Stream, *place: int) -> torch.Generator:
    """Return a generator on the CPU, seeded with `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *place))


def draw_image_noise(shape: tuple[int, ...], images: Iterable[int], seed: int) -> Tensor:
    """Return the noise of the images with these numbers, (B, *shape): each a function of (seed, number)."""
    generators = (make_generator(seed, Stream.NOISE, image) for image in images)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class StepNoise:
    """Standard normal noise for the steps of stochastic solvers: of each image a function of (seed, number)."""

    def __init__(self, images: Iterable[int], seed: int, device: torch.device) -> None:
        self.generators = [make_generator(seed, Stream.STEP_NOISE, image) for image in images]
        self.device = device

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Return the next noise, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators]).to(self.device)
