"""The report of `flowar evaluate`: numbers next to published ones, samples, neighbours, precision and recall."""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.pages import REPORT_FILE, embed, fold, html_table, write_page
from flowar.base.pictures import SMALLEST_SHOWN, save_curve, save_grid
from flowar.evaluation.expected import EXPECTED, show_published
from flowar.evaluation.image_sets import ImageSet, open_images
from flowar.evaluation.metrics import precision_recall
from flowar.evaluation.references import Reference
from flowar.evaluation.store import Features

# The files that an evaluation writes; the first one is written last.
EVALUATION_FILE, BY_CLASS_FILE = "metrics.json", "metrics_by_class.json"
SHEET_IMAGES, SHEET_COLUMNS = 100, 10
NEIGHBOUR_ROWS, NEIGHBOURS = 8, 7
CURVE_NEIGHBOURHOODS = (1, 2, 3, 5, 10)

CURVE_IMAGES = 5_000  # of each side: distances grow with the square
CLASSES_SHOWN = 10  # worst and best
ABBREVIATIONS = {"fid": "FID", "sfid": "sFID", "kid": "KID"}
PUBLISHED_NOTE = (
    " Published numbers are of 50,000 samples against ADM's reference of ImageNet at 256 px; the weights that the "
    "authors released, measured by others, differ from the paper."
)
MOST_CONFUSION_CLASSES, MISTAKES_SHOWN = 20, 30  # the whole table up to this many classes; else the commonest mistakes


def write_evaluation_page(
    out_dir: Path,
    record: dict[str, Any],
    by_class: dict[str, dict[str, float]],
    found: Features,
    reference: Reference,
    samples: Path,
) -> None:
    """Write report.html, with its pictures embedded and also as files beside it.

    Args:
        out_dir: of the evaluation.
        record: content of metrics.json.
        by_class: content of metrics_by_class.json.
        found, reference: features.
        samples: folder of the samples, which may hold only features.
    """
    parts = [
        f"<h1>{escape(record['samples'])}</h1>",
        f'<p class="note">{record["num_samples"]:,} samples against {escape(record["reference"])}; protocol '
        f"{record['protocol']}, features by {escape(record['extractor']['name'])} (weights "
        f"{record['extractor']['weights_sha256'][:12]}); flowar {record['flowar']}, torch {record['torch']}.</p>",
        "<h2>Numbers</h2>",
        numbers_table(record),
    ]
    parts += [f'<p class="note">{escape(note)}</p>' for note in record["notes"]]
    if record.get("classes"):
        parts += ["<h2>Classes, by the judge</h2>", _confusion(record)]
    images = _open_if_there(samples)
    if images is not None:
        save_grid(_take(images, range(min(SHEET_IMAGES, len(images)))), out_dir / "samples.png", columns=SHEET_COLUMNS)
        parts += ["<h2>The first samples</h2>", embed(out_dir / "samples.png")]
    features = reference.features
    real = _open_if_there(reference.images) if features is not None else None
    if features is not None and real is not None and real.identity != features.record["identity"]:
        real = None  # the images have changed since
    if images is not None and features is not None and real is not None:
        save_neighbours(images, real, found, features, out_dir / "neighbours.png")
        parts += [
            "<h2>Nearest real images</h2>",
            '<p class="note">A sample on the left, then the real images nearest to it in feature space, nearest first. '
            "If the model copied training images, it would show here.</p>",
            embed(out_dir / "neighbours.png"),
        ]
    if features is not None:
        save_precision_recall(found, features, out_dir / "precision_recall.png")
        parts += ["<h2>Precision and recall</h2>", embed(out_dir / "precision_recall.png", "curve")]
    if by_class:
        parts += ["<h2>FID by class</h2>", _classes(by_class)]
    settings = {"settings": record["settings"], "sampling": record["sampling"]}
    parts += [
        "<h2>Settings</h2>",
        fold("how it was measured, and how the samples were drawn", json.dumps(settings, indent=2)),
    ]
    write_page(out_dir / REPORT_FILE, f"{record['samples']}: evaluation", "\n".join(parts))


def numbers_table(record: dict[str, Any]) -> str:
    """Return the metrics of a metrics.json with their intervals, beside what is published of such a model, as HTML."""
    variant = (record["sampling"] or {}).get("variant")
    sources = EXPECTED.get(str(variant), ())
    ceiling = (record.get("ceiling") or {}).get("metrics", {})
    rows = []
    for name, metric in record["metrics"].items():
        interval = f"{metric['low']:.4g} to {metric['high']:.4g}" if "low" in metric else ""
        published = [show_published(name, source) for source in sources]
        value = "not a number" if metric["value"] is None else f"{metric['value']:.4f}"
        real = [show_value(ceiling.get(name))] if ceiling else []
        rows.append([show_name(name), value, interval, *real, *published, metric.get("note", "")])
    columns = ["metric", "value", "95% interval", *(["real images through the VAE"] if ceiling else [])]
    table = html_table([*columns, *(f"{variant}: {source.source}" for source in sources), ""], rows)
    said = ""
    if ceiling:
        said = (
            f'<p class="note">The ceiling: {record["ceiling"]["num_images"]:,} images of the reference, encoded and '
            "decoded by the samples' VAE. The VAE limits samples to about these values.</p>"
        )
    return (
        table
        + said
        + '<p class="note">Intervals of FID, sFID, FD and Inception score cover the expected value over seeds for this '
        "number of samples and this reference, by leaving out groups of samples in turn. Those of precision and recall "
        "are intervals of a share of this many images. FID is larger with fewer images."
        f"{PUBLISHED_NOTE if sources else ''}</p>"
    )


