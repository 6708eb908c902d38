"""`flowar evaluate`: FID and its kin under a named protocol, with intervals; by any number of processes.

Features first, by all processes; then one of them makes the numbers. Read next: features.py, metrics.py, references.py.
"""

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flowar import __version__, sample
from flowar.config import EvaluateConfig, ExtractorConfig
from flowar.distributed import pick_device
from flowar.errors import UserError
from flowar.evaluation_report import write_report
from flowar.features import DEMO_EXTRACTOR, DINOV2, VGG, Extractor, Features, has_weights, missing_weights
from flowar.files import write_text
from flowar.image_sets import NO_LABEL, SAMPLES_FILE, open_images
from flowar.leases import Leases
from flowar.metrics import (
    Frechet,
    Interval,
    adm_inception_score,
    bootstrap_errors,
    frechet_of_few,
    inception_score,
    kid,
    precision_recall,
    share_error,
    statistics,
)
from flowar.references import Reference, get_features, load_reference, read_statistics
from flowar.report import record_evaluation
from flowar.run_folder import CHECKPOINTS

METRICS_FILE, BY_CLASS_FILE = "metrics.json", "metrics_by_class.json"
CLAIMS = "claims"
MIN_IMAGES = 10  # torch-fidelity's Inception score is a mean over ten parts
ORDER_SEED = 0  # of images that come sorted by class
NETWORKS = {"dinov2": DINOV2, "vgg16": VGG}


@dataclass(frozen=True)
class Metric:
    """A number about samples, with its standard error if it has one."""

    name: str
    value: float
    error: float | None = None
    note: str = ""

    def as_record(self) -> dict[str, object]:
        """Return what metrics.json says."""
        record: dict[str, object] = {"value": self.value}
        if self.error is not None:
            interval = Interval(self.value, self.error)
            record |= {"error": self.error, "low": interval.low, "high": interval.high}
        return record | ({"note": self.note} if self.note else {})


def main(config: EvaluateConfig, dry_run: bool = False) -> None:
    """Measure samples, print a table, write metrics.json and report.html; with whoever was given the same command."""
    device = pick_device(config.device)
    if config.sample is not None:
        sample.main(dataclasses.replace(config.sample, out_dir=config.samples), dry_run)
        if dry_run:
            return
    samples, out_dir = Path(config.samples), choose_out_dir(config)
    run = find_run(config)
    extractor = Extractor(config.extractor, device)
    notes: list[str] = []
    more = load_more(config, device, notes)
    if dry_run:
        if not any(samples.glob("features-*")):
            open_images(samples, "samples")
        if not Path(config.reference).exists():
            raise UserError(f"reference={config.reference} does not exist")
        print(f"would write {out_dir / METRICS_FILE}")
        return
    found = get_features(samples, "samples", extractor, out_dir, config)
    reference = load_reference(config, extractor, out_dir)
    against = None
    if config.against is not None:
        against = get_features(Path(config.against), "against", extractor, out_dir / "against", config)
    others = {}
    for name, network in more.items():
        try:
            own = get_features(samples, "samples", network, out_dir, config)
            others[name] = (own, load_more_reference(config, network, out_dir))
        except UserError as error:
            if config.more is not None:
                raise
            notes.append(f"no metrics by {name}: {error}")
    # One of the processes goes on.
    with contextlib.suppress(FileNotFoundError), Leases(out_dir / CLAIMS, config.lease_s) as leases:
        if not leases.claim("finish"):
            return
        metrics = measure(found, reference, config, device, notes)
        metrics += measure_more(others, config, device)
        if against is not None:
            metrics += measure_difference(found, against, reference, config, device)
        by_class = measure_classes(found, reference)
        record = describe(config, found, reference, metrics, notes)
        write_text(out_dir / METRICS_FILE, json.dumps(record, indent=2) + "\n")
        if by_class:
            write_text(out_dir / BY_CLASS_FILE, json.dumps(by_class, indent=2) + "\n")
        page = write_report(out_dir, record, by_class, found, reference, samples)
        if run is not None:
            values = {metric.name: metric.value for metric in metrics}
            about = {"num_samples": len(found), "protocol": config.protocol, "samples": str(samples.absolute())}
            record_evaluation(run[0], {"step": run[1], **about, **values})
        Console().print(table_of(record))
        print(f"wrote {out_dir / METRICS_FILE} and {page}")
        shutil.rmtree(out_dir / CLAIMS, ignore_errors=True)


