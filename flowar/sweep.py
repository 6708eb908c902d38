"""`flowar sweep`: find the guidance, interval, steps and average with the best FID, and what they cost.

Successive halving: all settings are measured on few images, the best of them on more. All settings draw the same images
from the same noise, so their differences are more certain than the FIDs themselves. Any number of processes can share.
Read next: sample.py, references.py.
"""

import dataclasses
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import xxhash
from rich.table import Table

from flowar.base.devices import pick_device
from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.base.leases import CLAIMS_FOLDER, WAIT_S, Leases, finish_together
from flowar.base.pages import REPORT_FILE
from flowar.base.pictures import save_scatter
from flowar.base.records import DamagedRecordError, create_record, read_record, write_record
from flowar.base.run_folder import AVERAGES, CHECKPOINTS, checkpoint_step, is_checkpoint, list_checkpoints
from flowar.base.terminal import plain_console
from flowar.config.drawing import SampleConfig
from flowar.config.load import decisive_settings, describe_changes, extend
from flowar.config.measuring import SweepConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.metrics import Frechet, groups
from flowar.evaluation.protocols import frechet_metric
from flowar.evaluation.references import Reference, check_reference, prepare_reference
from flowar.evaluation.store import FeatureSink, read_features
from flowar.evaluation.sweep_page import write_sweep_page
from flowar.models.build import family_of
from flowar.models.folders import export_model, find_model_folder
from flowar.sampling.folder import identify, read_samples
from flowar.sampling.job import SamplingJob, choose_vae, open_job, read_class_names, resolve_classes
from flowar.sampling.worker import draw_missing
from flowar.training.averages import save_average

