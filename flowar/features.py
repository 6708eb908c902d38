"""Features of images: the networks that give them, and the files that keep them. Networks are torch-fidelity's.

A folder of features, written by any number of processes together:
    features.json                            which images, which network; `describe`
    features_FIRST_LAST_HASH.safetensors     numbers (N,), labels (N,) int64; layers (N, ...) float32; xxh64 in the name
Read next: metrics.py for what is made of them, evaluate.py.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowar import __version__
from flowar.config import ExtractorConfig
from flowar.errors import UserError
from flowar.files import write_text, write_whole
from flowar.image_sets import ImageSet
from flowar.leases import Leases, chunk_name, claim_one
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
WAIT_S = 0.5  # between two looks at what other workers do


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
            raise UserError(f"{_missing_weights(config.name)} (fetching it failed: {error})") from error
        except (RuntimeError, KeyError) as error:
            raise UserError(f"extractor.weights={config.weights} does not fit {config.name}: {error}") from error
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
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # it is on by default
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
    if config.name not in PUBLISHED_WEIGHTS or config.other_weights:
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    name, expected, url = PUBLISHED_WEIGHTS[config.name]
    if not found.startswith(expected):
        raise UserError(
            f"extractor.weights={file} has sha256 {found[:8]}..., but {name} has {expected}...; fetch it from {url}, "
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


def _missing_weights(name: str) -> str:
    given = ", or give the file as extractor.weights=/path/to/it" if name in PUBLISHED_WEIGHTS else ""
    return missing_weights(name) + given


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
    """Make a folder of features, or check that it is one of the same images and network.

    Raises:
        UserError: if it holds others, or can't be written.
    """
    file = folder / STORE_FILE
    if file.exists():
        before = json.loads(file.read_text())
        names = ("extractor", "weights_sha256", "identity")
        changed = [
            f"{name} was {before.get(name)}, now {record[name]}" for name in names if before.get(name) != record[name]
        ]
        if changed:
            raise UserError(
                f"{folder} holds features of other images or another network: {'; '.join(changed)}; give another "
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


def is_store(path: Path) -> bool:
    """Return whether a path is a folder of features."""
    return (path / STORE_FILE).is_file()


def read_features(folder: Path, layers: Iterable[str] | None = None, num_images: int | None = None) -> Features:
    """Return all features of a folder, each image once.

    Args:
        folder: what `extract` or `flowar sample` wrote.
        layers: which; None: all.
        num_images: the first so many samples; None: as many as were asked for last.

    Raises:
        UserError: if some are missing or damaged.
    """
    record = json.loads((folder / STORE_FILE).read_text())
    wanted = record["num_images"] if num_images is None else num_images
    parts: dict[str, list[Tensor]] = {}
    for (first, _), file in sorted(list_shards(folder).items()):
        if first >= wanted and record.get("kind") == "samples":
            continue  # of an earlier call for more images
        content = file.read_bytes()
        if xxhash.xxh64(content).hexdigest() not in file.name:
            raise UserError(f"{file} is damaged: it does not have the hash in its name; delete it and run again")
        for name, values in safetensors.torch.load(content).items():
            if layers is None or name in ("numbers", "labels", *layers):
                parts.setdefault(name, []).append(values)
    joined = {name: torch.cat(values) for name, values in parts.items()}
    numbers = joined.pop("numbers", torch.empty(0, dtype=torch.int64))
    order = numbers.argsort(stable=True)
    numbers = numbers[order]
    first_ones = torch.ones(len(numbers), dtype=torch.bool)
    first_ones[1:] = numbers[1:] != numbers[:-1]
    if record.get("kind") == "samples":
        first_ones &= numbers < wanted
    order = order[first_ones]
    if len(order) != wanted:
        raise UserError(
            f"{folder} holds features of {len(order):,} images, but {wanted:,} were asked for; run the "
            "same command again"
        )
    labels = joined.pop("labels")[order]
    return Features(numbers[first_ones], labels, {name: values[order] for name, values in joined.items()}, record)


def extract(
    images: ImageSet, extractor: Extractor, folder: Path, *, batch_size: int, chunk_images: int, lease_s: float
) -> None:
    """Write the features of all images; whoever is given the same shares the work. Returns when all are there.

    Images are taken in fixed chunks and batches, so that the features don't depend on who computes them.

    Raises:
        UserError: if an image can't be read, or the folder holds other features.
    """
    record = describe(
        extractor, num_images=len(images), kind=images.kind, root=str(images.root), identity=images.identity
    )
    start_store(folder, record)
    chunks = [range(first, min(first + chunk_images, len(images))) for first in range(0, len(images), chunk_images)]

    def missing() -> list[int]:
        there = list_shards(folder)
        return [i for i, own in enumerate(chunks) if (images.numbers[own[0]], images.numbers[own[-1]]) not in there]

    with Leases(folder / CLAIMS, lease_s) as leases, ThreadPoolExecutor(READERS) as pool:
        for chunk in take_chunks(leases, missing, f"features of {images.root}", len(chunks)):
            own = chunks[chunk]
            batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
            found = [extractor(torch.from_numpy(images.read_many(batch, pool.map))) for batch in batches]
            layers = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            write_shard(folder, [images.numbers[i] for i in own], [images.labels[i] for i in own], layers)


def take_chunks(leases: Leases, missing: Callable[[], list[int]], what: str, total: int) -> Iterable[int]:
    """Yield chunks that this process has claimed until none is missing, whoever did them; shows a bar over all."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total)
        while chunks := missing():
            progress.update(task, completed=total - len(chunks))
            leases.folder.mkdir(parents=True, exist_ok=True)  # who finishes first tidies up
            try:
                claimed = claim_one(leases, chunks)
            except FileNotFoundError:
                continue
            if claimed is None:
                time.sleep(WAIT_S)
                continue
            if claimed in missing():  # it may have been done while we looked
                yield claimed
            leases.release(chunk_name(claimed))
        progress.update(task, completed=total)
