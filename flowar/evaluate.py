"""`flowar evaluate` and `make-reference`: FID and related metrics under a named protocol, by any number of processes.

All processes compute features; then one of them computes the metrics. Read next: evaluation/metrics.py, references.py.
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
from flowar.base.run_folder import CHECKPOINTS, PASSPORT_FILE, checkpoint_step, list_checkpoints, read_progress
from flowar.base.terminal import plain_console
from flowar.config.data import ExtractorConfig
from flowar.config.load import decisive_settings
from flowar.config.measuring import EvaluateConfig, ReferenceConfig
from flowar.evaluation.ceiling import open_ceiling
from flowar.evaluation.classes import class_metric, class_names_of, judge_classes, to_judge_classes
from flowar.evaluation.extractors import OWN, Extractor
from flowar.evaluation.image_sets import open_images
from flowar.evaluation.judge import AboutJudge, read_about_judge
from flowar.evaluation.judging import JUDGE_FILE, choose_judge_file, prepare_judge
from flowar.evaluation.page import BY_CLASS_FILE, EVALUATION_FILE, show_value, write_evaluation_page
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
    Reference,
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
from flowar.latents.schema import Passport, read_passport
from flowar.models.folders import find_model_folder, load_model
from flowar.sampling.folder import SAMPLES_FILE, read_samples
from flowar.sampling.images import ImageSink
from flowar.sampling.worker import draw_samples
from flowar.training.report import record_evaluation


def main(config: EvaluateConfig, dry_run: bool = False) -> None:
    """Measure samples, print a table, write metrics.json and report.html; shared by all processes with this command."""
    device = pick_device(config.device)
    samples, out_dir = Path(config.samples), choose_out_dir(config)
    notes: list[str] = []
    # What can be known before anything is computed.
    passport = find_passport(config)
    config = dataclasses.replace(config, reference=config.reference or choose_reference(passport))
    judge = prepare_own_judge(config, passport, out_dir, device, dry_run)
    if dry_run and judge is not config.extractor and not Path(str(judge.weights)).is_file():
        print(f"would write {out_dir / EVALUATION_FILE}")
        return
    config = dataclasses.replace(config, extractor=judge)
    extractor = Extractor(config.extractor, device)
    more = load_more(config, device, notes)
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
    about = read_about_judge(Path(str(judge.weights))) if judge.name == OWN else None
    matched = match_names(config, about, notes)
    found = prepare_features(samples, "samples", extractor, out_dir, config)
    reference = prepare_reference(config, extractor, out_dir)
    rebuilt = prepare_ceiling(config, extractor, reference, found.num_images, out_dir, device, notes)
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

    # Metrics, by one process.
    stores = [str(store) for store in (found, reference, against, sorted(others.items()))]
    stores += [str(source.fingerprint()) for source in (reference, *(source for _, source in others.values()))]
    kept = [found, reference.store, against, rebuilt]
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
        judged = {} if about is None else describe_judged(about, own, matched, real, notes)
        if judged.get("classes") and about is not None:
            metrics.append(class_metric(judged["classes"], about))
        if against is not None:
            metrics.append(measure_difference(own, against.read(["features"]), real, config, device))
        by_class = measure_classes(own, real)
        write_text(out_dir / BY_CLASS_FILE, json.dumps(by_class, indent=2) + "\n")
        if rebuilt is not None:
            judged["ceiling"] = describe_ceiling(rebuilt, real, about, config, device, notes)
        record = describe_evaluation(config, own, metrics, notes) | judged | {"identity": identity}
        json.dumps(record, allow_nan=False)  # raises on nan, which other programs can't read
        write_evaluation_page(out_dir, record, by_class, own, real, found.images)
        if run is not None and is_of_run:
            values = {metric.name: metric.value for metric in metrics if math.isfinite(metric.value)}
            of = {"num_samples": len(own), "protocol": config.protocol, "samples": str(samples.absolute())}
            intervals = {metric.name: metric.interval for metric in metrics if metric.interval is not None}
            sampling = read_sampling(config) or {}
            about_them = {
                "reference": config.reference,
                "intervals": intervals,
                "weights": sampling.get("weights", "ema"),
            }
            record_evaluation(run[0], {"step": run[1], **of, **about_them, **values})
        write_record(out_dir / EVALUATION_FILE, record)  # last: it marks the evaluation as done

    was_done = is_done()
    with Leases(out_dir / CLAIMS_FOLDER, config.lease_s) as leases:
        if finish_together(leases, is_done, finish) or was_done:
            record = read_evaluation(out_dir)
            if record.get("identity") != identity:
                raise UserError(
                    f"{out_dir / EVALUATION_FILE} holds other numbers: another `flowar evaluate` with other settings "
                    "or images is writing there at the same time; give each its own out_dir, then run this again"
                )
            plain_console().print(evaluation_table(record))
            print(f"{out_dir / EVALUATION_FILE} and report.html {'already existed' if was_done else 'are written'}")


def find_passport(config: EvaluateConfig) -> Passport | None:
    """Return the passport of the dataset that the samples' model was trained on, or None if it can't be found."""
    places = [Path(config.run_dir)] if config.run_dir is not None else []
    places.append(Path(str((read_sampling(config) or {}).get("model", ""))))
    places.append(places[-1].parent.parent)  # the run, if its checkpoint was deleted
    if config.sample is not None:
        places.append(find_model_folder(config.sample.model))
    found = next((place for place in places if place != Path() and (place / PASSPORT_FILE).is_file()), None)
    return read_passport(found) if found is not None else None


def choose_reference(passport: Passport | None) -> str:
    """Return the images that the samples' model was trained on, which are the default reference; print the choice.

    Raises:
        UserError: if these images are unknown, or not on this machine.
    """
    if passport is None:
        raise UserError("reference is required: the samples' record names no dataset; give it as reference=...")
    if not Path(passport.images).exists():
        raise UserError(
            f"reference is required: the training images, {passport.images}, are not on this machine; give it as "
            "reference=..."
        )
    print(f"reference={passport.images}, the images that the model was trained on")
    return passport.images


def prepare_own_judge(
    config: EvaluateConfig, passport: Passport | None, out_dir: Path, device: torch.device, dry_run: bool
) -> ExtractorConfig:
    """Return the extractor's settings, with the judge's file; a judge that doesn't exist yet is trained first."""
    reference = Path(config.reference)
    file = choose_judge_file(config.extractor, reference, out_dir)
    return prepare_judge(
        config.extractor, file, reference, passport, device, config.lease_s, dry_run=dry_run
    )  # fmt: skip


