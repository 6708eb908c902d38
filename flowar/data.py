"""Shards -> batches of (moments, labels), in an order that is a function of (seed, step) alone. Never writes a shard.

The shards are read by mosaicml-streaming's StreamingDataset, as a store with random access: its own iterator ends an
epoch in silence when a shard is missing, this way the error reaches us. Read next: data_prep/schema.py, train.py.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.schema import Passport
from flowar.config import DataConfig, ModelConfig
from flowar.errors import UserError
from flowar.seeding import derive_seed

WORKER_TIMEOUT_S = 60  # a reader that gives nothing for so long has died or hangs
ORDER_STREAM = 1  # keeps the order's seeds apart from those of the training draws


class Batch(NamedTuple):
    """Samples of one step."""

    moments: Tensor  # (B, 2 C, h, w), as stored
    labels: Tensor  # (B,) int64
    samples: Tensor  # (B,) int64, numbers of the samples in the dataset


class LatentShards(Dataset):
    """Random access to the samples of a prepared dataset: (moments, label, number).

    Raises:
        UserError: if the index or a shard is missing or has another size than the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        from streaming import StreamingDataset

        logging.getLogger("streaming").setLevel(logging.ERROR)
        check_shards(folder)
        self.folder = Path(folder)
        self.shards = StreamingDataset(local=str(folder), batch_size=1, num_canonical_nodes=1)

    def __len__(self) -> int:
        return self.shards.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int] | UserError:
        shard, place = self.shards.spanner[index]
        try:
            sample = self.shards.shards[shard][place]  # not self.shards[index]: it waits for ever where a file is gone
        except (OSError, IndexError, ValueError) as error:
            return UserError(f"can't read shard {shard} of data.path={self.folder}: {error}")
        return sample["moments"], int(sample["label"]), index


def check_shards(folder: str | Path) -> None:
    """Raise a UserError that names the first shard of a dataset that is missing or has the wrong size."""
    index_file = Path(folder) / "index.json"
    try:
        shards = json.loads(index_file.read_text())["shards"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"data.path={folder} has no readable index.json ({error}); prepare the dataset again"
        ) from error
    for shard in shards:
        file, needed = Path(folder) / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        found = file.stat().st_size if file.is_file() else None
        if found != needed:
            problem = "is missing" if found is None else f"has {found:,} bytes"
            raise UserError(
                f"shard {file} {problem}, index.json says {needed:,} bytes; copy or prepare the dataset again"
            )


class StepOrder(Sampler):
    """The sample numbers of each step, from `first_step` up to `num_steps`.

    The sequence is one random permutation of all samples after the other; a batch may span two of them, so that every
    epoch visits every sample once, and the numbers of a step follow from (seed, step, batch size) alone.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, *, first_step: int, num_steps: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, num_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        permutations: dict[int, np.ndarray] = {}
        for step in self.steps:
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            needed = range(places[0] // self.num_samples, places[-1] // self.num_samples + 1)
            permutations = {epoch: permutations.get(epoch) for epoch in needed}
            for epoch, known in permutations.items():
                if known is None:
                    random = np.random.default_rng(derive_seed(self.seed, ORDER_STREAM, epoch))
                    permutations[epoch] = random.permutation(self.num_samples)
            yield [int(permutations[place // self.num_samples][place % self.num_samples]) for place in places]


def read_batches(
    shards: LatentShards, config: DataConfig, *, batch_size: int, seed: int, first_step: int, num_steps: int
) -> Iterator[Batch]:
    """Yield one Batch per step, from `first_step` on, in an order that the number of workers doesn't change.

    Raises:
        UserError: if a shard can't be read, by name.
    """
    loader = DataLoader(
        shards,
        batch_sampler=StepOrder(len(shards), batch_size, seed, first_step=first_step, num_steps=num_steps),
        num_workers=config.num_workers,
        collate_fn=_collate,
        timeout=WORKER_TIMEOUT_S if config.num_workers else 0,
        multiprocessing_context="fork" if config.num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def check_fits(passport: Passport, model: ModelConfig, path: str) -> None:
    """Raise a UserError where the shards don't hold the latents and classes that the model is made for."""
    if passport.latent_channels != model.latent_channels or passport.latent_size != model.latent_size:
        raise UserError(
            f"data.path={path} holds latents of {passport.latent_channels} channels and side {passport.latent_size} "
            f"(VAE {passport.vae_name}, {passport.image_size} px), but the model is made for {model.latent_channels} "
            f"channels and side {model.latent_size}; set model.latent_channels, model.scales and "
            "model.patch_size, or use other shards"
        )
    if len(passport.class_names) != model.num_classes:
        raise UserError(
            f"data.path={path} has {len(passport.class_names)} classes, but model.num_classes={model.num_classes}; set "
            f"model.num_classes={len(passport.class_names)}"
        )


def check_same_vae(passport: Passport, vae_name: str, vae_sha256: str, path: str) -> None:
    """Raise a UserError if the shards were made with another VAE than the one at hand, naming both."""
    if passport.vae_sha256 != vae_sha256:
        raise UserError(
            f"data.path={path} was made with VAE {passport.vae_name} (weights {passport.vae_sha256[:12]}), but "
            f"vae.name={vae_name} has weights {vae_sha256[:12]}; use that VAE, or prepare the shards with this one"
        )


def _collate(samples: list[tuple[np.ndarray, int, int] | UserError]) -> Batch | UserError:
    """Return the batch, or the first error among its samples: as a value, it leaves a worker without a traceback."""
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    moments, labels, numbers = zip(*samples, strict=True)
    return Batch(torch.from_numpy(np.stack(moments)), torch.tensor(labels), torch.tensor(numbers))
