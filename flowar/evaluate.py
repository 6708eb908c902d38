"""`flowar evaluate` and `make-reference`: FID and its kin under a named protocol, by any number of processes.

Features first, by all processes; then one of them makes the numbers. Read next: features.py, metrics.py, references.py.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from flowar import __version__
from flowar.base.devices import pick_device
from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.base.hashes import hash_weights
from flowar.base.leases import CLAIMS_FOLDER, Leases, finish_together
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import CHECKPOINTS, checkpoint_step, list_checkpoints, read_progress
from flowar.base.terminal import plain_console
from flowar.config.load import decisive_settings
from flowar.config.measuring import EvaluateConfig, ReferenceConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.image_sets import open_images
from flowar.evaluation.page import BY_CLASS_FILE, EVALUATION_FILE, write_evaluation_page
from flowar.evaluation.protocols import (
    Metric,
    load_more,
    measure_classes,
    measure_difference,
    measure_metrics,
    measure_more,
    prepare_more,
)
from flowar.evaluation.references import (
    ReferenceSource,
    check_network,
    check_reference,
    prepare_features,
    prepare_reference,
    publish_reference,
)
from flowar.evaluation.store import (
    Features,
    FeatureSink,
    FeatureStore,
    extract,
)
from flowar.models.folders import load_model
from flowar.sampling.folder import SAMPLES_FILE, read_samples
from flowar.sampling.images import ImageSink
from flowar.sampling.worker import draw_samples
from flowar.training.report import record_evaluation


def main(config: EvaluateConfig, dry_run: bool = False) -> None:
    """Measure samples, print a table, write metrics.json and report.html; with whoever was given the same command."""
    device = pick_device(config.device)
    samples, out_dir = Path(config.samples), choose_out_dir(config)
    extractor = Extractor(config.extractor, device)
    notes: list[str] = []
    more = load_more(config, device, notes)
    # What can be known before anything is computed.
    check_reference(Path(config.reference), extractor)
    run = find_run(config)
    if config.sample is not None:
        drawing = dataclasses.replace(config.sample, out_dir=config.samples, extractor=config.extractor)
        make_sink = functools.partial(FeatureSink, extractor=extractor) if drawing.features_only else ImageSink
        draw_samples(drawing, make_sink, dry_run)
        run = run or find_run(config)
    elif dry_run and not any(samples.glob("features-*")):
        open_images(samples, "samples")
    if dry_run:
        print(f"would write {out_dir / EVALUATION_FILE}")
        return

    # Features, by all processes.
    found = prepare_features(samples, "samples", extractor, out_dir, config)
    reference = prepare_reference(config, extractor, out_dir)
    against = None
    if config.against is not None:
        against = prepare_features(Path(config.against), "against", extractor, out_dir, config)
    others: dict[str, tuple[FeatureStore, ReferenceSource]] = {}
    for name, network in more.items():
        try:
            others[name] = prepare_more(config, network, samples, out_dir)
        except UserError as error:
            if config.more is not None:
                raise
            notes.append(f"no metrics by {name}: {error}")

    # Numbers, by one of them.
    stores = [str(store) for store in (found, reference, against, sorted(others.items()))]
    stores += [str(source.fingerprint()) for source in (reference, *(source for _, source in others.values()))]
    kept = [found, reference.store, against]
    kept += [own for _, (store, source) in sorted(others.items()) for own in (store, source.store)]
    stores += [own.identity() for own in kept if own is not None]
    identity = hashlib.sha256(json.dumps([decisive_settings(config), stores, __version__]).encode()).hexdigest()

    def is_done() -> bool:
        return (out_dir / EVALUATION_FILE).exists() and read_evaluation(out_dir).get("identity") == identity

    def finish() -> None:
        is_of_run = run is not None and check_run(config, *run, notes)
        own = found.read()
        real = reference.read()
        metrics = measure_metrics(own, real, config, device, notes) + measure_more(others, config, device)
        if against is not None:
            metrics.append(measure_difference(own, against.read(["features"]), real, config, device))
        by_class = measure_classes(own, real)
        write_text(out_dir / BY_CLASS_FILE, json.dumps(by_class, indent=2) + "\n")
        record = describe_evaluation(config, own, metrics, notes) | {"identity": identity}
        json.dumps(record, allow_nan=False)  # what other programs can't read is not written
        write_evaluation_page(out_dir, record, by_class, own, real, found.images)
        if run is not None and is_of_run:
            values = {metric.name: metric.value for metric in metrics if math.isfinite(metric.value)}
            about = {"num_samples": len(own), "protocol": config.protocol, "samples": str(samples.absolute())}
            record_evaluation(run[0], {"step": run[1], **about, "reference": config.reference, **values})
        write_record(out_dir / EVALUATION_FILE, record)  # says that all is done

    was_done = is_done()
    with Leases(out_dir / CLAIMS_FOLDER, config.lease_s) as leases:
        if finish_together(leases, is_done, finish) or was_done:
            record = read_evaluation(out_dir)
            if record.get("identity") != identity:
                raise UserError(
                    f"{out_dir / EVALUATION_FILE} holds other numbers: another `flowar evaluate` with other settings "
                    "or images writes there at the same time; give each its out_dir, and run this again"
                )
            plain_console().print(evaluation_table(record))
            print(f"{out_dir / EVALUATION_FILE} and report.html {'were there already' if was_done else 'are written'}")


def read_evaluation(out_dir: Path) -> dict[str, Any]:
    """Return what metrics.json says.

    Raises:
        DamagedRecordError: if it is not what was written.
    """
    return read_record(out_dir / EVALUATION_FILE, "delete it and run the same `flowar evaluate` again")


def choose_out_dir(config: EvaluateConfig) -> Path:
    """Return the folder of this evaluation: in what `flowar sample` wrote, else beside the samples."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    samples = Path(config.samples)
    is_drawn = config.sample is not None or (samples / SAMPLES_FILE).exists()
    return samples / "evaluation" if is_drawn else samples.with_name(f"{samples.name}.evaluation")


