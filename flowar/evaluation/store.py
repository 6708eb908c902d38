"""Files that keep features, written by any number of processes together.

A folder of features:
    features.json                            which images, which network; `describe_features`
    features_FIRST_LAST_HASH.safetensors     numbers (N,), labels (N,) int64; layers (N, ...) float32; xxh64 in the name
Read next: metrics.py for what is made of them.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flowar import __version__
from flowar.base.errors import UserError
from flowar.base.files import write_text, write_whole
from flowar.base.leases import CLAIMS_FOLDER, Leases, claim_name, claimed_chunks
from flowar.config.measuring import FeatureWorkConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.image_sets import ImageSet
from flowar.latents.vae import to_uint8
from flowar.sampling.folder import identify
from flowar.sampling.job import SamplingJob, check_finite, describe_samples

STORE_FILE = "features.json"
SHARD_NAME = re.compile(r"features_(\d+)_(\d+)_([0-9a-f]{16})\.safetensors")

READERS = 8  # threads that decode images


@dataclass(frozen=True)
class Features:
    """Features of images in the order of their numbers."""

    numbers: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -1 where there is none
    layers: dict[str, Tensor]  # (N, D) float32
    record: dict[str, Any]  # features.json

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, places: Tensor) -> "Features":
        """Return some of them."""
        layers = {name: values[places] for name, values in self.layers.items()}
        return Features(self.numbers[places], self.labels[places], layers, self.record)


def describe_features(extractor: Extractor, *, num_images: int, **images: object) -> dict[str, Any]:
    """Return what features.json says: the network, and which images."""
    network = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256}
    return {**network, "num_images": num_images, **images, "flowar": __version__, "torch": torch.__version__}


def start_store(folder: Path, record: dict[str, Any]) -> None:
    """Make a folder of features.

    Raises:
        UserError: if it holds those of other images or another network, or can't be written.
    """
    file = folder / STORE_FILE
    names = ("extractor", "weights_sha256", "identity")
    before = json.loads(file.read_text()) if file.exists() else record
    changed = [f"{name} was {before.get(name)}, now {record[name]}" for name in names if before[name] != record[name]]
    if changed:
        raise UserError(
            f"{folder} holds features of other images or by another network: {'; '.join(changed)}; give another "
            "out_dir, or remove that folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error}") from error


def write_shard(folder: Path, numbers: range | list[int], labels: list[int], layers: dict[str, Tensor]) -> None:
    """Write the features of some images, whole or not at all."""
    tensors = {name: values.contiguous() for name, values in layers.items()}
    ids = {"numbers": torch.tensor(list(numbers)), "labels": torch.tensor(labels)}
    content = safetensors.torch.save(ids | tensors)
    name = f"features_{numbers[0]:08d}_{numbers[-1]:08d}_{xxhash.xxh64(content).hexdigest()}.safetensors"
    write_whole(folder / name, lambda hidden: hidden.write_bytes(content))


def list_shards(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the shards of a folder by their first and last number."""
    found = ((SHARD_NAME.fullmatch(file.name), file) for file in folder.glob("features_*.safetensors"))
    return {(int(match[1]), int(match[2])): file for match, file in found if match}


class FeatureStore(NamedTuple):
    """Features that are all there: the folder, of how many images, and where these are."""

    folder: Path
    num_images: int
    images: Path

    def read(self, layers: Iterable[str] | None = None) -> Features:
        """Return the features; errors as `read_features`."""
        return read_features(self.folder, self.num_images, layers)


def read_features(folder: Path, num_images: int, layers: Iterable[str] | None = None) -> Features:
    """Return features, each image once, in the order of the numbers.

    Args:
        folder: what `extract` or `flowar sample` wrote.
        num_images: of samples, those with numbers below this; of others, so many have to be there.
        layers: which; None: all.

    Raises:
        UserError: if some are missing or damaged.
    """
    record = json.loads((folder / STORE_FILE).read_text())
    are_samples = record["kind"] == "samples"
    parts = []
    for (first, _), file in sorted(list_shards(folder).items()):
        if are_samples and first >= num_images:
            continue  # of an earlier call for more images
        content = file.read_bytes()
        if xxhash.xxh64(content).hexdigest() not in file.name:
            raise UserError(f"{file} is damaged: it does not have the hash in its name; delete it and run again")
        own = safetensors.torch.load(content)
        parts.append({name: own[name] for name in own if layers is None or name in ("numbers", "labels", *layers)})
    numbers = torch.cat([part["numbers"] for part in parts]) if parts else torch.empty(0, dtype=torch.int64)
    order = numbers.argsort(stable=True)
    ordered = numbers[order]
    wanted = torch.ones(len(order), dtype=torch.bool)
    wanted[1:] = ordered[1:] != ordered[:-1]  # chunks of other sizes overlap
    if are_samples:
        wanted &= ordered < num_images
    places = order[wanted]
    if len(places) != num_images:
        raise UserError(
            f"{folder} holds features of {len(places):,} images, but {num_images:,} are needed; run the same command "
            "again"
        )
    rows = torch.full((len(numbers),), -1)
    rows[places] = torch.arange(num_images)
    tensors: dict[str, Tensor] = {}
    for name in list(parts[0]):
        tensors[name] = torch.empty(num_images, *parts[0][name].shape[1:], dtype=parts[0][name].dtype)
        begin = 0
        for part in parts:
            to = rows[begin : begin + len(part["numbers"])]
            tensors[name][to[to >= 0]] = part.pop(name)[to >= 0] if name != "numbers" else part[name][to >= 0]
            begin += len(to)
    return Features(tensors.pop("numbers"), tensors.pop("labels"), tensors, record)


