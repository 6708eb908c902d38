"""Files that keep features, written by any number of processes together.

A folder of features:
    features.json                            the images and the network; `describe_features`
    features_FIRST_LAST_HASH.safetensors     numbers (N,), labels (N,) int64; layers (N, ...) float32; the name has the
                                             xxh64, the metadata `NAMED` of features.json
Read next: metrics.py for what is computed from them.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import xxhash
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flowar import __version__
from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.leases import CLAIMS_FOLDER, Leases, claim_name, claimed_chunks
from flowar.base.records import DamagedRecordError, create_record, read_record
from flowar.config.measuring import FeatureWorkConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.image_sets import ImageSet
from flowar.latents.vae import to_uint8
from flowar.sampling.folder import SAMPLES_FILE, identify, read_samples
from flowar.sampling.job import SamplingJob, check_finite

STORE_FILE = "features.json"
NAMED = ("extractor", "weights_sha256", "identity")  # in features.json: what identifies features
STORE_KEY = "store"  # of a shard's metadata
SHARD_NAME = re.compile(r"features_(\d+)_(\d+)_([0-9a-f]{16})\.safetensors")

READERS = 8  # threads that decode images


@dataclass(frozen=True)
class Features:
    """Features of images in the order of their numbers."""

    numbers: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -1 without a label
    layers: dict[str, Tensor]  # (N, D) float32
    record: dict[str, Any]  # features.json

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, places: Tensor) -> "Features":
        """Return the features at these places."""
        layers = {name: values[places] for name, values in self.layers.items()}
        return Features(self.numbers[places], self.labels[places], layers, self.record)


def describe_features(extractor: Extractor, *, num_images: int, **images: object) -> dict[str, Any]:
    """Return the content of features.json to be written: the network, and the images."""
    network = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256}
    return {**network, "num_images": num_images, **images, "flowar": __version__, "torch": torch.__version__}


def start_store(folder: Path, record: dict[str, Any]) -> None:
    """Make a folder of features; the first process writes features.json, and the others compare.

    Raises:
        UserError: if the folder holds features of other images or another network, or can't be written.
    """
    file = folder / STORE_FILE
    there = list_shards(folder)  # before looking for the record, which is written first
    if there and not file.exists():
        raise UserError(
            f"{folder} holds {min(there.values()).name}, but no {STORE_FILE}, which records its images and network; "
            f"restore {file} from a copy, or remove that folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists() and create_record(file, record):
            return
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error}; fix that and run the same command again") from error
    before = read_store(folder)
    changed = [f"{name} was {before[name]}, now {record[name]}" for name in NAMED if before[name] != record[name]]
    if changed:
        raise UserError(
            f"{folder} holds features of other images or by another network: {'; '.join(changed)}; give another "
            "out_dir, or remove that folder"
        )


def read_store(folder: Path) -> dict[str, Any]:
    """Return the content of features.json.

    Raises:
        DamagedRecordError: if the file is missing or not what was written.
    """
    cure = f"remove {folder} and run again, which computes the features again"
    try:
        record = read_record(folder / STORE_FILE, cure)
    except FileNotFoundError as error:
        raise DamagedRecordError(f"{folder} has no {STORE_FILE}; {cure}") from error
    lacking = [name for name in (*NAMED, "kind", "num_images", "root") if name not in record]
    if lacking:
        raise DamagedRecordError(f"{folder / STORE_FILE} is damaged (it has no {lacking[0]}); {cure}")
    return record


def write_shard(
    folder: Path, record: dict[str, Any], numbers: range | list[int], labels: list[int], layers: dict[str, Tensor]
) -> None:
    """Write the features of some images to the store that has this record, whole or not at all."""
    tensors = {name: values.contiguous() for name, values in layers.items()}
    ids = {"numbers": torch.tensor(list(numbers)), "labels": torch.tensor(labels)}
    owner = json.dumps({name: str(record[name]) for name in NAMED})  # one text: the file's bytes must not vary
    content = safetensors.torch.save(ids | tensors, metadata={STORE_KEY: owner})
    name = f"features_{numbers[0]:08d}_{numbers[-1]:08d}_{xxhash.xxh64(content).hexdigest()}.safetensors"
    write_whole(folder / name, lambda hidden: hidden.write_bytes(content))


def list_shards(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the shards of a folder by their first and last number."""
    found = ((SHARD_NAME.fullmatch(file.name), file) for file in folder.glob("features_*.safetensors"))
    return {(int(match[1]), int(match[2])): file for match, file in found if match}


