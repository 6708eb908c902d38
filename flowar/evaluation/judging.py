"""Choose the images that train a judge, and its file; any number of processes train it once. Read next: judge.py."""

import contextlib
import dataclasses
import os
from collections import Counter
from pathlib import Path

import torch

from flowar.base.errors import UserError
from flowar.base.leases import Leases, finish_together
from flowar.config.data import ExtractorConfig
from flowar.evaluation.extractors import OWN
from flowar.evaluation.image_sets import NO_LABEL, ImageSet, open_images
from flowar.evaluation.judge import LEAST_OF_A_CLASS, read_about_judge, save_judge, train_judge
from flowar.evaluation.references import STATISTICS_FILE
from flowar.latents.schema import Passport

JUDGE_FILE = "judge.safetensors"


def choose_judge_file(extractor: ExtractorConfig, reference: Path, out_dir: Path) -> Path:
    """Return the judge's file: extractor.weights if set, otherwise beside the reference, otherwise in `out_dir`."""
    if extractor.weights is not None:
        return Path(extractor.weights)
    if any(reference.glob(f"features-*/{STATISTICS_FILE}")) or (reference / JUDGE_FILE).is_file():
        return reference / JUDGE_FILE  # inside a reference that make-reference wrote
    reference = reference.absolute()
    beside = reference.with_name(f"{reference.name}.{JUDGE_FILE}")
    return beside if beside.is_file() or os.access(beside.parent, os.W_OK) else out_dir / JUDGE_FILE


def prepare_judge(
    extractor: ExtractorConfig,
    file: Path,
    fallback: Path,
    passport: Passport | None,
    device: torch.device,
    lease_s: float,
    *,
    dry_run: bool = False,
) -> ExtractorConfig:
    """Return the extractor's settings with the judge's file; if it doesn't exist, one process trains the judge.

    Args:
        extractor: the settings; those of another network are returned unchanged.
        file: from `choose_judge_file`.
        fallback: training images if neither the settings nor the passport names any that exist here.
        passport: of the dataset that the model was trained on, if known.
        device: to train on.
        lease_s: a process without a sign of life for this long counts as dead.
        dry_run: only check whether the judge could be trained.

    Raises:
        UserError: if there are no images with classes, or the file is a judge trained on other images.
    """
    if extractor.name != OWN:
        return extractor
    if file.is_file():
        about = read_about_judge(file)
        if extractor.images is not None and Path(extractor.images).exists():
            given = open_images(extractor.images, "extractor.images").identity
            if given != about.identity:
                raise UserError(
                    f"the judge {file} was trained on other images, from {about.images}, than extractor.images="
                    f"{extractor.images} holds; give another extractor.weights, or remove that file"
                )
        return dataclasses.replace(extractor, weights=str(file))
    images, class_names = choose_images(extractor, fallback, passport)
    if dry_run:
        print(f"would train a judge of {len(class_names):,} classes on {images.root} into {file}")
        return dataclasses.replace(extractor, weights=str(file))
    flip = extractor.flip if extractor.flip is not None else passport is not None and passport.flip

    def finish() -> None:
        judge, about = train_judge(images, class_names, device, flip=flip)
        save_judge(judge, about, file)
        print(
            f"wrote the judge {file}; it gets {about.accuracy:.1%} of {about.num_held_out:,} held-out images of "
            f"{about.images} right"
        )

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with Leases(file.with_name(f".{file.name}.claims"), lease_s) as leases:
            finish_together(leases, file.is_file, finish)
        with contextlib.suppress(OSError):  # other processes may still use it
            leases.folder.rmdir()
    except OSError as error:
        raise UserError(f"can't write the judge {file}: {error}; give another place as extractor.weights") from error
    return dataclasses.replace(extractor, weights=str(file))


def choose_images(
    extractor: ExtractorConfig, fallback: Path, passport: Passport | None
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the real images that train a judge, and the names of their classes.

    Raises:
        UserError: if there are no images with at least two classes.
    """
    if extractor.images is not None:
        return open_classes(Path(extractor.images), "extractor.images", passport)
    if passport is not None and Path(passport.images).exists():
        return open_classes(Path(passport.images), "extractor.images", passport)
    if passport is not None:
        print(
            f"the images that the model was trained on, {passport.images}, are not on this machine; training the judge "
            "on the reference"
        )
    return open_classes(fallback, "reference", passport)


def open_classes(path: Path, setting: str, passport: Passport | None) -> tuple[ImageSet, tuple[str, ...]]:
    """Return labelled images and the names of their classes.

    Raises:
        UserError: if there are fewer than two classes, or too few images of a class.
    """
    cure = "set extractor.images to a folder with one sub-folder of real images per class"
    images = open_images(path, setting)
    labels = set(images.labels)
    if len(labels - {NO_LABEL}) < 2:
        raise UserError(f"{setting}={path} has no classes that could train a judge; {cure}")
    if NO_LABEL in labels:
        raise UserError(f"{setting}={path} holds images without a class, which can't train a judge; {cure}")
    names = images.class_names
    if not names:
        known = tuple(passport.class_names) if passport is not None else ()
        names = known if len(known) > max(labels) else tuple(map(str, range(max(labels) + 1)))
    counts = Counter(images.labels)
    few = [label for label, count in sorted(counts.items()) if count < LEAST_OF_A_CLASS]
    if few:
        raise UserError(
            f"{setting}={path} holds {counts[few[0]]} images of class {names[few[0]]}, but at least "
            f"{LEAST_OF_A_CLASS} of each are needed to train a judge; {cure}"
        )
    return images, names