def match_names(config: EvaluateConfig, about: AboutJudge | None, notes: list[str]) -> dict[int, int] | None:
    """Return {label of the samples: class of the judge}; None, with a note, if the judge knows none of their classes.

    Raises:
        UserError: if the samples have a class that the judge does not know.
    """
    if about is None:
        return None
    samples = Path(config.samples)
    names = class_names_of(samples)
    is_drawn = (samples / SAMPLES_FILE).is_file()
    matched = to_judge_classes(names, about, f"samples={samples}", strict=is_drawn)
    if matched is None:
        notes.append("no class accuracy: the samples have no classes that the judge knows")
    return matched


def prepare_ceiling(
    config: EvaluateConfig,
    extractor: Extractor,
    reference: ReferenceSource,
    count: int,
    out_dir: Path,
    device: torch.device,
    notes: list[str],
) -> FeatureStore | None:
    """Return the features of real images through the samples' VAE, or None, with a note, if they can't be computed.

    Raises:
        UserError: if ceiling=true asks for them and they can't be computed.
    """
    if not (config.ceiling if config.ceiling is not None else config.extractor.name == OWN):
        return None
    given = config.sample.vae if config.sample is not None else None
    real = reference.store.images if reference.store is not None else None
    try:
        images = open_ceiling(read_sampling(config), given, real, count, device)
    except (UserError, OSError) as error:
        if config.ceiling:
            raise UserError(f"ceiling=true: {error}") from error
        notes.append(f"no ceiling (real images through the VAE): {error}")
        return None
    folder = out_dir / "features" / f"{extractor.name}-{extractor.weights_sha256[:8]}-{images.identity}"
    extract(images, extractor, folder, config)
    return FeatureStore(folder, len(images), images.root)


