"""Is a folder whole? Compares every file that flowar reads back with its hash. Read-only.

Datasets are checked by data_prep/check.py, which sends the other kinds here.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowar.base.errors import UserError
from flowar.base.files import MIB
from flowar.base.records import read_record
from flowar.base.run_folder import (
    ANOMALIES,
    AVERAGES,
    CHECKPOINTS,
    CONFIG_FILE,
    EVALUATIONS,
    INIT_FILE,
    METADATA_FILE,
    is_checkpoint,
)
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.evaluation.image_sets import open_images
from flowar.evaluation.references import STATISTICS_FILE, read_statistics
from flowar.evaluation.store import STORE_FILE, read_features, read_store
from flowar.latents.schema import read_passport
from flowar.latents.vae import TRAINING_FOLDER, VAE_FILE, load_vae
from flowar.models.checkpoint_files import READ_AT_ONCE, check_pieces
from flowar.models.folders import WEIGHTS_FILE, load_model
from flowar.sampling.folder import IMAGES_FOLDER, SAMPLES_FILE, read_samples
from flowar.sampling.packing import PACKED_FILE, check_packed
from flowar.training.guard import WEIGHTS_FOLDER, load_bundle
from flowar.training.owner import OWNER_FILE
from flowar.training.report import read_metrics

KINDS = "a dataset, a VAE, a training run, a checkpoint, a model, samples, features, or a reference"


def kind_of(folder: Path) -> str | None:
    """Return what a folder holds, judging by its files; None if it is nothing that this module checks."""
    marks = {
        "run": CHECKPOINTS,
        "checkpoint": METADATA_FILE,
        "model": WEIGHTS_FILE,
        "vae": VAE_FILE,
        "samples": SAMPLES_FILE,
        "features": STORE_FILE,
    }
    kind = next((kind for kind, mark in marks.items() if (folder / mark).exists()), None)
    return kind or ("reference" if any(folder.glob(f"features-*/{STORE_FILE}")) else None)


def check_folder(folder: Path) -> Iterator[str]:
    """Yield a message for everything in a folder that differs from what was written; print what is whole.

    Raises:
        UserError: if the folder is not of a kind that can be checked.
    """
    kind = kind_of(folder)
    if kind is None:
        raise UserError(f"{folder} holds nothing that flowar can check; give {KINDS}")
    checks = {
        "run": check_training_run,
        "checkpoint": check_checkpoint,
        "model": check_model,
        "vae": check_vae,
        "samples": check_samples,
        "features": check_features,
        "reference": check_all_features,
    }
    yield from checks[kind](folder)


def check_model(folder: Path) -> Iterator[str]:
    """Check a model folder."""
    yield from problem_of(lambda: load_model(folder), f"model {folder}")


def check_vae(folder: Path) -> Iterator[str]:
    """Check a VAE that `flowar train-vae` wrote, and the checkpoints of its training."""
    yield from problem_of(lambda: load_vae(str(folder)).name, f"VAE {folder}")
    for entry in sorted((folder / TRAINING_FOLDER / CHECKPOINTS).glob("[!.]*")):
        yield from check_checkpoint(entry)


def check_checkpoint(folder: Path) -> Iterator[str]:
    """Check one checkpoint."""
    yield from problem_of(lambda: f"{check_pieces(folder) / MIB:,.1f} MiB of tensors", f"checkpoint {folder}")


def check_samples(folder: Path) -> Iterator[str]:
    """Check samples: their record, every image, the packed files, and features drawn instead of images."""
    yield from problem_of(functools.partial(read_samples, folder), f"record {folder / SAMPLES_FILE}")
    if (folder / IMAGES_FOLDER).is_dir():
        yield from problem_of(functools.partial(read_images, folder), f"images of {folder}")
    if (folder / PACKED_FILE).exists():
        yield from problem_of(functools.partial(check_packed, folder), f"packed forms of {folder}")
    yield from check_all_features(folder)


def read_images(folder: Path) -> str:
    """Read every image of samples; return how many there are.

    Raises:
        UserError: if an image is damaged or missing.
    """
    images = open_images(folder, "samples")
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return f"{sum(1 for _ in pool.map(images.read, range(len(images)))):,} images"


def check_all_features(folder: Path) -> Iterator[str]:
    """Check the features of samples, or of a reference, by each network."""
    for store in sorted(file.parent for file in folder.glob(f"features-*/{STORE_FILE}")):
        yield from check_features(store)


def check_features(folder: Path) -> Iterator[str]:
    """Check a folder of features, and the statistics of a reference in it."""
    yield from problem_of(functools.partial(read_store_whole, folder), f"features {folder}")


def read_store_whole(folder: Path) -> str:
    """Read all features of a folder and its statistics; return how many images they cover.

    Raises:
        UserError: if something is damaged or missing.
    """
    record = read_store(folder)
    if (folder / STATISTICS_FILE).exists():
        read_statistics(folder / STATISTICS_FILE)
    read_features(folder, record["num_images"])
    return f"{record['num_images']:,} images"


def check_training_run(folder: Path) -> Iterator[str]:
    """Check a training run: its settings and records, all checkpoints and averages, kept steps, measurements."""
    yield from problem_of(lambda: load_described(TrainConfig, folder / CONFIG_FILE), f"settings {folder / CONFIG_FILE}")
    yield from problem_of(lambda: read_passport(folder), f"passport of the shards of {folder}")
    yield from problem_of(lambda: f"{len(read_metrics(folder)):,} records", f"metrics of {folder}")
    records = [folder / OWNER_FILE, folder / INIT_FILE, *sorted((folder / EVALUATIONS).glob("*.json"))]
    for file in records:
        if file.exists():
            yield from problem_of(functools.partial(read_record, file, "delete it"), f"record {file}")
    for entry in (entry for kind in (CHECKPOINTS, AVERAGES) for entry in sorted((folder / kind).glob("[!.]*"))):
        if is_checkpoint(entry):
            yield from check_checkpoint(entry)
        else:
            yield f"{entry} is incomplete; the run sets it aside when it starts next"
    for bundle in sorted((folder / ANOMALIES).glob("batch_*")):
        yield from problem_of(functools.partial(load_bundle, bundle), f"skipped step {bundle}")
        yield from check_checkpoint(bundle / WEIGHTS_FOLDER)


def problem_of(read: Callable[[], object], what: str) -> Iterator[str]:
    """Read something; yield its error message, or print that it is whole, with what `read` returns."""
    try:
        found = read()
    except (UserError, OSError) as error:
        yield str(error)
    else:
        print(f"whole: {what}{f', {found}' if isinstance(found, str) else ''}")