def read_shard(file: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a shard.

    Raises:
        UserError: if the shard is damaged, or doesn't belong to the store with this record.
    """
    content, match = file.read_bytes(), SHARD_NAME.fullmatch(file.name)
    assert match is not None  # `list_shards` gives only such names
    try:
        if xxhash.xxh64(content).hexdigest() != match[3]:
            raise ValueError("it does not have the hash in its name")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        named = json.loads(header.get("__metadata__", {}).get(STORE_KEY, "{}"))  # {} from version 0.1
        other = [name for name in NAMED if str(record[name]) != named.get(name, str(record[name]))]
        if other:
            raise ValueError(f"its {other[0]} is {named[other[0]]}, but {STORE_FILE} says {record[other[0]]}")
        tensors = safetensors.torch.load(content)
        numbers = tensors["numbers"].tolist()
        if [numbers[0], numbers[-1]] != [int(match[1]), int(match[2])] or len(tensors["labels"]) != len(numbers):
            raise ValueError("it does not hold the images in its name")
    except Exception as error:  # safetensors, JSON and missing tensors raise many kinds
        raise UserError(f"{file} is damaged: {error}; delete it and run {_maker(file.parent, record)} again") from error
    return tensors


def _maker(folder: Path, record: dict[str, Any]) -> str:
    """Return the command that computes a store's missing features, for messages."""
    if "of" in record:  # a reference's
        return f"`flowar evaluate make-reference` (remove {folder} first)"
    return "the same `flowar sample`" if (folder.parent / SAMPLES_FILE).exists() else "the same command"


class FeatureStore(NamedTuple):
    """A complete folder of features: its path, the number of images, and the path of the images."""

    folder: Path
    num_images: int
    images: Path

    def identity(self) -> str:
        """Return the hash of the images that the features came from; the images at the path may have changed."""
        return str(read_store(self.folder)["identity"])

    def read(self, layers: Iterable[str] | None = None) -> Features:
        """Return the features; same errors as `read_features`."""
        return read_features(self.folder, self.num_images, layers)


def read_features(folder: Path, num_images: int, layers: Iterable[str] | None = None) -> Features:
    """Return features, each image once, in the order of the numbers.

    Args:
        folder: what `extract` or `flowar sample` wrote.
        num_images: from samples, take images with numbers below this; other stores must hold exactly this many.
        layers: to read; None: all.

    Raises:
        UserError: if features are missing or damaged.
    """
    record = read_store(folder)
    are_samples = record["kind"] == "samples"
    parts = []
    for (first, _), file in sorted(list_shards(folder).items()):
        if are_samples and first >= num_images:
            continue  # from an earlier call for more images
        own = read_shard(file, record)
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
            f"{folder} holds features of {len(places):,} images, but {num_images:,} are needed; run "
            f"{_maker(folder, record)} again"
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
    """Write the features of all images; processes with the same arguments share the work. Returns when all exist.

    Images are taken in fixed chunks and batches, so the features don't depend on which process computes them.

    Args:
        images: to read.
        extractor: the network.
        folder: the store.
        config: sizes of chunks and batches.
        is_done: returns whether the features are no longer needed.

    Raises:
        UserError: if an image can't be read, or the folder holds other features.
    """
    if is_done():
        return
    about = {"kind": images.kind, "root": str(images.root), "identity": images.identity}
    record = describe_features(extractor, num_images=len(images), **about)
    start_store(folder, record)
    size = config.chunk_images
    chunks = [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]

    def missing() -> list[int]:
        there = list_shards(folder)
        if is_done():  # checked after listing, as the finishing process deletes the shards
            return []
        return [i for i, own in enumerate(chunks) if (images.numbers[own[0]], images.numbers[own[-1]]) not in there]

    if not missing():
        return
    claims = Leases(folder / CLAIMS_FOLDER, config.lease_s)
    with claims as leases, ThreadPoolExecutor(READERS) as pool, ThreadPoolExecutor(1) as ahead:
        for chunk in take_chunks(leases, missing, f"features of {images.root}", len(chunks)):
            own = chunks[chunk]
            batches = [own[first : first + config.batch_size] for first in range(0, len(own), config.batch_size)]
            read = read_ahead(lambda batch: images.read_many(batch, pool.map), batches, ahead)
            found = [extractor(torch.from_numpy(pixels)) for pixels in read]
            layers = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            write_shard(folder, record, [images.numbers[i] for i in own], [images.labels[i] for i in own], layers)
    shutil.rmtree(folder / CLAIMS_FOLDER, ignore_errors=True)


def read_ahead(
    read: Callable[[range], NDArray[np.uint8]], batches: list[range], ahead: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images of each batch; the next batch is read while the caller works on this one."""
    waiting = [ahead.submit(read, batch) for batch in batches[:1]]
    for batch in [*batches[1:], None]:
        found = waiting.pop().result()
        if batch is not None:
            waiting.append(ahead.submit(read, batch))
        yield found


def take_chunks(leases: Leases, missing: Callable[[], list[int]], what: str, total: int) -> Iterator[int]:
    """Yield chunks that this process has claimed, until no chunk is missing; shows a progress bar for all chunks."""
    name = TextColumn("{task.description}", markup=False)  # a path, which may hold brackets
    with Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)

        def show(chunks: list[int]) -> None:
            progress.update(task, completed=total - len(chunks))

        for chunk in claimed_chunks(leases, missing, look=show):
            yield chunk
            leases.finish(claim_name(chunk))
        show([])


class FeatureSink:
    """Keeps only the features of drawn images, all that `flowar evaluate` needs; a `Sink` of sampling/worker.py."""

    def __init__(self, job: SamplingJob, extractor: Extractor) -> None:
        self.job = job
        self.extractor = extractor
        self.folder = job.out_dir / f"features-{extractor.name}"
        self._parts: list[dict[str, Tensor]] = []
        self._record: dict[str, Any] = {}  # features.json; known once samples.json exists

    def __str__(self) -> str:
        return f"features of images are in {self.folder}"

    def start(self) -> None:
        """Make the folder of features."""
        record, count = read_samples(self.job.out_dir), self.job.config.num_images
        of_images = {"kind": "samples", "root": str(self.job.out_dir), "identity": identify(record)}
        self._record = describe_features(self.extractor, num_images=count, **of_images)
        start_store(self.folder, self._record)

    def missing_chunks(self) -> list[int]:
        """Return the chunks whose features are missing."""
        existing = list_shards(self.folder)
        chunks = ((chunk, self.job.chunk(chunk)) for chunk in self.job.chunks)
        return [chunk for chunk, numbers in chunks if (numbers[0], numbers[-1]) not in existing]

    def is_missing(self, chunk: int) -> bool:
        """Return whether the features of a chunk are missing."""
        return chunk in self.missing_chunks()

    def needs(self, numbers: range) -> bool:
        """Return True: every batch of a missing chunk is needed."""
        return True

    def add(self, decoded: Tensor, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Compute the features of images (B, 3, H, W) in [-1, 1]."""
        check_finite(self.job, decoded, numbers)
        self._parts.append(self.extractor(to_uint8(decoded)))
        return []

    def end_chunk(self, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Start writing the features of a chunk."""
        layers = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        labels = [self.job.label(number) for number in numbers]
        return [pool.submit(write_shard, self.folder, self._record, numbers, labels, layers)]

    def is_finished(self) -> bool:
        """Return whether all features exist."""
        return not self.missing_chunks()

    def finish(self) -> None:
        """Do nothing: there is nothing to make from all features."""