def describe_judged(
    about: AboutJudge,
    own: Features,
    matched: dict[int, int] | None,
    real: Reference,
    notes: list[str],
) -> dict[str, Any]:
    """Return the record of the judge for metrics.json, and its verdict on samples and real images."""
    described: dict[str, Any] = {"judge": dataclasses.asdict(about), "classes": judge_classes(own, matched, about)}
    if real.features is not None:
        known = judge_reference(real.features, real.images, about)
        if known is not None:
            described["judge"]["accuracy_on_reference"] = known["class_accuracy"]
        if real.features.record["identity"] == about.identity:
            notes.append("the judge was trained on the reference itself, except for a tenth that was held out")
    notes.append("distances by a judge can only be compared with those by the same judge, not with published ones")
    return described


def judge_reference(real: Features, images: Path | None, about: AboutJudge) -> dict[str, Any] | None:
    """Return the judge's verdict on the reference's images; None if it knows none of their classes."""
    try:
        matched = to_judge_classes(class_names_of(images), about, "the reference", strict=False) if images else None
        return judge_classes(real, matched, about)
    except UserError:  # the judge doesn't know some of the reference's classes
        return None


def describe_ceiling(
    rebuilt: FeatureStore,
    real: Reference,
    about: AboutJudge | None,
    config: EvaluateConfig,
    device: torch.device,
    notes: list[str],
) -> dict[str, Any] | None:
    """Return the same metrics for real images through the VAE; None, with a note, if there are too few images."""
    features = rebuilt.read()
    try:
        metrics = measure_metrics(features, real, dataclasses.replace(config, interval_groups=0), device, [])
    except UserError as error:
        notes.append(f"no ceiling (real images through the VAE): {error}")
        return None
    judged = judge_reference(features, rebuilt.images, about) if about is not None else None
    if judged is not None and about is not None:
        metrics.append(class_metric(judged, about))
    return {"num_images": len(features), "metrics": {metric.name: metric.as_record() for metric in metrics}}


def read_evaluation(out_dir: Path) -> dict[str, Any]:
    """Return the content of metrics.json.

    Raises:
        DamagedRecordError: if the file is not what was written.
    """
    return read_record(out_dir / EVALUATION_FILE, "delete it and run the same `flowar evaluate` again")