def extract(
    images: ImageSet,
    extractor: Extractor,
    folder: Path,
    config: FeatureWorkConfig,
    is_done: Callable[[], bool] = lambda: False,
) -> None:
    """Write the features of all images; whoever is given the same shares the work. Returns when all are there.

    Images are taken in fixed chunks and batches, so that the features don't depend on who computes them.

    Args:
        images: which.
        extractor: the network.
        folder: the store.
        config: sizes of chunks and batches.
        is_done: whether they are not needed any more.

    Raises:
        UserError: if an image can't be read, or the folder holds other features.
    """
    if is_done():
        return
    about = {"kind": images.kind, "root": str(images.root), "identity": images.identity}
    start_store(folder, describe_features(extractor, num_images=len(images), **about))
    size = config.chunk_images
    chunks = [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]

    def missing() -> list[int]:
        there = list_shards(folder)
        if is_done():  # asked after looking: who finishes deletes them
            return []
        return [i for i, own in enumerate(chunks) if (images.numbers[own[0]], images.numbers[own[-1]]) not in there]

    if not missing():
        return
    with Leases(folder / CLAIMS_FOLDER, config.lease_s) as leases, ThreadPoolExecutor(READERS) as pool:
        for chunk in take_chunks(leases, missing, f"features of {images.root}", len(chunks)):
            own = chunks[chunk]
            batches = [own[first : first + config.batch_size] for first in range(0, len(own), config.batch_size)]
            found = [extractor(torch.from_numpy(images.read_many(batch, pool.map))) for batch in batches]
            layers = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            write_shard(folder, [images.numbers[i] for i in own], [images.labels[i] for i in own], layers)
    shutil.rmtree(folder / CLAIMS_FOLDER, ignore_errors=True)


def take_chunks(leases: Leases, missing: Callable[[], list[int]], what: str, total: int) -> Iterator[int]:
    """Yield chunks that this process has claimed until none is missing; shows a bar over all."""
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total)

        def show(chunks: list[int]) -> None:
            progress.update(task, completed=total - len(chunks))

        for chunk in claimed_chunks(leases, missing, look=show):
            yield chunk
            leases.release(claim_name(chunk))
        show([])


class FeatureSink:
    """Keeps of drawn images only what `flowar evaluate` needs; a `Sink` of sampling/worker.py."""

    def __init__(self, job: SamplingJob, extractor: Extractor) -> None:
        self.job = job
        self.extractor = extractor
        self.folder = job.out_dir / f"features-{extractor.name}"
        self._parts: list[dict[str, Tensor]] = []

    def __str__(self) -> str:
        return f"features of images are in {self.folder}"

    def start(self) -> None:
        """Make the folder of features."""
        of_images = {"kind": "samples", "root": str(self.job.out_dir), "identity": identify(describe_samples(self.job))}
        start_store(self.folder, describe_features(self.extractor, num_images=self.job.config.num_images, **of_images))

    def missing_chunks(self) -> list[int]:
        """Return the chunks whose features are not there."""
        existing = list_shards(self.folder)
        chunks = ((chunk, self.job.chunk(chunk)) for chunk in self.job.chunks)
        return [chunk for chunk, numbers in chunks if (numbers[0], numbers[-1]) not in existing]

    def needs(self, numbers: range) -> bool:
        """Return whether a batch of a missing chunk is needed: always."""
        return True

    def add(self, decoded: Tensor, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Compute the features of images (B, 3, H, W) in [-1, 1]."""
        check_finite(self.job, decoded, numbers)
        self._parts.append(self.extractor(to_uint8(decoded)))
        return []

    def end_chunk(self, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Begin to write the features of a chunk."""
        layers = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        return [pool.submit(write_shard, self.folder, numbers, [self.job.label(number) for number in numbers], layers)]

    def is_finished(self) -> bool:
        """Return whether all features are there."""
        return not self.missing_chunks()

    def finish(self) -> None:
        """Make what is made of all features: nothing."""
