"""Rows per second that reach the training loop: our reader against alternatives, on the same rows in random order.

Run `python -m benchmarks.loading`. Rows have MAR-VAE's shape, float16, 16 KiB. Everything is in the page cache, so this
measures the readers, not the disk.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data_prep.chunks import ChunkWriter, merge_chunks
from data_prep.sources import Source
from flowar.config.data import DataConfig
from flowar.latents.batches import read_batches
from flowar.latents.schema import SCHEMA_VERSION
from flowar.latents.shards import LatentShards

SHAPE = (32, 16, 16)

BATCH = 64


class Npz(Dataset[Any]):
    """One .npz per image, as MAR caches its latents."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.float16], int]:
        with np.load(self.folder / f"{index}.npz") as file:
            return file["moments"], int(file["label"])


class Memmap(Dataset[Any]):
    """One memory-mapped array in one file; no labels, no checks."""

    def __init__(self, file: Path) -> None:
        self.array = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float16], int]:
        return self.array[index].copy(), 0


def write_all(root: Path, moments: NDArray[np.float16]) -> None:
    """Write the same rows in every format."""
    settings: dict[str, Any] = {
        "images": "random", "image_size": 256, "crop": "center", "flip": False, "seed": 0, "moments_dtype": "float16",
        "batch_size": 1, "chunk_images": len(moments), "shard_size_mib": 256, "precision": "fp32",
        "schema_version": SCHEMA_VERSION, "resize": 256, "views": 1, "vae_name": "none", "vae_sha256": "",
        "latent_multiplier": 1.0, "latent_shift": 0.0, "moments_shape": list(SHAPE), "source_kind": "folder",
        "listing_sha256": "",
    }  # fmt: skip
    (root / "mds").mkdir()
    writer = ChunkWriter(root / "mds", 0, settings, {})
    for start in range(0, len(moments), BATCH):
        part = moments[start : start + BATCH]
        writer.add(part.astype(np.float32), [0] * len(part), [""] * len(part))
    writer.publish()
    merge_chunks(root / "mds", settings, ["0"], num_chunks=1, plan_hash="", psnr_db=0.0)
    Source("", "folder", ["0"], [], [], []).save(root / "mds" / "listing.json.gz")
    np.save(root / "array.npy", moments)
    (root / "npz").mkdir()
    for index, row in enumerate(moments):
        np.savez(root / "npz" / f"{index}.npz", moments=row, label=0)


def readers(root: Path, count: int, workers: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Return the readers to compare: for each name, a function that starts one epoch."""
    from streaming import StreamingDataset

    logging.getLogger("streaming").setLevel(logging.ERROR)
    context: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    config = DataConfig(path=str(root / "mds"), num_workers=workers)
    epochs = itertools.count()

    def ours() -> Iterator[Any]:
        steps = range((epoch := next(epochs)) * (count // BATCH), (epoch + 1) * (count // BATCH))
        return read_batches(LatentShards(config), config, batch_size=BATCH, seed=0, steps=steps)

    streaming = StreamingDataset(local=str(root / "mds"), batch_size=BATCH, shuffle=True)
    return {
        "flowar": ours,
        "StreamingDataset": lambda: iter(DataLoader(streaming, BATCH, **context)),
        "one .npz per image": lambda: iter(DataLoader(Npz(root / "npz", count), BATCH, shuffle=True, **context)),
        "memory-mapped array": lambda: iter(DataLoader(Memmap(root / "array.npy"), BATCH, shuffle=True, **context)),
    }


def main() -> None:
    """Print rows per second, medians of several epochs, and the ratio to ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    moments = np.random.default_rng(0).standard_normal((options.rows, *SHAPE), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), moments)
        for workers in (0, 2):
            started = readers(Path(folder), options.rows, workers)
            seconds: dict[str, list[float]] = {name: [] for name in started}
            for _ in range(options.repeats):  # in turn, so that a slow moment of the machine hits all of them
                for name, start in started.items():
                    began = time.perf_counter()
                    rows = sum(
                        len(batch[0] if isinstance(batch, list | tuple) else batch["label"]) for batch in start()
                    )
                    assert rows == options.rows, (name, rows)
                    seconds[name].append(time.perf_counter() - began)
            ours = statistics.median(seconds["flowar"])
            print(f"{workers} workers, {options.rows:,} rows of {SHAPE} float16, torch {torch.__version__}")
            for name, taken in seconds.items():
                median = statistics.median(taken)
                print(
                    f"  {name:20} {options.rows / median:10,.0f} rows/s   flowar is {median / ours:5.2f} times as fast"
                )


if __name__ == "__main__":
    main()