def choose_out_dir(config: EvaluateConfig) -> Path:
    """Return the folder of this evaluation."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    samples = Path(config.samples)
    return samples / "evaluation" if samples.is_dir() else samples.with_name(f"{samples.name}.evaluation")


def load_more(config: EvaluateConfig, device: torch.device, notes: list[str]) -> dict[str, Extractor]:
    """Return the further networks that were asked for, or whose weights are here; note those that are not.

    Raises:
        UserError: if one that was asked for is not here.
    """
    if config.extractor.name == DEMO_EXTRACTOR and config.more is None:
        return {}
    wanted = config.more if config.more is not None else (("dinov2", "vgg16")[: 1 + (config.protocol != "adm")])
    found = {}
    for name in wanted:
        if config.more is None and not has_weights(NETWORKS[name]):
            notes.append(f"no metrics by {name}: {missing_weights(NETWORKS[name])}")
        else:
            found[name] = Extractor(ExtractorConfig(name=NETWORKS[name]), device)
    return found


def load_more_reference(config: EvaluateConfig, extractor: Extractor, folder: Path) -> Reference:
    """Return the reference for a further network.

    Raises:
        UserError: if it has statistics alone, which are Inception's.
    """
    if Path(config.reference).suffix == ".npz" and read_statistics(Path(config.reference)):
        raise UserError(
            f"reference={config.reference} has Inception's statistics; for {extractor.name} give images, or what "
            f"`flowar evaluate make-reference` makes with extractor.name={extractor.name}"
        )
    return load_reference(config, extractor, folder)


def measure(
    found: Features, reference: Reference, config: EvaluateConfig, device: torch.device, notes: list[str]
) -> list[Metric]:
    """Return the metrics of the protocol.

    Raises:
        UserError: if there are too few images, or the statistics are of other features.
    """
    if len(found) < MIN_IMAGES:
        raise UserError(f"samples={config.samples} holds {len(found)} images, but at least {MIN_IMAGES} are needed")
    layers = {name: values.to(device) for name, values in found.layers.items()}
    distances = {}
    for name, layer in (("fid", "features"), ("sfid", "spatial")):
        if layer not in layers or layer not in reference.statistics:
            continue
        if len(reference.statistics[layer].mu) != layers[layer].shape[1]:
            raise UserError(
                f"reference={reference.path} holds statistics of {len(reference.statistics[layer].mu)} features, "
                f"extractor.name={config.extractor.name} gives {layers[layer].shape[1]}; use statistics of the same "
                "network"
            )
        if name == "fid" or config.protocol == "adm":
            distances[name] = (layers[layer], Frechet(reference.statistics[layer], device))
    logits = layers.get("logits")
    score = adm_inception_score if config.protocol == "adm" else inception_score
    if logits is not None and config.protocol == "adm" and is_sorted_by_class(found):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(ORDER_SEED))
        logits = logits[order.to(device)]
        notes.append("the samples come sorted by class: for the Inception score they were put in a fixed random order")

    def numbers(places: torch.Tensor | slice) -> list[float]:
        values = [distance.distance(statistics(own[places])) for own, distance in distances.values()]
        return values + ([score(logits[places].cpu())] if logits is not None else [])

    names = [*distances, *(["inception_score"] if logits is not None else [])]
    values = numbers(slice(None))
    errors = bootstrap_errors(numbers, found.labels, config.resamples) if config.resamples else [None] * len(names)
    metrics = [Metric(*each) for each in zip(names, values, errors, strict=True)]
    if reference.features is None:
        notes.append(f"no precision, recall and KID: {reference.path} holds statistics alone, not images")
        return metrics
    real = reference.features.layers["features"].to(device)
    mean, std = kid(layers["features"], real)
    metrics.append(Metric("kid", mean, note=f"std over subsets {std:.2g}"))
    return metrics + precision_recall_metrics(layers["features"], real, "")


def precision_recall_metrics(samples: torch.Tensor, real: torch.Tensor, suffix: str) -> list[Metric]:
    """Return precision and recall with k = 3; each one's error is that of the share, for fixed neighbourhoods."""
    precision, recall = precision_recall(samples, real)
    against = f"against {len(real):,} real images"
    return [
        Metric(f"precision{suffix}", precision, share_error(precision, len(samples)), against),
        Metric(f"recall{suffix}", recall, share_error(recall, len(real)), against),
    ]