def describe_evaluation(
    config: EvaluateConfig, found: Features, metrics: list[Metric], notes: list[str]
) -> dict[str, Any]:
    """Return what metrics.json says."""
    return {
        "samples": config.samples,
        "num_samples": len(found),
        "reference": config.reference,
        "protocol": config.protocol,
        "extractor": {"name": config.extractor.name, "weights_sha256": found.record["weights_sha256"]},
        "metrics": {metric.name: metric.as_record() for metric in metrics},
        "notes": notes,
        "sampling": read_sampling(config),
        "flowar": __version__,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(config),
    }


def evaluation_table(record: dict[str, Any]) -> Table:
    """Return the table of `flowar evaluate`."""
    network = record["extractor"]["name"]
    what = f"{record['num_samples']:,} samples, protocol {record['protocol']}, {network}"
    table = Table(
        "metric", "value", "95% interval", "", title=f"{what}, against {record['reference']}",
        caption="\n".join(record["notes"]),
    )  # fmt: skip
    for name, metric in record["metrics"].items():
        interval = f"{metric['low']:.4g} to {metric['high']:.4g}" if "low" in metric else ""
        value = "not a number" if metric["value"] is None else f"{metric['value']:.4f}"
        table.add_row(name.replace("_", " "), value, interval, metric.get("note", ""))
    return table


def read_sampling(config: EvaluateConfig) -> dict[str, Any] | None:
    """Return what the samples' record says, or None if `flowar sample` didn't draw them."""
    samples = Path(config.samples)
    return read_samples(samples) if (samples / SAMPLES_FILE).is_file() else None


def find_run(config: EvaluateConfig) -> tuple[Path, int] | None:
    """Return the training run that the samples come from, and the step of their checkpoint, if there is one.

    Raises:
        UserError: if one is named that does not exist.
    """
    sampling = read_sampling(config) or {}
    step = config.step if config.step is not None else sampling.get("step")
    run_dir = Path(config.run_dir) if config.run_dir else Path(str(sampling.get("model", ""))).parent.parent
    if isinstance(step, int) and (run_dir / CHECKPOINTS).is_dir():
        return run_dir, step
    if config.run_dir is not None:
        raise UserError(f"run_dir={run_dir} must be a training run, and step={config.step} be given; give both")
    return None


def check_run(config: EvaluateConfig, run_dir: Path, step: int, notes: list[str]) -> bool:
    """Return whether the numbers go to a run: the samples were drawn with weights of its checkpoint.

    Where that can't be known, because the checkpoint is gone or `flowar sample` didn't draw them, they go to a run that
    was named as run_dir, and to no other; a note says so. To one whose checkpoint is damaged they go in no case.

    Raises:
        UserError: if the named run's checkpoint has other weights, or is damaged.
    """
    sampling = read_sampling(config)
    checkpoint = next((own for own in list_checkpoints(run_dir) if checkpoint_step(own) == step), None)
    if sampling is None or checkpoint is None:
        why = "its samples have no record" if sampling is None else f"it has no checkpoint of step {step} any more"
        if config.run_dir is None:
            notes.append(f"not added to {run_dir}: {why}; to add it, give run_dir={run_dir} step={step}")
        return config.run_dir is not None
    wanted = sampling.get("weights_sha256")
    try:
        names = [*read_progress(checkpoint).averages, "raw"]
        names.sort(key=lambda name: name != sampling.get("weights"))  # the likeliest first
        if any(hash_weights(load_model(checkpoint, name).state_dict()) == wanted for name in names):
            return True
    except (UserError, FileNotFoundError) as error:  # damaged, or deleted meanwhile by the run
        why = str(error) if checkpoint.exists() else f"its checkpoint of step {step} was deleted meanwhile"
        if config.run_dir is not None:
            raise UserError(f"run_dir={run_dir}: {why}; leave run_dir and step out to measure alone") from error
        notes.append(f"not added to {run_dir}: {why}")
        return False
    problem = f"samples={config.samples} were drawn with weights {str(wanted)[:12]}, which {checkpoint} does not have"
    if config.run_dir is not None:
        raise UserError(f"{problem}; give the run_dir and step that they are of, or leave both out")
    notes.append(f"not added to {run_dir}: {problem}")
    return False


def make_reference(config: ReferenceConfig, dry_run: bool = False) -> None:
    """Make a reference, with whoever else was given the same command."""
    extractor = Extractor(config.extractor, pick_device(config.device))
    images = open_images(config.images, "images")
    out_dir = Path(config.out_dir)
    target, partial = out_dir / f"features-{extractor.name}", out_dir / f"partial-{extractor.name}"
    print(f"{len(images):,} images in {config.images}, features by {extractor.name} into {target}")
    if target.exists():
        record = check_network(target, extractor, f"out_dir={out_dir}")
        if record["identity"] != images.identity:
            raise UserError(f"{target} is a reference of other images, {record['root']}; give another out_dir")
        shutil.rmtree(partial, ignore_errors=True)  # of one that died at the very end
        print(f"{target} is there already")
        return
    if dry_run:
        return
    extract(images, extractor, partial, config, is_done=target.exists)
    with Leases(partial / CLAIMS_FOLDER, config.lease_s) as leases:
        if finish_together(leases, target.exists, lambda: publish_reference(config, images, partial, target)):
            print(f"wrote {target}")