def choose_out_dir(config: EvaluateConfig) -> Path:
    """Return the folder of this evaluation: inside the output of `flowar sample`, otherwise beside the samples."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    samples = Path(config.samples)
    is_drawn = config.sample is not None or (samples / SAMPLES_FILE).exists()
    return samples / "evaluation" if is_drawn else samples.with_name(f"{samples.name}.evaluation")


def describe_evaluation(
    config: EvaluateConfig, found: Features, metrics: list[Metric], notes: list[str]
) -> dict[str, Any]:
    """Return the content of metrics.json to be written."""
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
    ceiling = (record.get("ceiling") or {}).get("metrics", {})
    table = Table(
        "metric", "value", "95% interval", *(["real through the VAE"] if ceiling else []), "",
        title=f"{what}, against {record['reference']}",
        caption="\n".join(record["notes"]),
    )  # fmt: skip
    for name, metric in record["metrics"].items():
        interval = f"{metric['low']:.4g} to {metric['high']:.4g}" if "low" in metric else ""
        value = "not a number" if metric["value"] is None else f"{metric['value']:.4f}"
        real = [show_value(ceiling.get(name))] if ceiling else []
        table.add_row(name.replace("_", " "), value, interval, *real, metric.get("note", ""))
    return table


def read_sampling(config: EvaluateConfig) -> dict[str, Any] | None:
    """Return the samples' record, or None if `flowar sample` didn't draw them."""
    samples = Path(config.samples)
    return read_samples(samples) if (samples / SAMPLES_FILE).is_file() else None


def find_run(config: EvaluateConfig) -> tuple[Path, int] | None:
    """Return the training run that the samples come from, and the step of their checkpoint, or None if unknown.

    Raises:
        UserError: if run_dir names a run that does not exist.
    """
    sampling = read_sampling(config) or {}
    step = config.step if config.step is not None else sampling.get("step")
    run_dir = Path(config.run_dir) if config.run_dir else Path(str(sampling.get("model", ""))).parent.parent
    if isinstance(step, int) and (run_dir / CHECKPOINTS).is_dir():
        return run_dir, step
    if config.run_dir is not None:
        raise UserError(f"run_dir={run_dir} must be a training run, and step={config.step} one of its steps; give both")
    return None


def check_run(config: EvaluateConfig, run_dir: Path, step: int, notes: list[str]) -> bool:
    """Return whether to add the numbers to a run: yes if the samples were drawn with weights of its checkpoint.

    If that can't be checked, because the checkpoint was deleted or `flowar sample` didn't draw the samples, the numbers
    are added only if the run was named as run_dir; else a note says so. They are never added to a run whose checkpoint
    is damaged.

    Raises:
        UserError: if the checkpoint of the run named as run_dir has other weights, or is damaged.
    """
    sampling = read_sampling(config)
    checkpoint = next((own for own in list_checkpoints(run_dir) if checkpoint_step(own) == step), None)
    if sampling is None or checkpoint is None:
        why = "the samples have no record" if sampling is None else f"it no longer has a checkpoint of step {step}"
        if config.run_dir is None:
            notes.append(f"not added to {run_dir}: {why}; to add it, give run_dir={run_dir} step={step}")
        return config.run_dir is not None
    wanted = sampling.get("weights_sha256")
    try:
        names = [*read_progress(checkpoint).averages, "raw"]
        names.sort(key=lambda name: name != sampling.get("weights"))  # the most likely first
        if any(hash_weights(load_model(checkpoint, name).state_dict()) == wanted for name in names):
            return True
    except (UserError, FileNotFoundError) as error:  # damaged, or just deleted by the run
        why = str(error) if checkpoint.exists() else f"the run has just deleted its checkpoint of step {step}"
        if config.run_dir is not None:
            raise UserError(
                f"run_dir={run_dir}: {why}; leave out run_dir and step to measure without adding to the run"
            ) from error
        notes.append(f"not added to {run_dir}: {why}")
        return False
    problem = f"samples={config.samples} were drawn with weights {str(wanted)[:12]}, which {checkpoint} does not have"
    if config.run_dir is not None:
        raise UserError(f"{problem}; give the run_dir and step that drew the samples, or leave both out")
    notes.append(f"not added to {run_dir}: {problem}")
    return False


def make_reference(config: ReferenceConfig, dry_run: bool = False) -> None:
    """Make a reference, together with all other processes that run the same command."""
    out_dir, device = Path(config.out_dir), pick_device(config.device)
    images = open_images(config.images, "images")
    if config.extractor.name == OWN:
        file = Path(config.extractor.weights or out_dir / JUDGE_FILE)
        own = prepare_judge(
            config.extractor, file, Path(config.images), None, device, config.lease_s, dry_run=dry_run
        )  # fmt: skip
        if dry_run and not file.is_file():
            return
        config = dataclasses.replace(config, extractor=own)
    extractor = Extractor(config.extractor, device)
    target, partial = out_dir / f"features-{extractor.name}", out_dir / f"partial-{extractor.name}"
    print(f"{len(images):,} images in {config.images}, features by {extractor.name} into {target}")
    if target.exists():
        record = check_network(target, extractor, f"out_dir={out_dir}")
        if record["identity"] != images.identity:
            raise UserError(f"{target} is a reference of other images, {record['root']}; give another out_dir")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died at the very end
        print(f"{target} already exists")
        return
    if dry_run:
        return
    extract(images, extractor, partial, config, is_done=target.exists)
    with Leases(partial / CLAIMS_FOLDER, config.lease_s) as leases:
        if finish_together(leases, target.exists, lambda: publish_reference(config, images, partial, target)):
            print(f"wrote {target}")
