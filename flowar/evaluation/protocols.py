"""The metrics of each protocol, with their 95% intervals, from features. Read next: metrics.py for the formulas."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig
from flowar.config.measuring import EvaluateConfig
from flowar.evaluation.extractors import DINOV2, OWN, VGG, Extractor, has_weights, missing_weights
from flowar.evaluation.image_sets import NO_LABEL
from flowar.evaluation.metrics import (
    Frechet,
    adm_inception_score,
    frechet_of_few,
    groups,
    inception_score,
    jackknife_error,
    kid,
    normal_interval,
    precision_recall,
    statistics,
    statistics_without,
    wilson_interval,
)
from flowar.evaluation.references import (
    Reference,
    ReferenceSource,
    check_reference,
    prepare_features,
    prepare_reference,
    read_statistics,
)
from flowar.evaluation.store import Features, FeatureStore

MIN_IMAGES = 20  # torch-fidelity's Inception score is a mean over ten parts
MIN_REAL = 5  # each image needs three neighbours
MOST_REAL = 50_000  # images that precision, recall and KID compare with
ORDER_SEED = 0  # shuffles images that are sorted by class
NETWORKS = {"dinov2": DINOV2, "vgg16": VGG}


@dataclass(frozen=True)
class Metric:
    """A number about samples, with its 95% interval if it has one."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    note: str = ""

    def as_record(self) -> dict[str, object]:
        """Return the metric's entry in metrics.json."""
        record: dict[str, object] = {"value": self.value if math.isfinite(self.value) else None}
        if self.interval is not None:
            record |= dict(zip(("low", "high"), self.interval, strict=True))
        return record | ({"note": self.note} if self.note else {})


def load_more(config: EvaluateConfig, device: torch.device, notes: list[str]) -> dict[str, Extractor]:
    """Return the additional networks that `more` names, or all with local weights; note those without.

    Raises:
        UserError: if the weights of a network in `more` are missing.
    """
    if config.extractor.name == OWN and config.more is None:
        return {}
    wanted = config.more if config.more is not None else (("dinov2", "vgg16")[: 1 + (config.protocol != "adm")])
    found = {}
    for name in wanted:
        if config.more is None and not has_weights(NETWORKS[name]):
            notes.append(f"no metrics by {name}: {missing_weights(NETWORKS[name])}")
        else:
            found[name] = Extractor(ExtractorConfig(name=NETWORKS[name]), device)
    return found


def prepare_more(
    config: EvaluateConfig, extractor: Extractor, samples: Path, folder: Path
) -> tuple[FeatureStore, ReferenceSource]:
    """Return the features of samples and reference by an additional network.

    Raises:
        UserError: if they can't be computed, for example because the reference holds only Inception's statistics.
    """
    reference = Path(config.reference)
    if reference.suffix == ".npz" and read_statistics(reference):
        raise UserError(
            f"reference={reference} has Inception's statistics; for {extractor.name} give images, or a reference made "
            f"by `flowar evaluate make-reference` with extractor.name={extractor.name}"
        )
    check_reference(reference, extractor)
    store = prepare_features(samples, "samples", extractor, folder, config)
    return store, prepare_reference(config, extractor, folder)


def measure_metrics(
    found: Features, reference: Reference, config: EvaluateConfig, device: torch.device, notes: list[str]
) -> list[Metric]:
    """Return the metrics of the protocol.

    Raises:
        UserError: if there are too few images, or the statistics come from other features.
    """
    if len(found) < MIN_IMAGES:
        raise UserError(
            f"samples={config.samples} holds {len(found)} images, but at least {MIN_IMAGES} are needed; draw more"
        )
    if reference.features is not None and len(reference.features) < MIN_REAL:
        raise UserError(
            f"reference={reference.path} holds {len(reference.features)} images, but at least {MIN_REAL} are needed; "
            "give a larger reference"
        )
    layers = {name: values.to(device) for name, values in found.layers.items()}
    group = groups(found.labels, config.interval_groups) if config.interval_groups else None
    metrics = []
    for name, layer in (("fid", "features"), ("sfid", "spatial")):
        if layer not in layers or layer not in reference.statistics or (name == "sfid" and config.protocol != "adm"):
            continue
        width = len(reference.statistics[layer].mu)
        if width != layers[layer].shape[1]:
            raise UserError(
                f"reference={reference.path} holds statistics of {width} features, but extractor.name="
                f"{config.extractor.name} has {layers[layer].shape[1]}; use statistics of the same network"
            )
        metrics.append(frechet_metric(name, layers[layer], Frechet(reference.statistics[layer], device), group))
    if "logits" in layers:
        metrics.append(score_metric(layers["logits"], found, config.protocol, group, notes))
    if reference.features is None:
        notes.append(f"no precision, recall or KID: {reference.path} holds only statistics, no images")
        return metrics
    real = some_of(reference.features.layers["features"], MOST_REAL).to(device)
    mean, std = kid(layers["features"], real)
    metrics.append(Metric("kid", mean, note=f"std over subsets {std:.2g}"))
    return metrics + precision_recall_metrics(layers["features"], real, "")