SETTINGS, MODELS = "settings", "models"
REFERENCE_FILE = "reference.json"
CHECKPOINT_FILE = "checkpoint.json"  # which step of a run the weights come from
RESULTS_FILE, RECIPE_FILE, PICTURE_FILE = "sweep.json", "recipe.yaml", "pareto.png"
DELETE = "delete it and run the same command again"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to sample, and the folder for the features of its images."""

    name: str
    sample: SampleConfig

    @property
    def folder(self) -> Path:
        return Path(self.sample.out_dir)

    def score_file(self, num_images: int) -> Path:
        """Return the file for its FID on `num_images` images."""
        return self.folder / f"score_{num_images}.json"

    def score(self, num_images: int) -> dict[str, Any]:
        """Return the record of its FID on `num_images` images.

        Raises:
            DamagedRecordError: if the record is not what was written, or is for other images.
        """
        file = self.score_file(num_images)
        record = read_record(file, DELETE)
        if not isinstance(record.get("fid"), float) or record.get("num_images") != num_images:
            found = f"fid is {record.get('fid')!r}, num_images {record.get('num_images')!r}"
            raise DamagedRecordError(f"{file} is damaged ({found}); {DELETE}")
        own = self.describe()
        other = [key for key in own if record.get(key, own[key]) != own[key]]  # version 0.1 didn't write these keys
        if other:
            raise DamagedRecordError(f"{file} is for other images: {other[0]} is {record[other[0]]}; {DELETE}")
        return record

    def describe(self) -> dict[str, str]:
        """Return the keys that identify its score."""
        return {"setting": self.name, "samples": identify(read_samples(self.folder))}


def main(config: SweepConfig, dry_run: bool = False) -> None:
    """Sweep, sharing the work with all processes that run this command; print and write results, page, recipe."""
    device = pick_device(config.device)
    out_dir = Path(config.out_dir)
    model = find_model_folder(config.model)
    vae, classes = choose_vae(config.sample.vae, model), resolve_classes(config.sample.classes, read_class_names(model))
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, vae=vae, classes=classes))
    settings = list_settings(config)
    rounds = plan_rounds(len(settings), config)
    plan = ", then ".join(f"{count} of {images:,} images" for count, images in rounds)
    print(f"{len(settings)} settings: {plan}")
    extractor = Extractor(config.extractor, device)
    check_reference(Path(config.reference), extractor)
    if dry_run:
        for setting in settings:
            print(f"  {setting.name}")
        return
    check_same_sweep(out_dir, config, settings)
    reference = prepare_reference(config, extractor, out_dir).read()
    check_same_reference(out_dir, reference)
    distance = Frechet(reference.statistics["features"], device)
    with Leases(out_dir / CLAIMS_FOLDER, config.lease_s) as leases:
        keep_models(config, leases)
        left = settings
        for count, num_images in rounds:
            left = left[:count]
            measure_settings(left, num_images, extractor, distance, leases, config.interval_groups)
            left = sorted(left, key=lambda setting: setting.score(num_images)["fid"])
            print(f"{num_images:,} images: best {left[0].name}, FID {left[0].score(num_images)['fid']:.3f}")
        finish_together(
            leases, (out_dir / RESULTS_FILE).exists, lambda: write_results(config, settings, left[0], rounds)
        )
    plain_console().print(sweep_table(read_record(out_dir / RESULTS_FILE, DELETE)["settings"], config.model))
    print(f"best: {left[0].name}; see {out_dir / RECIPE_FILE}, {RESULTS_FILE} and {REPORT_FILE}")


def list_settings(config: SweepConfig) -> list[Setting]:
    """Return all combinations; those that are equal because guidance is 1 appear once."""
    found = {}
    axes = (list_models(config), config.guidance, config.interval_ends, config.num_steps, config.last_step_shares)
    for average, guidance, end, steps, share in itertools.product(*axes):
        end = config.sample.guidance_interval[1] if guidance == 1 else end
        last = max(2, round(steps * share))
        name = f"{average}_guidance{guidance:g}_to{end:g}_steps{steps}" + (f"to{last}" if last != steps else "")
        sample = extend(
            SampleConfig,
            config.sample,
            model=str(Path(config.out_dir) / MODELS / average),
            guidance=guidance,
            guidance_interval=(config.sample.guidance_interval[0], end),
            num_steps=steps,
            last_scale_steps=None if last == steps else last,
            out_dir=str(Path(config.out_dir) / SETTINGS / name),
            features_only=True,
            extractor=config.extractor,
            lease_s=config.lease_s,
            device=config.device,
        )
        found[name] = Setting(name, sample)
    return list(found.values())


def plan_rounds(count: int, config: SweepConfig) -> list[tuple[int, int]]:
    """Return (number of settings, number of images) for each round."""
    rounds = []
    for images in config.num_images:
        rounds.append((count, images))
        count = max(1, round(count * config.keep))
    return rounds


def check_same_sweep(out_dir: Path, config: SweepConfig, settings: list[Setting]) -> None:
    """Record the settings of the sweep: the first process writes them, the others compare theirs.

    Raises:
        UserError: if the folder holds another sweep.
    """
    file = out_dir / "config.json"
    now = json.loads(json.dumps(decisive_settings(config)))
    for setting in settings:
        now |= setting.sample.annealing
    there = next((path for path in (out_dir / SETTINGS, out_dir / RESULTS_FILE) if path.exists()), None)
    if there is not None and not file.exists():
        raise UserError(
            f"{there} belongs to a sweep, but {file}, which says which one, is missing; restore it from a copy, or "
            "give another out_dir"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    if not file.exists() and create_record(file, now):
        return
    before = read_record(file, "restore it from a copy, or give another out_dir")
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"out_dir={out_dir} holds another sweep: {changed[0]} was {before.get(changed[0])}, now "
            f"{now[changed[0]]}; give another out_dir"
        )


def check_same_reference(out_dir: Path, reference: Reference) -> None:
    """Record the statistics of the reference, for processes that join later.

    Raises:
        UserError: if the statistics have changed since.
    """
    mu, sigma = reference.statistics["features"]
    now = {"path": str(reference.path), "statistics_xxh64": xxhash.xxh64(mu.tobytes() + sigma.tobytes()).hexdigest()}
    file = out_dir / REFERENCE_FILE
    if file.exists() or not create_record(file, now):
        before = read_record(file, "remove it if the reference is the same as before, or give another out_dir")
        if before.get("statistics_xxh64") != now["statistics_xxh64"]:
            raise UserError(
                f"reference={reference.path} has other statistics than at the start of this sweep ({file}), so the "
                "FIDs can't be compared; put the reference back, or give another out_dir"
            )


def list_models(config: SweepConfig) -> list[str]:
    """Return the names of the weights that are compared."""
    return [*config.weights, *(f"std_{std:g}" for std in config.ema_stds)]


def choose_checkpoint(config: SweepConfig) -> tuple[str | Path, int | None]:
    """Choose the step of a run that all weights come from, as the run may still train; the first process chooses.

    Returns:
        The checkpoint, or a model that isn't a run; and the step at which averages of ema_stds end, None: the last one.

    Raises:
        UserError: if there is no checkpoint, or the chosen one was deleted.
    """
    run, out_dir = Path(config.model), Path(config.out_dir)
    if not (run / CHECKPOINTS).is_dir():
        return config.model, None
    file, cure = out_dir / CHECKPOINT_FILE, "restore it from a copy, or give another out_dir"
    there = [name for name in list_models(config) if (out_dir / MODELS / name).exists()]  # before looking for the note
    if there and not file.exists():
        raise UserError(f"{out_dir / MODELS} holds {there[0]}, but {file}, which says its step, is missing; {cure}")
    if not file.exists():
        create_record(file, newest_step(config))
    record = read_record(file, cure)
    name, step = record.get("checkpoint"), record.get("averages_step")
    if not isinstance(name, str | None) or not isinstance(step, int | None):
        raise DamagedRecordError(f"{file} is damaged (checkpoint is {name!r}, averages_step {step!r}); {cure}")
    if name is None:
        return config.model, step
    checkpoint = run / CHECKPOINTS / name
    lacking = [weights for weights in config.weights if not (out_dir / MODELS / weights).exists()]
    if lacking and not is_checkpoint(checkpoint):
        raise UserError(
            f"{checkpoint} was deleted, but {file} says that all weights come from it, and {lacking[0]} was not copied "
            "yet; give another out_dir"
        )
    return checkpoint, step


def newest_step(config: SweepConfig) -> dict[str, Any]:
    """Return the newest checkpoint of a run; with ema_stds, the newest one whose step also has kept averages.

    Raises:
        UserError: if there is no such checkpoint.
    """
    run = Path(config.model)
    if not config.ema_stds:
        return {"checkpoint": find_model_folder(run).name, "averages_step": None}
    kept = {checkpoint_step(folder) for folder in list_checkpoints(run, AVERAGES)}
    if not config.weights or not kept:
        return {"checkpoint": None, "averages_step": max(kept, default=None)}
    by_step = {checkpoint_step(folder): folder.name for folder in list_checkpoints(run)}
    common = kept & by_step.keys()
    if not common:
        raise UserError(
            f"model={run} has checkpoints of steps {sorted(by_step)}, but kept averages only of others, up to "
            f"{max(kept)}; weights of different steps can't be compared, so set weights=[] or ema_stds=[]"
        )
    return {"checkpoint": by_step[max(common)], "averages_step": max(common)}


def keep_models(config: SweepConfig, leases: Leases) -> None:
    """Copy the weights that are compared into the sweep's folder, each by one process, as the run may still train."""
    stds = {f"std_{std:g}": std for std in config.ema_stds}
    targets = {name: Path(config.out_dir) / MODELS / name for name in list_models(config)}
    if all(target.exists() for target in targets.values()):
        return
    source, step = choose_checkpoint(config)
    for name, target in targets.items():
        target.parent.mkdir(exist_ok=True)
        while not target.exists():
            if not leases.claim(name):
                time.sleep(WAIT_S)
                continue
            if not target.exists() and name in stds:
                save_average(Path(config.model), stds[name], step, target)
            elif not target.exists():
                export_model(source, name, target)
            leases.release(name)