def show_name(metric: str) -> str:
    """Return the name of a metric of metrics.json as people write it."""
    words = metric.replace("fd_dinov2", "FD-DINOv2").split("_")
    return " ".join(ABBREVIATIONS.get(word, word) for word in words)


def show_value(metric: dict[str, Any] | None) -> str:
    """Return the value of a metric of metrics.json for a table; "" if there is no such metric."""
    if metric is None:
        return ""
    return "not a number" if metric["value"] is None else f"{metric['value']:.4f}"


def _confusion(record: dict[str, Any]) -> str:
    """Return what the samples of each class show: a row per class, or with many classes the commonest mistakes."""
    judge, judged = record["judge"], record["classes"]
    names, table = judge["class_names"], judged["confusion"]
    on_reference = judge.get("accuracy_on_reference")
    said = (
        f'<p class="note"><b>{judged["class_accuracy"]:.1%}</b> of {judged["num_images"]:,} samples show the requested '
        f"class, according to a classifier that was trained on {judge['num_images']:,} real images. It recognises "
        f"{judge['accuracy']:.1%} of {judge['num_held_out']:,} held-out images"
        f"{'' if on_reference is None else f', and {on_reference:.1%} of the reference'}.</p>"
    )
    if len(names) <= MOST_CONFUSION_CLASSES:
        rows = [[name, *(f"{table[name].get(other, 0) or ''}" for other in names)] for name in names if name in table]
        return said + html_table(["requested", *(f"shows {name}" for name in names)], rows)
    mistakes = [(count, name, other) for name, row in table.items() for other, count in row.items() if name != other]
    mistakes.sort(key=lambda mistake: (-mistake[0], mistake[1:]))
    rows = [[name, other, f"{count:,}"] for count, name, other in mistakes[:MISTAKES_SHOWN]]
    return said + html_table(["requested", "shows", "samples"], rows)


def _classes(by_class: dict[str, dict[str, float]]) -> str:
    items = list(by_class.items())
    shown = items if len(items) <= 2 * CLASSES_SHOWN else items[:CLASSES_SHOWN] + items[-CLASSES_SHOWN:]
    rows = [[label, f"{own['fid']:.2f}", f"{own['samples']:,}", f"{own['reference']:,}"] for label, own in shown]
    count = f"The {CLASSES_SHOWN} worst and best of {len(items)} classes. " if len(shown) < len(items) else ""
    return (
        f'<p class="note">{count}FID is larger with fewer images; compare only runs with equal numbers.</p>'
        + html_table(["class", "FID", "samples", "real images"], rows)
    )


def _open_if_there(path: Path | None) -> ImageSet | None:
    """Return images for pictures, or None if only features are left, or the images were moved."""
    if path is None:
        return None
    try:
        return open_images(path, "images")
    except UserError:
        return None


def _take(images: ImageSet, places: range) -> Tensor:
    taken = torch.from_numpy(images.read_many(places).copy())
    return taken.repeat_interleave(_enlarge(taken), 2).repeat_interleave(_enlarge(taken), 3)


def _enlarge(images: Tensor) -> int:
    return max(1, SMALLEST_SHOWN // images.shape[-1])


def save_neighbours(images: ImageSet, real: ImageSet, found: Features, reference: Features, path: Path) -> None:
    """Write samples, each with the real images nearest to it in feature space."""
    places = torch.linspace(0, len(found) - 1, min(NEIGHBOUR_ROWS, len(found))).round().long()
    distances = torch.cdist(found.layers["features"][places], reference.layers["features"])
    nearest = distances.topk(min(NEIGHBOURS, len(reference)), largest=False).indices
    of_number = {number: place for place, number in enumerate(real.numbers)}
    rows = []
    drawn = {number: place for place, number in enumerate(images.numbers)}
    for number, own in zip(found.numbers[places].tolist(), nearest.tolist(), strict=True):
        rows.append(_take(images, range(drawn[number], drawn[number] + 1)))
        there = [of_number[number] for number in reference.numbers[own].tolist()]
        rows += [_take(real, range(other, other + 1)) for other in there]
    side = rows[0].shape[-2:]
    resized = [own if own.shape[-2:] == side else torch.nn.functional.interpolate(own, size=side) for own in rows]
    save_grid(torch.cat(resized), path, columns=1 + nearest.shape[1])


def save_precision_recall(found: Features, reference: Features, path: Path) -> None:
    """Write precision over recall for several sizes of the neighbourhood, of at most 5,000 images of each side."""
    samples, real = (_some(own.layers["features"]) for own in (found, reference))
    most = min(len(samples), len(real)) - 1
    sizes = [k for k in CURVE_NEIGHBOURHOODS if k <= most]
    points = [precision_recall(samples, real, k) for k in sizes]
    save_curve(
        [recall for _, recall in points],
        [precision for precision, _ in points],
        path,
        labels=[f"k = {k}" for k in sizes],
        axes=("recall", "precision"),
        title=f"{len(samples):,} samples, {len(real):,} real images",
    )


def _some(features: Tensor) -> Tensor:
    places = torch.linspace(0, len(features) - 1, min(CURVE_IMAGES, len(features))).round().long()
    return features[places]