def some_of(features: Tensor, most: int) -> Tensor:
    """Return at most `most` of the features, evenly spaced."""
    places = torch.linspace(0, len(features) - 1, min(most, len(features))).round().long()
    return features[places] if len(places) < len(features) else features


def frechet_metric(name: str, values: Tensor, distance: Frechet, group: Tensor | None) -> Metric:
    """Return the distance of features to a reference."""
    value = distance.distance(statistics(values))
    if group is None:
        return Metric(name, value)
    error = jackknife_error([distance.distance(own) for own in statistics_without(values, group)])
    return Metric(name, value, normal_interval(value, error))


def score_metric(logits: Tensor, found: Features, protocol: str, group: Tensor | None, notes: list[str]) -> Metric:
    """Return the protocol's Inception score. ADM's goes wrong if images are sorted by class; those are shuffled."""
    order = torch.arange(len(found))
    if protocol == "adm" and comes_in_blocks(found.labels):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(ORDER_SEED))
        notes.append("the samples are sorted by class; for the Inception score they were put in a fixed random order")
    logits = logits.cpu()[order]
    score: Callable[[Tensor], float] = adm_inception_score if protocol == "adm" else inception_score
    value = score(logits)
    if group is None:
        return Metric("inception_score", value)
    group = group[order]
    error = jackknife_error([score(logits[group != number]) for number in range(int(group.max()) + 1)])
    return Metric("inception_score", value, normal_interval(value, error))


def comes_in_blocks(labels: Tensor) -> bool:
    """Return whether neighbours share a class far more often than by chance, so that parts would hold few classes."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    by_chance = shares.square().sum().item()
    return len(shares) > 1 and (labels[1:] == labels[:-1]).double().mean().item() > (1 + by_chance) / 2


def precision_recall_metrics(samples: Tensor, real: Tensor, suffix: str) -> list[Metric]:
    """Return precision and recall with k = 3; Wilson's intervals take the neighbourhoods as fixed."""
    precision, recall = precision_recall(samples, real)
    note = f"against {len(real):,} real images"
    return [
        Metric(f"precision{suffix}", precision, wilson_interval(precision, len(samples)), note),
        Metric(f"recall{suffix}", recall, wilson_interval(recall, len(real)), note),
    ]


def measure_more(
    others: dict[str, tuple[FeatureStore, ReferenceSource]], config: EvaluateConfig, device: torch.device
) -> list[Metric]:
    """Return metrics by additional networks: FD-DINOv2 (Stein et al., 2023), and precision and recall on VGG16."""
    metrics = []
    for name, (store, source) in others.items():
        found, reference = store.read(["features"]), source.read()
        values = found.layers["features"].to(device)
        if name == "vgg16" and reference.features is not None:
            real = some_of(reference.features.layers["features"], MOST_REAL).to(device)
            metrics += precision_recall_metrics(values, real, "_vgg16")
        if name == "dinov2":
            group = groups(found.labels, config.interval_groups) if config.interval_groups else None
            metrics.append(
                frechet_metric("fd_dinov2", values, Frechet(reference.statistics["features"], device), group)
            )
    return metrics


def measure_difference(
    found: Features, against: Features, reference: Reference, config: EvaluateConfig, device: torch.device
) -> Metric:
    """Return FID minus the FID of other samples; leaving out the same images of both cancels their common noise.

    Raises:
        UserError: if the two sets of samples have different image numbers.
    """
    if found.numbers.tolist() != against.numbers.tolist():
        raise UserError(
            f"against={config.against} ({len(against):,} images) and samples={config.samples} ({len(found):,} images) "
            "must hold the same image numbers; draw both with the same num_images and seed"
        )
    distance = Frechet(reference.statistics["features"], device)
    pair = [own.layers["features"].to(device) for own in (found, against)]
    value = distance.distance(statistics(pair[0])) - distance.distance(statistics(pair[1]))
    note = f"to {config.against}"
    if not config.interval_groups:
        return Metric("fid_difference", value, note=note)
    group = groups(found.labels, config.interval_groups)
    both = zip(*(statistics_without(values, group) for values in pair), strict=True)
    error = jackknife_error([distance.distance(first) - distance.distance(second) for first, second in both])
    return Metric("fid_difference", value, normal_interval(value, error), note)


def measure_classes(found: Features, reference: Reference) -> dict[str, dict[str, float]]:
    """Return the FID of each class in samples and reference; FID is larger with fewer images, so compare equal numbers.

    Returns:
        {class: {"fid", "samples", "reference"}}, worst first; {} if there are no classes.
    """
    if reference.features is None:
        return {}
    results = {}
    for label in found.labels.unique().tolist():
        own = found.layers["features"][found.labels == label]
        real = reference.features.layers["features"][reference.features.labels == label]
        if label != NO_LABEL and min(len(own), len(real)) > 1:
            results[str(label)] = {"fid": frechet_of_few(own, real), "samples": len(own), "reference": len(real)}
    return dict(sorted(results.items(), key=lambda item: -item[1]["fid"])) if len(results) > 1 else {}