def measure_settings(
    settings: list[Setting], num_images: int, extractor: Extractor, distance: Frechet, leases: Leases, num_groups: int
) -> None:
    """Draw and score all settings; returns when all scores exist, whichever process computed them.

    Args:
        settings: those compared in this round.
        num_images: of each setting.
        extractor: of the features.
        distance: to the reference.
        leases: claims on the scores.
        num_groups: groups of images, for intervals; 0: no intervals.
    """
    job: SamplingJob | None = None  # of one model at a time
    while missing := [setting for setting in settings if not setting.score_file(num_images).exists()]:
        random.shuffle(missing)  # so that processes spread over the settings
        if job is not None:
            loaded = job.config.model
            missing.sort(key=lambda setting: setting.sample.model != loaded)
        has_worked = False
        for setting in missing:
            if job is None or job.config.model != setting.sample.model:
                job = open_job(setting.sample)
            job = dataclasses.replace(job, config=dataclasses.replace(setting.sample, num_images=num_images))
            sink = FeatureSink(job, extractor)
            if sink.missing_chunks():
                has_worked |= draw_missing(job, sink, wait=False)
            elif leases.claim(f"score_{setting.name}_{num_images}"):
                if not setting.score_file(num_images).exists():
                    score(setting, job, sink.folder, distance, num_groups)
                has_worked = True
        if not has_worked:
            time.sleep(WAIT_S)


