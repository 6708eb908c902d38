"""References that samples are compared with: statistics and features of real images.

A reference is images of any kind, an .npz with mu and sigma (ADM's VIRTUAL_*.npz has images too), or what
make-reference wrote:
    OUT_DIR/features-NETWORK/          complete once it has this name
        statistics.npz                 mu, sigma (and mu_s, sigma_s: sFID's) of all images
        features.json, features_*      features of some of the images, evenly spaced; store.py
    OUT_DIR/partial-NETWORK/           features of all images, while they are computed
Read next: evaluate.py.
"""

import io
import secrets
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from flowar.base.errors import UserError
from flowar.base.files import publish_folder
from flowar.base.records import write_record
from flowar.config.measuring import MeasureConfig, ReferenceConfig, SweepConfig
from flowar.evaluation.extractors import INCEPTION, Extractor
from flowar.evaluation.image_sets import ImageSet, open_images
from flowar.evaluation.metrics import Statistics, statistics
from flowar.evaluation.store import STORE_FILE, Features, FeatureStore, extract, read_features, read_store, write_shard
from flowar.sampling.folder import SAMPLES_FILE, identify, read_samples

STATISTICS_FILE = "statistics.npz"
STATISTICS_KEY = "statistics_xxh64"  # in features.json: the hash of that file
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names, by layer


@dataclass(frozen=True)
class Reference:
    """Real images: statistics of all of them, features of some."""

    path: Path
    statistics: dict[str, Statistics]  # by layer
    features: Features | None
    images: Path | None  # where the images of these features are


class ReferenceSource(NamedTuple):
    """Where a reference comes from, with all features computed."""

    path: Path
    statistics: Path | None  # an .npz with the statistics of all images; None: computed from the features
    store: FeatureStore | None

    def fingerprint(self) -> list[int]:
        """Return numbers that change when the statistics are replaced."""
        found = self.statistics.stat() if self.statistics is not None else None
        return [found.st_size, found.st_mtime_ns] if found is not None else []

    def read(self) -> Reference:
        """Return the reference."""
        features = self.store.read() if self.store is not None else None
        if self.statistics is not None:
            made = read_statistics(self.statistics)
        else:
            assert features is not None  # a reference has one or the other
            made = make_statistics(features)
        return Reference(self.path, made, features, self.store.images if self.store is not None else None)


def prepare_features(
    path: Path, setting: str, extractor: Extractor, folder: Path, config: MeasureConfig | SweepConfig
) -> FeatureStore:
    """Compute the features of images that are missing, sharing the work with other processes.

    Args:
        path: images, or what `flowar sample features_only=true` wrote.
        setting: that has the value `path`, for messages.
        extractor: the network.
        folder: keeps the features of all images and networks below it.
        config: sizes of chunks and batches.

    Raises:
        UserError: if there are no images, or the features were computed with other weights.
    """
    drawn = path / f"features-{extractor.name}"
    if (drawn / STORE_FILE).is_file() and (path / SAMPLES_FILE).is_file():
        found, record = check_network(drawn, extractor, f"{setting}={path}"), read_samples(path)
        if found["identity"] != identify(record):
            raise UserError(
                f"{drawn} holds features of samples {found['identity']}, but {path / SAMPLES_FILE} describes samples "
                f"{identify(record)}; restore the record that belongs to the features, or draw the samples again"
            )
        return FeatureStore(drawn, record["num_images"], path)
    images = open_images(path, setting)
    name = f"{extractor.name}-{extractor.weights_sha256[:8]}-{images.identity}"
    extract(images, extractor, folder / "features" / name, config)
    return FeatureStore(folder / "features" / name, len(images), path)


def check_network(store: Path, extractor: Extractor, what: str) -> dict[str, Any]:
    """Return a store's record, after checking that it comes from this network with these weights.

    Raises:
        UserError: if it comes from other weights.
    """
    record = read_store(store)
    found = record["weights_sha256"]
    if found != extractor.weights_sha256:
        raise UserError(
            f"{what} holds features by weights {found[:12]} of {extractor.name}, but this machine has weights "
            f"{extractor.weights_sha256[:12]}; use the same weights for both, or compute the features again"
        )
    return record


def check_reference(path: Path, extractor: Extractor) -> None:
    """Raise a UserError unless `path` is a reference that fits this network; before anything is computed."""
    if not path.exists():
        raise UserError(
            f"reference={path} does not exist; give images, an .npz with mu and sigma, or what make-reference wrote"
        )
    store = path / f"features-{extractor.name}"
    if (store / STATISTICS_FILE).exists():
        check_network(store, extractor, f"reference={path}")
        read_statistics(store / STATISTICS_FILE)
    elif any(path.glob(f"features-*/{STATISTICS_FILE}")):
        there = ", ".join(sorted(found.name.removeprefix("features-") for found in path.glob("features-*")))
        raise UserError(
            f"reference={path} has features by {there}, not by {extractor.name}; add them with `flowar evaluate "
            f"make-reference images=... out_dir={path} extractor.name={extractor.name}`"
        )
    elif path.suffix == ".npz":
        read_statistics(path)
    else:
        open_images(path, "reference")


