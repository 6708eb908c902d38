"""Which images train a judge, and where it is kept; any number of processes train it once. Read next: judge.py."""

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
    """Return where the judge is or goes: as extractor.weights says, else with the reference, else in `out_dir`."""
    if extractor.weights is not None:
        return Path(extractor.weights)
    if any(reference.glob(f"features-*/{STATISTICS_FILE}")) or (reference / JUDGE_FILE).is_file():
        return reference / JUDGE_FILE  # a made reference is a folder of its own
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
    """Return the extractor's settings with the judge's file, which is trained if it isn't there; by one process.

    Args:
        extractor: the settings; of another network they are returned as they are.
        file: from `choose_judge_file`.
        fallback: images that train it where neither the settings nor the passport names others that are here.
        passport: of the dataset that the model was trained on, if it is known.
        device: that trains it.
        lease_s: a process without a sign of life for this long is taken for dead.
        dry_run: only check whether it could be trained.

    Raises:
        UserError: if there are no images of classes, or the file is another judge's.
    """
    if extractor.name != OWN:
        return extractor
    if file.is_file():
        about = read_about_judge(file)
        if extractor.images is not None and Path(extractor.images).exists():
            given = open_images(extractor.images, "extractor.images").identity
            if given != about.identity:
                raise UserError(
                    f"the judge {file} was trained on other images, {about.images}, than extractor.images="
                    f"{extractor.images}; give another extractor.weights, or remove that file"
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
            f"wrote the judge {file}: it knows {about.accuracy:.1%} of {about.num_held_out:,} held-out images of "
            f"{about.images}"
        )

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with Leases(file.with_name(f".{file.name}.claims"), lease_s) as leases:
            finish_together(leases, file.is_file, finish)
        with contextlib.suppress(OSError):  # others may be at it still
            leases.folder.rmdir()
    except OSError as error:
        raise UserError(f"can't write the judge {file}: {error}; give another place as extractor.weights") from error
    return dataclasses.replace(extractor, weights=str(file))


def choose_images(
    extractor: ExtractorConfig, fallback: Path, passport: Passport | None
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the real images that train a judge, and the names of their classes.

    Raises:
        UserError: if there are none with at least two classes.
    """
    if extractor.images is not None:
        return open_classes(Path(extractor.images), "extractor.images", passport)
    if passport is not None and Path(passport.images).exists():
        return open_classes(Path(passport.images), "extractor.images", passport)
    if passport is not None:
        print(
            f"the images that the model was trained on, {passport.images}, are not here; the reference trains a judge"
        )
    return open_classes(fallback, "reference", passport)


def open_classes(path: Path, setting: str, passport: Passport | None) -> tuple[ImageSet, tuple[str, ...]]:
    """Return labelled images and the names of their classes.

    Raises:
        UserError: if there are fewer than two classes, or few images of one.
    """
    cure = "give a folder with one sub-folder of real images per class as extractor.images"
    images = open_images(path, setting)
    labels = set(images.labels)
    if len(labels - {NO_LABEL}) < 2:
        raise UserError(f"{setting}={path} has no classes that could train a judge; {cure}")
    if NO_LABEL in labels:
        raise UserError(f"{setting}={path} holds images outside of any class, which can't train a judge; {cure}")
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
