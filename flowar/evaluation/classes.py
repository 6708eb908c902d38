"""Class accuracy by a judge: how many images show the requested class, and what the others show instead.

Read next: judge.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.load import did_you_mean
from flowar.evaluation.image_sets import NO_LABEL, open_images
from flowar.evaluation.judge import AboutJudge
from flowar.evaluation.metrics import wilson_interval
from flowar.evaluation.protocols import Metric
from flowar.evaluation.store import Features
from flowar.latents.schema import read_passport
from flowar.sampling.folder import CLASS_NAMES, SAMPLES_FILE, read_samples


def class_names_of(path: Path) -> tuple[str, ...] | None:
    """Return the names of images' classes, by label; () if the classes have only numbers, None if there are no classes.

    Raises:
        UserError: if there are no images.
    """
    if not (path / SAMPLES_FILE).is_file():
        return open_images(path, "samples").class_names
    record = read_samples(path)
    if record.get("unconditional"):
        return None
    if CLASS_NAMES in record:
        return tuple(record[CLASS_NAMES])
    model = Path(str(record.get("model", "")))
    return tuple(read_passport(model).class_names) if (model / PASSPORT_FILE).is_file() else ()


def to_judge_classes(
    names: Sequence[str] | None, about: AboutJudge, what: str, *, strict: bool
) -> dict[int, int] | None:
    """Return {label of the images: class of the judge}; None if the images have no classes that it could know.

    Args:
        names: from `class_names_of`.
        about: the judge.
        what: the images, for messages.
        strict: whether the names are certainly classes, not just any folders.

    Raises:
        UserError: if the judge doesn't know one of the classes.
    """
    if names is None:
        return None
    if not names:
        return {label: label for label in range(len(about.class_names))}
    known = {name: place for place, name in enumerate(about.class_names)}
    unknown = [name for name in names if name not in known]
    if unknown and not strict and len(unknown) == len(names):
        return None
    if unknown:
        hint = did_you_mean(unknown[0], about.class_names[:20])
        raise UserError(
            f"{what} has {len(unknown):,} classes that the judge does not know (the first is {unknown[0]!r}{hint}); "
            f"the judge was trained on {about.images}; set extractor.images to images with the same classes, and "
            "another extractor.weights"
        )
    return {label: known[name] for label, name in enumerate(names)}


def judge_classes(found: Features, matched: dict[int, int] | None, about: AboutJudge) -> dict[str, Any] | None:
    """Return {"class_accuracy", "num_images", "confusion": {class: {shown: count}}}; None if no image has a class.

    Raises:
        UserError: if an image has a label that the judge doesn't know.
    """
    if matched is None or "logits" not in found.layers:
        return None
    has_class = found.labels != NO_LABEL
    if not has_class.any():
        return None
    strange = [label for label in found.labels[has_class].unique().tolist() if label not in matched]
    if strange:
        raise UserError(
            f"an image has class {strange[0]}, but the judge knows 0 to {len(about.class_names) - 1}, trained on "
            f"{about.images}; set extractor.images to images with the same classes, and another extractor.weights"
        )
    asked = torch.tensor([matched[label] for label in found.labels[has_class].tolist()])
    shown = found.layers["logits"][has_class].argmax(dim=1)
    return {
        "class_accuracy": (asked == shown).double().mean().item(),
        "num_images": len(asked),
        "confusion": count_confusion(asked, shown, about.class_names),
    }


def count_confusion(asked: Tensor, shown: Tensor, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return {requested class: {class shown: number of images}}, without zeros."""
    pairs, counts = torch.stack([asked, shown], dim=1).unique(dim=0, return_counts=True)
    table: dict[str, dict[str, int]] = {}
    for (row, column), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        table.setdefault(names[row], {})[names[column]] = count
    return table


def class_metric(judged: dict[str, Any], about: AboutJudge) -> Metric:
    """Return the share of images that show the requested class."""
    value, count = judged["class_accuracy"], judged["num_images"]
    note = f"the judge gets {about.accuracy:.1%} of {about.num_held_out:,} held-out real images right"
    return Metric("class_accuracy", value, wilson_interval(value, count), note)