def measure_more(
    others: dict[str, tuple[Features, Reference]], config: EvaluateConfig, device: torch.device
) -> list[Metric]:
    """Return what further networks say: FD-DINOv2 (Stein et al., 2023), precision and recall on VGG16's features."""
    metrics = []
    for name, (own, reference) in others.items():
        values = own.layers["features"].to(device)
        if name == "vgg16" and reference.features is not None:
            metrics += precision_recall_metrics(values, reference.features.layers["features"].to(device), "_vgg16")
        if name == "dinov2":
            distance = Frechet(reference.statistics["features"], device)

            def measured(places: torch.Tensor | slice, values: torch.Tensor = values, to: Frechet = distance) -> list:
                return [to.distance(statistics(values[places]))]

            errors = bootstrap_errors(measured, own.labels, config.resamples) if config.resamples else [None]
            metrics.append(Metric("fd_dinov2", measured(slice(None))[0], errors[0]))
    return metrics


def measure_difference(
    found: Features, against: Features, reference: Reference, config: EvaluateConfig, device: torch.device
) -> list[Metric]:
    """Return FID minus that of other samples. Same images, same halves: what they have in common drops out.

    Raises:
        UserError: if they are not of the same numbers.
    """
    if found.numbers.tolist() != against.numbers.tolist():
        raise UserError(
            f"against={config.against} holds {len(against):,} images, samples={config.samples} {len(found):,}, or of "
            "other numbers; draw the same ones of both, with the same seed"
        )
    distance = Frechet(reference.statistics["features"], device)
    pair = [own.layers["features"].to(device) for own in (found, against)]

    def difference(places: torch.Tensor | slice) -> list[float]:
        first, second = (distance.distance(statistics(values[places])) for values in pair)
        return [first - second]

    errors = bootstrap_errors(difference, found.labels, config.resamples) if config.resamples else [None]
    return [Metric("fid_difference", difference(slice(None))[0], errors[0], f"to {config.against}")]


def measure_classes(found: Features, reference: Reference) -> dict[str, dict[str, float]]:
    """Return the FID of each class that samples and reference have; larger for fewer images, so compare like with like.

    Returns:
        {class: {"fid", "samples", "reference"}}, worst first.
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


def is_sorted_by_class(features: Features) -> bool:
    """Return whether the classes of images come one after the other, which spoils scores over consecutive parts."""
    labels = features.labels
    return bool((labels[1:] >= labels[:-1]).all() and labels[0] != labels[-1])


def describe(
    config: EvaluateConfig, found: Features, reference: Reference, metrics: list[Metric], notes: list[str]
) -> dict[str, object]:
    """Return what metrics.json says."""
    drawn = Path(config.samples) / SAMPLES_FILE
    return {
        "samples": config.samples,
        "num_samples": len(found),
        "reference": config.reference,
        "protocol": config.protocol,
        "extractor": {"name": config.extractor.name, "weights_sha256": found.record["weights_sha256"]},
        "metrics": {metric.name: metric.as_record() for metric in metrics},
        "notes": notes,
        "sampling": json.loads(drawn.read_text()) if drawn.is_file() else None,
        "flowar": __version__,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(config),
    }


def table_of(record: dict[str, object]) -> Table:
    """Return the table of `flowar evaluate`."""
    network = record["extractor"]["name"]
    title = (
        f"{record['num_samples']:,} samples, protocol {record['protocol']}, {network}, against {record['reference']}"
    )
    table = Table("metric", "value", "95% interval", "", title=title, caption="\n".join(record["notes"]))
    for name, metric in record["metrics"].items():
        interval = f"{metric['low']:.4g} to {metric['high']:.4g}" if "low" in metric else ""
        table.add_row(name.replace("_", " "), f"{metric['value']:.4f}", interval, metric.get("note", ""))
    return table


def find_run(config: EvaluateConfig) -> tuple[Path, int] | None:
    """Return the training run that the samples come from, and the step of their checkpoint, if there is one.

    Raises:
        UserError: if one is named, but is none.
    """
    drawn = Path(config.samples) / SAMPLES_FILE
    sampling = json.loads(drawn.read_text()) if drawn.is_file() else {}
    step = config.step if config.step is not None else sampling.get("step")
    run_dir = Path(config.run_dir) if config.run_dir else Path(sampling.get("model", "")).parent.parent
    if step is not None and (run_dir / CHECKPOINTS).is_dir():
        return run_dir, step
    if config.run_dir is not None:
        raise UserError(f"run_dir={run_dir} is no training run, or step={config.step} is not given; give both")
    return None


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("evaluate")
