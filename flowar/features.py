"""Features of images: the networks that give them, and the files that keep them. Networks are torch-fidelity's.

A folder of features, written by any number of processes together:
    features.json                            which images, which network; `describe`
    features_FIRST_LAST_HASH.safetensors     numbers (N,), labels (N,) int64; layers (N, ...) float32; xxh64 in the name
Read next: metrics.py for what is made of them, evaluate.py.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import safetensors.torch
import torch
import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowar import __version__
from flowar.config import EvaluateConfig, ExtractorConfig, ReferenceConfig, SweepConfig
from flowar.errors import UserError
from flowar.files import write_text, write_whole
from flowar.image_sets import ImageSet
from flowar.leases import WAIT_S, Leases, chunk_name, claim_one
from flowar.precision import convolution_precision
from flowar.weights import hash_weights

DEMO_EXTRACTOR = "demo-classifier"
INCEPTION, DINOV2, VGG = "inception-v3-compat", "dinov2-vit-l-14", "vgg16"
# file name in torch hub's folder of checkpoints, first digits of its sha256, where it is fetched from
PUBLISHED_WEIGHTS = {
    INCEPTION: (
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    VGG: ("vgg16-397923af.pth", "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth"),
}
DINOV2_FILES = ("facebookresearch_dinov2_main", "checkpoints/dinov2_vitl14_pretrain.pth")  # below torch hub's folder
SPATIAL_MODULE, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7  # ADM's mixed_6/conv:0, of which sFID takes 7 channels
STORE_FILE = "features.json"
CLAIMS = "claims"
SHARD_NAME = re.compile(r"features_(\d+)_(\d+)_([0-9a-f]{16})\.safetensors")
READERS = 8  # threads that decode images


class Extractor:
    """A network that gives features: layers "features", and where it has them "logits" and "spatial"."""

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        """Load the network.

        Raises:
            UserError: if there is no such network, or its weights are not here or not the published ones.
        """
        self.name = config.name
        self.device = device
        if config.name == DEMO_EXTRACTOR and DEMO_EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
            from flowar.digits import DigitFeatures

            register_feature_extractor(DEMO_EXTRACTOR, DigitFeatures)
        if config.name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(FEATURE_EXTRACTORS_REGISTRY)
            raise UserError(f"extractor.name={config.name} is unknown; there are: {known}, {DEMO_EXTRACTOR}")
        check_weights(config)
        kind = FEATURE_EXTRACTORS_REGISTRY[config.name]
        layers = {"features": kind.get_default_feature_layer_for_metric("prc" if config.name == VGG else "fid")}
        if config.name in (INCEPTION, DEMO_EXTRACTOR):
            layers["logits"] = kind.get_default_feature_layer_for_metric("isc")
        provided = [layer for layer in kind.get_provided_features_list() if layer in layers.values()]
        try:
            self.network = create_feature_extractor(
                config.name,
                provided,
                cuda=False,
                feature_extractor_weights_path=config.weights,
                verbose=False,
            ).to(device)
        except OSError as error:  # urllib's URLError is one
            given = ", or give the file as extractor.weights=" if config.name in PUBLISHED_WEIGHTS else ""
            raise UserError(f"{missing_weights(config.name)}{given} (fetching failed: {error})") from error
        except (RuntimeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
            given = config.weights or Path(torch.hub.get_dir())
            raise UserError(f"the weights of {config.name} in {given} can't be used: {error!r}"[:400]) from error
        check_hub_weights(config)
        self._order = [next(name for name, layer in layers.items() if layer == own) for own in provided]
        self._spatial: Tensor | None = None
        if config.name == INCEPTION:
            self.network.get_submodule(SPATIAL_MODULE).register_forward_hook(self._keep_spatial)
        self.weights_sha256 = hash_weights(self.network.state_dict())

    def _keep_spatial(self, module: object, arguments: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 x 17 x 7), ADM's order

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the layers of uint8 images (N, 3, H, W), float32 on the CPU."""
        with convolution_precision("fp32"):
            outputs = dict(zip(self._order, self.network(images.to(self.device)), strict=True))
        if self._spatial is not None:
            outputs["spatial"] = self._spatial
        return {name: output.float().cpu() for name, output in outputs.items()}


def check_weights(config: ExtractorConfig) -> None:
    """Raise a UserError if the given weights are not there, or are not the published ones."""
    if config.weights is None:
        if config.name == DEMO_EXTRACTOR:
            raise UserError(f"extractor.name={DEMO_EXTRACTOR} needs extractor.weights=RUN_DIR/classifier.safetensors")
        return
    if config.name.startswith("dinov2"):
        raise UserError(
            f"extractor.weights={config.weights}: {config.name} is read from torch hub's folder; set TORCH_HOME, or "
            "leave it out"
        )
    file = Path(config.weights)
    if not file.is_file():
        raise UserError(f"extractor.weights={file} does not exist")
    if config.name in PUBLISHED_WEIGHTS and not config.other_weights:
        _check_hash(config.name, file)