def score(setting: Setting, job: SamplingJob, features_folder: Path, distance: Frechet, num_groups: int) -> None:
    """Write a setting's FID, its 95% interval, and what one image costs."""
    num_images = job.config.num_images
    features = read_features(features_folder, num_images, ["features"])
    group = groups(features.labels, num_groups) if num_groups else None
    fid = frechet_metric("fid", features.layers["features"].to(distance.mu.device), distance, group)
    flops = family_of(job.model.config).sampling_flops(job.model.config, setting.sample)
    record = {"fid": fid.value, "interval": fid.interval, "gflops": flops / 1e9, "num_images": num_images}
    write_record(setting.score_file(num_images), record | setting.describe())


def write_results(config: SweepConfig, settings: list[Setting], winner: Setting, rounds: list[tuple[int, int]]) -> None:
    """Write pareto.png, the winner as a recipe for `flowar sample`, report.html, and last sweep.json: all done."""
    out_dir = Path(config.out_dir)
    rows: list[dict[str, Any]] = []
    for setting in settings:
        last = max(images for _, images in rounds if setting.score_file(images).exists())
        rows.append({"name": setting.name, **setting.score(last)})
    most = rounds[-1][1]
    rows.sort(key=lambda row: (-row["num_images"], row["fid"]))
    for row in rows:  # FIDs can only be compared on the same number of images
        peers = [other for other in rows if other["num_images"] == row["num_images"]]
        row["pareto"] = not any(
            other["fid"] <= row["fid"] and other["gflops"] <= row["gflops"] and other != row for other in peers
        )
    save_scatter(
        [(row["gflops"], row["fid"], row["name"], f"{row['num_images']:,} images") for row in rows],
        out_dir / PICTURE_FILE,
        axes=("GFLOPs for one image's latents", "FID"),
        marked={row["name"] for row in rows if row["pareto"]},
    )
    best = winner.score(most)
    weights = winner.sample.vae.weights if winner.sample.vae is not None else None
    given = f" vae.weights={weights}" if weights else ""
    header = (
        f"# The best of {len(settings)} settings of `flowar sweep`: FID {best['fid']:.3f} on {most:,} images against\n"
        f"# {config.reference}\n"
        f"# flowar sample {out_dir / RECIPE_FILE} model={winner.sample.model} out_dir=OUT_DIR{given}\n"
    )
    plain = SampleConfig(model=winner.sample.model, out_dir=winner.sample.out_dir)
    write_text(out_dir / RECIPE_FILE, header + describe_changes(plain, winner.sample))
    write_sweep_page(
        out_dir,
        model=config.model,
        reference=config.reference,
        rows=rows,
        picture=out_dir / PICTURE_FILE,
        recipe=out_dir / RECIPE_FILE,
    )
    write_record(out_dir / RESULTS_FILE, {"winner": winner.name, "settings": rows})


def sweep_table(rows: list[dict[str, Any]], model: str) -> Table:
    """Return the table of a sweep."""
    table = Table("setting", "images", "FID", "95% interval", "GFLOPs per image", "Pareto", title=f"sweep of {model}")
    for row in rows:
        ends = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        cells = (f"{row['num_images']:,}", f"{row['fid']:.3f}", ends, f"{row['gflops']:,.1f}", "*" * row["pareto"])
        table.add_row(row["name"], *cells)
    return table
