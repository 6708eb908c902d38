"""What samples are compared with: statistics and features of real images; and `flowar evaluate make-reference`.

Forms: images of any kind, an .npz with mu and sigma (ADM's VIRTUAL_*.npz has images too), or what make-reference wrote:
    OUT_DIR/features-NETWORK/statistics.npz    mu, sigma (and mu_s, sigma_s: sFID's) of all images
    OUT_DIR/features-NETWORK/features_*        features of some of them, evenly spaced; features.py
Read next: evaluate.py.
"""

import contextlib
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowar.config import EvaluateConfig, ReferenceConfig, SweepConfig
from flowar.distributed import pick_device
from flowar.errors import UserError
from flowar.features import (
    CLAIMS,
    STORE_FILE,
    Extractor,
    Features,
    extract,
    is_store,
    list_shards,
    read_features,
    write_shard,
)
from flowar.files import write_text, write_whole
from flowar.image_sets import open_images
from flowar.leases import Leases
from flowar.metrics import Statistics, statistics

STATISTICS_FILE = "statistics.npz"
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names
COVARIED = tuple(KEYS)  # layers that have statistics


@dataclass(frozen=True)
class Reference:
    """Real images: statistics of all, features of some."""

    path: Path
    statistics: dict[str, Statistics]  # by layer
    features: Features | None
    images: Path | None  # where the images of these features are


def store_folder(folder: Path, extractor: str) -> Path:
    """Return where the features of a network are kept below a folder."""
    return folder / f"features-{extractor}"


def get_features(
    path: Path, setting: str, extractor: Extractor, folder: Path, config: EvaluateConfig | SweepConfig
) -> Features:
    """Return the features of images, computing those that are not there, with whoever else was asked to.

    Args:
        path: images, or a folder that has their features in it.
        setting: whose value `path` is, for messages.
        extractor: the network.
        folder: gets the features.
        config: how.

    Raises:
        UserError: if there are no images, or the features are another network's.
    """
    store = store_folder(path, extractor.name)
    if is_store(store):
        return check_network(read_features(store), extractor, f"{setting}={path}")
    store = store_folder(folder, extractor.name)
    images = open_images(path, setting)
    settings = {"batch_size": config.batch_size, "chunk_images": config.chunk_images, "lease_s": config.lease_s}
    extract(images, extractor, store, **settings)
    return read_features(store)


def check_network(features: Features, extractor: Extractor, what: str) -> Features:
    """Return the features, if they are of this network with these weights.

    Raises:
        UserError: if they are not.
    """
    found = features.record["weights_sha256"]
    if found != extractor.weights_sha256:
        raise UserError(
            f"{what} holds features by weights {found[:12]} of {extractor.name}, but those used here are "
            f"{extractor.weights_sha256[:12]}; use the same weights for both, or make them again"
        )
    return features


def load_reference(config: EvaluateConfig | SweepConfig, extractor: Extractor, folder: Path) -> Reference:
    """Return the reference for a network; features that are not there are computed into `folder`.

    Raises:
        UserError: if it can't be read or doesn't fit the network.
    """
    path = Path(config.reference)
    store = store_folder(path, extractor.name)
    if is_store(store) and (store / STATISTICS_FILE).exists():
        features = check_network(read_features(store), extractor, f"reference={path}")
        return Reference(path, read_statistics(store / STATISTICS_FILE), features, Path(features.record["root"]))
    if path.is_dir() and any(path.glob(f"features-*/{STATISTICS_FILE}")):
        there = ", ".join(sorted(found.parent.name.removeprefix("features-") for found in path.glob("features-*/")))
        raise UserError(
            f"reference={path} has features of {there}, not of {extractor.name}; add them with `flowar evaluate "
            f"make-reference images=... out_dir={path} extractor.name={extractor.name}`"
        )
    given = read_statistics(path) if path.suffix == ".npz" and path.is_file() else {}
    if given and not has_images(path):
        return Reference(path, given, None, None)
    features = get_features(path, "reference", extractor, folder / "reference", config)
    made = {layer: statistics(features.layers[layer]) for layer in COVARIED if layer in features.layers}
    return Reference(path, given or made, features, path)


def has_images(path: Path) -> bool:
    """Return whether an .npz has images beside its statistics."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def read_statistics(file: Path) -> dict[str, Statistics]:
    """Return the statistics of an .npz by layer; nothing if it has images alone.

    Raises:
        UserError: if it has neither.
    """
    try:
        with np.load(file) as content:
            found = {
                layer: Statistics(*(np.asarray(content[key], dtype=np.float64) for key in keys))
                for layer, keys in KEYS.items()
                if set(keys) <= set(content.files)
            }
            names = content.files
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no readable .npz: {error}") from error
    if not found and "arr_0" not in names:
        raise UserError(f"{file} holds {', '.join(names)}; mu and sigma (statistics) or images in arr_0 are needed")
    for layer, (mu, sigma) in found.items():
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma).all():
            raise UserError(
                f"{file}: {KEYS[layer][0]} has shape {mu.shape} and {KEYS[layer][1]} {sigma.shape}; (D,) and (D, D), "
                "all finite, are needed"
            )
    return found


def main(config: ReferenceConfig, dry_run: bool = False) -> None:
    """Make a reference, with whoever else was given the same command."""
    extractor = Extractor(config.extractor, pick_device(config.device))
    images = open_images(config.images, "images")
    store = store_folder(Path(config.out_dir), extractor.name)
    print(f"{len(images):,} images in {config.images}, features by {extractor.name} into {store}")
    if dry_run:
        return
    if (store / STATISTICS_FILE).exists():
        record = json.loads((store / STORE_FILE).read_text())
        if record["identity"] != images.identity:
            raise UserError(f"{store} is a reference of other images, {record['root']}; give another out_dir")
        print(f"{store / STATISTICS_FILE} is there already")
        return
    settings = {"batch_size": config.batch_size, "chunk_images": config.chunk_images, "lease_s": config.lease_s}
    extract(images, extractor, store, **settings)
    with contextlib.suppress(FileNotFoundError), Leases(store / CLAIMS, config.lease_s) as leases:
        if not leases.claim("finish") or (store / STATISTICS_FILE).exists():
            return
        given = read_statistics(Path(config.images)) if images.kind == "npz" else {}
        finish(config, store, given)
        print(f"wrote {store / STATISTICS_FILE}")


def finish(config: ReferenceConfig, store: Path, given: dict[str, Statistics]) -> None:
    """Write the statistics of all images, and leave features of some."""
    features = read_features(store, COVARIED)
    made = given or {layer: statistics(values) for layer, values in features.layers.items()}
    arrays = {name: array for layer, own in made.items() for name, array in zip(KEYS[layer], own, strict=True)}
    total = len(features)
    kept = min(config.keep_images or total, total)
    # The features that stay take the place of the others before the statistics say that all is done.
    if kept < total:
        some = features.at(torch.linspace(0, total - 1, kept).round().long())
        old = list_shards(store)
        write_text(store / STORE_FILE, json.dumps(features.record | {"num_images": kept, "of": total}, indent=2) + "\n")
        write_shard(store, some.numbers.tolist(), some.labels.tolist(), some.layers)
        for file in old.values():
            file.unlink()
    write_whole(store / STATISTICS_FILE, lambda hidden: _save_npz(hidden, arrays | {"num_images": np.int64(total)}))
    shutil.rmtree(store / CLAIMS, ignore_errors=True)


def _save_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with file.open("wb") as opened:
        np.savez(opened, **arrays)


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("make-reference")