def check_hub_weights(config: ExtractorConfig) -> None:
    """Raise a UserError if the weights that torch hub's folder has are not the published ones."""
    if config.weights is None and config.name in PUBLISHED_WEIGHTS:
        _check_hash(config.name, Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED_WEIGHTS[config.name][0])


def _check_hash(name: str, file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    published, expected, url = PUBLISHED_WEIGHTS[name]
    if not found.startswith(expected):
        raise UserError(
            f"the weights {file} have sha256 {found[:8]}..., but {published} has {expected}...; fetch it from {url}, "
            "or set extractor.other_weights=true for numbers that compare with no published ones"
        )


def has_weights(name: str) -> bool:
    """Return whether a network's weights are in torch hub's folder."""
    folder = Path(torch.hub.get_dir())
    files = DINOV2_FILES if name == DINOV2 else (f"checkpoints/{PUBLISHED_WEIGHTS[name][0]}",)
    return all((folder / file).exists() for file in files)


def missing_weights(name: str) -> str:
    """Return which file is missing, and where it goes."""
    folder = Path(torch.hub.get_dir())
    if name == DINOV2:
        return (
            f"the weights of {name} are not here: on a machine with a network run "
            f'"python -c \'import torch; torch.hub.load(\\"facebookresearch/dinov2\\", \\"dinov2_vitl14\\")\'" and '
            f"copy {' and '.join(DINOV2_FILES)} from its ~/.cache/torch/hub to {folder}"
        )
    if name in PUBLISHED_WEIGHTS:
        file, _, url = PUBLISHED_WEIGHTS[name]
        return f"the weights of {name} are not here: fetch {url} to {folder / 'checkpoints' / file}"
    return f"the weights of {name} are not here; torch-fidelity fetches them on a machine with a network"


@dataclass(frozen=True)
class Features:
    """Features of images in the order of their numbers."""

    numbers: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -1 where there is none
    layers: dict[str, Tensor]  # (N, D) float32
    record: dict[str, object]  # features.json

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, places: Tensor) -> "Features":
        """Return some of them."""
        layers = {name: values[places] for name, values in self.layers.items()}
        return Features(self.numbers[places], self.labels[places], layers, self.record)


def describe(extractor: Extractor, *, num_images: int, **images: object) -> dict[str, object]:
    """Return what features.json says: the network, and which images."""
    network = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256}
    return {**network, "num_images": num_images, **images, "flowar": __version__, "torch": torch.__version__}


def start_store(folder: Path, record: dict[str, object]) -> None:
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


class Store(NamedTuple):
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
    layers = {}
    for name in list(parts[0]):
        layers[name] = torch.empty(num_images, *parts[0][name].shape[1:], dtype=parts[0][name].dtype)
        begin = 0
        for part in parts:
            own = rows[begin : begin + len(part["numbers"])]
            layers[name][own[own >= 0]] = part.pop(name)[own >= 0] if name != "numbers" else part[name][own >= 0]
            begin += len(own)
    return Features(layers.pop("numbers"), layers.pop("labels"), layers, record)


def extract(
    images: ImageSet,
    extractor: Extractor,
    folder: Path,
    config: EvaluateConfig | ReferenceConfig | SweepConfig,
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
    start_store(folder, describe(extractor, num_images=len(images), **about))
    size = config.chunk_images
    chunks = [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]

    def missing() -> list[int]:
        there = list_shards(folder)
        if is_done():  # asked after looking: who finishes deletes them
            return []
        return [i for i, own in enumerate(chunks) if (images.numbers[own[0]], images.numbers[own[-1]]) not in there]

    if not missing():
        return
    with Leases(folder / CLAIMS, config.lease_s) as leases, ThreadPoolExecutor(READERS) as pool:
        for chunk in take_chunks(leases, missing, f"features of {images.root}", len(chunks)):
            own = chunks[chunk]
            batches = [own[first : first + config.batch_size] for first in range(0, len(own), config.batch_size)]
            found = [extractor(torch.from_numpy(images.read_many(batch, pool.map))) for batch in batches]
            layers = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            write_shard(folder, [images.numbers[i] for i in own], [images.labels[i] for i in own], layers)
    shutil.rmtree(folder / CLAIMS, ignore_errors=True)


def take_chunks(leases: Leases, missing: Callable[[], list[int]], what: str, total: int) -> Iterable[int]:
    """Yield chunks that this process has claimed until none is missing, whoever did them; shows a bar over all."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total)
        while chunks := missing():
            progress.update(task, completed=total - len(chunks))
            claimed = claim_one(leases, chunks)
            if claimed is None:
                time.sleep(WAIT_S)
                continue
            if claimed in missing():  # it may have been done while we looked
                yield claimed
            leases.release(chunk_name(claimed))
        progress.update(task, completed=total)