def prepare_reference(config: MeasureConfig | SweepConfig, extractor: Extractor, folder: Path) -> ReferenceSource:
    """Return where the reference for a network comes from; missing features are computed below `folder`.

    Raises:
        UserError: if the reference can't be read or doesn't fit the network.
    """
    path = Path(config.reference)
    check_reference(path, extractor)
    store = path / f"features-{extractor.name}"
    if (store / STATISTICS_FILE).exists():
        record = read_store(store)
        return ReferenceSource(
            path, store / STATISTICS_FILE, FeatureStore(store, record["num_images"], Path(record["root"]))
        )
    given = path if path.suffix == ".npz" and read_statistics(path) else None
    if given is not None and not has_images(path):
        return ReferenceSource(path, given, None)
    return ReferenceSource(path, given, prepare_features(path, "reference", extractor, folder, config))


def has_images(path: Path) -> bool:
    """Return whether an .npz has images beside its statistics."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def make_statistics(features: Features) -> dict[str, Statistics]:
    """Return the statistics of features, by layer."""
    return {layer: statistics(features.layers[layer]) for layer in KEYS if layer in features.layers}


def read_statistics(file: Path) -> dict[str, Statistics]:
    """Return the statistics of an .npz by layer; {} if it holds only images.

    Raises:
        UserError: if the file holds neither, is damaged, or doesn't belong to the reference in its folder.
    """
    made = read_store(file.parent) if file.name == STATISTICS_FILE and (file.parent / STORE_FILE).is_file() else {}
    try:
        opened: Path | io.BytesIO = file
        if STATISTICS_KEY in made:  # version 0.1 didn't write it
            written = file.read_bytes()
            if xxhash.xxh64(written).hexdigest() != made[STATISTICS_KEY]:
                raise ValueError(f"it does not have the hash in {STORE_FILE}")
            opened = io.BytesIO(written)
        with np.load(opened) as content:
            found = {
                layer: Statistics(*(np.asarray(content[key], dtype=np.float64) for key in keys))
                for layer, keys in KEYS.items()
                if set(keys) <= set(content.files)
            }
            names = content.files
    except Exception as error:  # damaged archives raise any kind
        again = f"remove {file.parent} and make the reference again" if made else "copy or download it again"
        raise UserError(f"{file} is not a readable .npz: {error}; {again}") from error
    if not found and "arr_0" not in names:
        raise UserError(f"{file} holds {', '.join(names)}; give an .npz with mu and sigma, or with images in arr_0")
    for layer, (mu, sigma) in found.items():
        fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
        if not fits or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(
                f"{file} has {KEYS[layer][0]} of shape {mu.shape} and {KEYS[layer][1]} of {sigma.shape}; they must be "
                "(D,) and (D, D), and all finite; copy or make it again"
            )
    return found


def publish_reference(config: ReferenceConfig, images: ImageSet, partial: Path, target: Path) -> None:
    """Publish the statistics of all images with the features of some, and only then delete the other features."""
    features = read_features(partial, len(images), KEYS)
    given = read_statistics(Path(config.images)) if images.kind == "npz" else {}
    if features.record["extractor"] != INCEPTION:
        given = {}  # mu and sigma in a file come from Inception
    arrays: dict[str, NDArray[np.float64]] = {}
    for layer, own in (given or make_statistics(features)).items():
        arrays |= dict(zip(KEYS[layer], own, strict=True))
    kept = min(config.keep_images or len(images), len(images))
    some = features.at(torch.linspace(0, len(images) - 1, kept).round().long())
    for leftover in target.parent.glob(f".{target.name}.*"):  # left by a process that died here
        shutil.rmtree(leftover)
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    hidden.mkdir()
    written = io.BytesIO()
    np.savez(written, **arrays, num_images=np.int64(len(images)))
    (hidden / STATISTICS_FILE).write_bytes(written.getvalue())
    about = {"num_images": kept, "of": len(images), STATISTICS_KEY: xxhash.xxh64(written.getvalue()).hexdigest()}
    write_record(hidden / STORE_FILE, features.record | about)
    write_shard(hidden, features.record, some.numbers.tolist(), some.labels.tolist(), some.layers)
    publish_folder(hidden, target)
    shutil.rmtree(partial, ignore_errors=True)
