"""Shards -> batches of (moments, labels), in an order that is a function of (seed, step) alone.

Read next: shards.py for how rows are read, train.py for who reads batches.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flowar.base.errors import UserError
from flowar.base.seeding import Stream, derive_seed
from flowar.config.data import DataConfig
from flowar.config.models import ModelConfig
from flowar.latents.schema import Passport
from flowar.latents.shards import LatentShards
from flowar.latents.vae import VAE
from flowar.latents.workers import (
    BATCHES_AHEAD,
    WORKER_TIMEOUT_S,
    check_shared_memory,
    from_workers,
    leave_stopping_to_main,
)


class Batch(NamedTuple):
    """This rank's samples of one step; a sample is n images of one class, side by side, n = images_per_sample."""

    moments: Tensor  # (B n, 2 C, h, w), as stored
    labels: Tensor  # (B,) int64
    samples: Tensor  # (B n,) int64, numbers of the rows in the dataset


MOST_SHUFFLED = 2**26  # images whose order is drawn as a whole: it takes half a gigabyte, and a second

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]


class StepOrder(Sampler[list[int]]):
    """The rows of each of `steps` that one rank reads: its part, in rank order, of the batch of all ranks.

    The sequence of images is one random permutation of all of them after the other; a batch may span two of them, so
    that every epoch visits every image once, in one of its views. It follows from (seed, step, batch size) alone. Of
    more than `MOST_SHUFFLED` images no order is kept in memory: `permute` tells where each place leads.
    """

    def __init__(
        self,
        num_images: int,
        views: int,
        *,
        batch_size: int,
        seed: int,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images = num_images
        self.views = views
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.part = split_among(batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epochs: dict[int, Order] = {}
        for step in self.steps:
            places = step * self.batch_size + np.arange(self.part.start, self.part.stop)
            needed = range(places[0] // self.num_images, places[-1] // self.num_images + 1)
            epochs = {epoch: epochs.get(epoch) or self._order_of(epoch) for epoch in needed}
            of_epoch = places // self.num_images
            rows = [epochs[epoch](places[of_epoch == epoch] % self.num_images) for epoch in needed]
            yield np.concatenate(rows).tolist()

    def _order_of(self, epoch: int) -> "Order":
        """Return the epoch's order: places in it -> one row of each of these images."""
        order_seed = derive_seed(self.seed, Stream.ORDER, epoch)
        view_seed = derive_seed(self.seed, Stream.VIEW, epoch)
        if self.num_images > MOST_SHUFFLED:

            def rows_without_memory(places: NDArray[np.int64]) -> NDArray[np.int64]:
                images = permute(places, self.num_images, order_seed)
                return images * self.views + mix(images, view_seed).astype(np.int64) % self.views

            return rows_without_memory
        order = np.random.default_rng(order_seed).permutation(self.num_images)
        view = np.random.default_rng(view_seed).integers(self.views, size=len(order))
        return (order * self.views + view).__getitem__


class SequenceOrder(Sampler[list[int]]):
    """The rows of each of `steps` that one rank reads, where a sample is a sequence of different images of one class.

    Which they are follows from (seed, step, place in the batch) alone, for any number of ranks. As in ARFlow's
    released code there are no epochs: each sample draws a class, then its images in random order, each in one of its
    views.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        views: int,
        *,
        images_per_sample: int,
        class_draw: str,
        batch_size: int,
        seed: int,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Group the images, whose classes `labels` are, (images,).

        Raises:
            UserError: if a class has fewer images than a sequence needs, or the ranks can't share a batch evenly.
        """
        self.steps, self.views, self.seed, self.batch_size = steps, views, seed, batch_size
        self.images_per_sample, self.class_draw, self.labels = images_per_sample, class_draw, labels
        self.part = split_among(batch_size, rank, world_size)
        self.by_class = np.argsort(labels, kind="stable")  # images, class by class
        self.classes, self.begins, self.counts = np.unique(labels[self.by_class], return_index=True, return_counts=True)
        if self.counts.min() < images_per_sample:
            fewest = int(self.counts.argmin())
            raise UserError(
                f"class {self.classes[fewest]} has {self.counts[fewest]} images, and a sample is "
                f"model.images_per_sample={images_per_sample} different ones of one class; set "
                f"model.images_per_sample={self.counts[fewest]}, or prepare the images without that class"
            )

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield [row for place in self.part for row in self._rows_of_sample(step, place)]

    def _rows_of_sample(self, step: int, place: int) -> list[int]:
        drawn = np.random.default_rng(derive_seed(self.seed, Stream.SEQUENCE, step, place))
        if self.class_draw == "uniform":
            which = int(drawn.integers(len(self.classes)))
        else:
            which = int(np.searchsorted(self.classes, self.labels[drawn.integers(len(self.labels))]))
        chosen = drawn.choice(self.counts[which], size=self.images_per_sample, replace=False)
        images = self.by_class[self.begins[which] + chosen]
        rows: list[int] = (images * self.views + drawn.integers(self.views, size=len(images))).tolist()
        return rows


FEISTEL_ROUNDS = 6


def permute(places: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Return where a permutation of range(count), a function of `seed`, sends some places; all others cost nothing.

    A Feistel network (Luby and Rackoff, 1988) permutes the least power of four that holds `count`; what leaves the
    range goes through it again until it is back (cycle walking: Black and Rogaway, 2002).

    Args:
        places: (N,), each below `count`.
        count: up to 2^62.
        seed: of the permutation.
    """
    half_bits = np.uint64((max(count - 1, 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    found, outside = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half_bits, found[outside] & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right, seed + number) & mask)
        found[outside] = left << half_bits | right
        outside = found >= count
    return found.astype(np.int64)


def mix(values: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """Return 63 random-looking bits of each integer, a function of it and `seed`: the finalizer of SplitMix64."""
    mixed = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ mixed >> np.uint64(31)) >> np.uint64(1)


def split_among(batch_size: int, rank: int, world_size: int) -> range:
    """Return which samples of a batch are those of a rank.

    Raises:
        UserError: if not all ranks would have as many.
    """
    if batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size} can't be shared evenly by {world_size} ranks; use a multiple of {world_size}"
        )
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class _Batches(Dataset[Any]):
    """Steps and their rows -> batches, or the error as a value: so it leaves a worker without a traceback."""

    def __init__(self, shards: LatentShards, make: Callable[[Batch, int], Any] | None, images_per_sample: int) -> None:
        self.shards = shards
        self.make = make
        self.images_per_sample = images_per_sample

    def __getitems__(self, step_and_rows: tuple[int, list[int]]) -> Any:
        step, rows = step_and_rows
        try:
            found = self.shards.read(rows)
        except UserError as error:
            return error
        moments = torch.from_numpy(np.ascontiguousarray(found["moments"]))
        labels = torch.from_numpy(found["label"].copy()).unflatten(0, (-1, self.images_per_sample))
        if not (labels == labels[:, :1]).all():
            return UserError(f"the shards of data.path={self.shards.path} changed while they were read; start again")
        batch = Batch(moments, labels[:, 0].contiguous(), torch.tensor(rows))
        return self.make(batch, step) if self.make else batch


def read_batches(
    shards: LatentShards,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    labels: NDArray[np.int64] | None = None,
    images_per_sample: int = 1,
    make: Callable[[Batch, int], Any] | None = None,
    made_bytes: int = 0,
    pinned: bool = False,
) -> Iterator[Any]:
    """Yield this rank's Batch of each of `steps`, or what `make` returns for it: the same for any number of workers.

    Args:
        shards: where the rows are.
        config: how many workers read ahead.
        batch_size: of all ranks together.
        seed: of the order.
        steps: numbers of the steps, from 0.
        rank: which part of each batch, of `world_size` equal ones.
        world_size: number of ranks.
        labels: of all images, where a sample is a sequence of images of one class; not needed for single images.
        images_per_sample: images of a sequence.
        make: called with a batch and its step, where it was read: in a worker, a few steps ahead.
        made_bytes: that it adds to a sample.
        pinned: leave it in pinned memory, from which a GPU copies while the host continues.

    Raises:
        UserError: if a row can't be read, with the name of the shard, or the workers give nothing for a minute.
    """
    passport, workers = shards.passport, config.num_workers
    shared: Any = {"batch_size": batch_size, "seed": seed, "steps": steps, "rank": rank, "world_size": world_size}
    order: StepOrder | SequenceOrder = (
        StepOrder(passport.num_images, passport.views, **shared)
        if labels is None
        else SequenceOrder(
            labels, passport.views, images_per_sample=images_per_sample, class_draw=config.class_draw, **shared
        )
    )
    if shards.is_remote:
        shards.fetch_all()
    sample_bytes = images_per_sample * shards.dtype.itemsize + made_bytes
    check_shared_memory(workers, len(order.part) * sample_bytes, "data.num_workers")
    numbered: Any = zip(order.steps, order, strict=True)
    loader: DataLoader[Any] = DataLoader(
        _Batches(shards, make, images_per_sample),
        batch_sampler=numbered,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        timeout=WORKER_TIMEOUT_S + shards.patience_s if workers else 0,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=leave_stopping_to_main,
        pin_memory=pinned,
    )
    for batch in from_workers(loader, f"data.path={shards.path}", "data.num_workers"):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def check_fits(passport: Passport, model: ModelConfig, path: str) -> None:
    """Raise a UserError where the shards don't hold the latents and classes that the model is made for."""
    if passport.latent_channels != model.latent_channels or passport.latent_size != model.latent_size:
        raise UserError(
            f"data.path={path} holds latents of {passport.latent_channels} channels and side {passport.latent_size} "
            f"(VAE {passport.vae_name}, {passport.image_size} px), but the model is made for {model.latent_channels} "
            f"channels and side {model.latent_size}; set {model.size_settings} (`flowar suggest data.path={path}` does "
            "that), or use other shards"
        )
    if len(passport.class_names) != model.num_classes:
        raise UserError(
            f"data.path={path} has {len(passport.class_names)} classes, but model.num_classes={model.num_classes}; set "
            f"model.num_classes={len(passport.class_names)}"
        )


def check_same_vae(passport: Passport, vae: VAE, path: str) -> None:
    """Raise a UserError that names both VAEs if the shards were made with another one."""
    if passport.vae_sha256 != vae.weights_sha256:
        raise UserError(
            f"data.path={path} was made with VAE {passport.vae_name} (weights {passport.vae_sha256[:12]}), but "
            f"vae.name={vae.name} has weights {vae.weights_sha256[:12]}; use that VAE, or prepare the shards again"
        )
    for name in ("latent_multiplier", "latent_shift"):
        if getattr(passport, name) != getattr(vae, name):
            raise UserError(
                f"data.path={path} was made with {name}={getattr(passport, name)}, but vae.name={vae.name} has "
                f"{getattr(vae, name)}; correct scaling_factor or shift_factor in the VAE's config.json"
            )


def _as_it_is(batch: Any) -> Any:
    return batch
