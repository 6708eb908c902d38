"""`flowar sweep`: which guidance, interval, steps and average give the best FID, and at what cost.

Successive halving: all settings are measured on few images, the best of them on more. All draw the same images from the
same noise, so that their differences are surer than their distances. Any number of processes share the work.
Read next: sample.py, references.py.
"""

import dataclasses
import itertools
import json
import random
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowar.config import AverageConfig, ExportConfig, SampleConfig, SweepConfig, describe_changes
from flowar.distributed import pick_device
from flowar.errors import UserError
from flowar.evaluate import frechet_metric
from flowar.export import main as export
from flowar.features import Extractor, read_features
from flowar.files import write_text
from flowar.generate import make_time_grids
from flowar.info import count_sampling_flops
from flowar.leases import WAIT_S, Leases, finish_together
from flowar.metrics import Frechet, groups
from flowar.pictures import save_scatter
from flowar.posthoc_ema import main as make_average
from flowar.references import check_reference, prepare_reference
from flowar.sample import Job, describe_samples, draw, open_job

SETTINGS, CLAIMS, MODELS = "settings", "claims", "models"
RESULTS_FILE, RECIPE_FILE, PICTURE_FILE = "sweep.json", "recipe.yaml", "pareto.png"
CARRIED_OUT = ("model", "out_dir", "num_images", "features_only", "extractor", "device", "lease_s")  # not in a recipe


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to sample, and where its images' features go."""

    name: str
    sample: SampleConfig

    @property
    def folder(self) -> Path:
        return Path(self.sample.out_dir)

    def score_file(self, num_images: int) -> Path:
        """Return where its FID on so many images is written."""
        return self.folder / f"score_{num_images}.json"

    def score(self, num_images: int) -> dict[str, float]:
        """Return its FID on so many images."""
        return json.loads(self.score_file(num_images).read_text())


def main(config: SweepConfig, dry_run: bool = False) -> None:
    """Sweep, with whoever else was given the same command; print the table, write sweep.json, a picture, a recipe."""
    device = pick_device(config.device)
    out_dir = Path(config.out_dir)
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
    check_same_sweep(out_dir, config)
    reference = prepare_reference(config, extractor, out_dir).read()
    distance = Frechet(reference.statistics["features"], device)
    with Leases(out_dir / CLAIMS, config.lease_s) as leases:
        keep_models(config, leases)
        left = settings
        for count, num_images in rounds:
            left = left[:count]
            measure(left, num_images, distance, leases, config)
            left = sorted(left, key=lambda setting: setting.score(num_images)["fid"])
            print(f"{num_images:,} images: best {left[0].name}, FID {left[0].score(num_images)['fid']:.3f}")
        finish_together(leases, (out_dir / RESULTS_FILE).exists, lambda: finish(config, settings, left[0], rounds))
    Console().print(table_of(json.loads((out_dir / RESULTS_FILE).read_text())["settings"], config.model))
    print(f"best: {left[0].name}; see {out_dir / RECIPE_FILE}, {RESULTS_FILE} and {PICTURE_FILE}")


def list_settings(config: SweepConfig) -> list[Setting]:
    """Return all combinations; those that guidance 1 makes equal are there once."""
    found = {}
    axes = (list_models(config), config.guidance, config.interval_ends, config.num_steps, config.last_step_shares)
    for average, guidance, end, steps, share in itertools.product(*axes):
        end = config.sample.guidance_interval[1] if guidance == 1 else end
        last = max(2, round(steps * share))
        name = f"{average}_guidance{guidance:g}_to{end:g}_steps{steps}" + (f"to{last}" if last != steps else "")
        sample = dataclasses.replace(
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
    """Return how many settings are measured on how many images, round by round."""
    rounds = []
    for images in config.num_images:
        rounds.append((count, images))
        count = max(1, round(count * config.keep))
    return rounds


def check_same_sweep(out_dir: Path, config: SweepConfig) -> None:
    """Note the settings of the sweep.

    Raises:
        UserError: if the folder holds another one.
    """
    file = out_dir / "config.json"
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if file.exists():
        before = json.loads(file.read_text())
        free = ("device", "lease_s", "batch_size", "chunk_images")
        changed = [key for key in now if key not in free and before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"out_dir={out_dir} holds another sweep: {changed[0]} was {before.get(changed[0])}, now "
                f"{now[changed[0]]}; give another out_dir"
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")


def list_models(config: SweepConfig) -> list[str]:
    """Return the names of the weights that are compared."""
    return [*config.weights, *(f"std_{std:g}" for std in config.ema_stds)]


def keep_models(config: SweepConfig, leases: Leases) -> None:
    """Copy the weights that are compared into the sweep's folder, each by one process: a run that trains goes on."""
    stds = {f"std_{std:g}": std for std in config.ema_stds}
    for name in list_models(config):
        target = Path(config.out_dir) / MODELS / name
        target.parent.mkdir(exist_ok=True)
        while not target.exists():
            if not leases.claim(name):
                time.sleep(WAIT_S)
                continue
            if not target.exists() and name in stds:
                make_average(AverageConfig(run_dir=config.model, out_dir=str(target), std=stds[name]))
            elif not target.exists():
                export(ExportConfig(model=config.model, out_dir=str(target), weights=name))
            leases.release(name)


def measure(settings: list[Setting], num_images: int, distance: Frechet, leases: Leases, config: SweepConfig) -> None:
    """Draw and score all settings on so many images; returns when all scores are there, whoever made them."""
    job: Job | None = None  # of one model at a time
    while missing := [setting for setting in settings if not setting.score_file(num_images).exists()]:
        random.shuffle(missing)  # so that processes don't all draw the same setting
        if job is not None:
            missing.sort(key=lambda setting: setting.sample.model != job.config.model)
        has_worked = False
        for setting in missing:
            if job is None or job.config.model != setting.sample.model:
                job = open_job(setting.sample)
            job = dataclasses.replace(job, config=dataclasses.replace(setting.sample, num_images=num_images))
            if job.missing():
                has_worked |= draw(job, describe_samples(job), wait=False)
            elif leases.claim(f"score_{setting.name}_{num_images}"):
                if not setting.score_file(num_images).exists():
                    score(setting, job, num_images, distance, config.interval_groups)
                has_worked = True
        if not has_worked:
            time.sleep(WAIT_S)


def score(setting: Setting, job: Job, num_images: int, distance: Frechet, interval_groups: int) -> None:
    """Write a setting's FID, its 95% interval, and what one image costs."""
    features = read_features(job.store, num_images, ["features"])
    group = groups(features.labels, interval_groups) if interval_groups else None
    fid = frechet_metric("fid", features.layers["features"].to(distance.mu.device), distance, group)
    sample, model = setting.sample, job.model.config
    flops = count_sampling_flops(
        model,
        time_grid=make_time_grids(sample, len(model.scales)),
        guidance=sample.guidance,
        guidance_interval=sample.guidance_interval,
        guidance_schedule=sample.guidance_schedule,
        solver=sample.solver,
    )
    record = {"fid": fid.value, "interval": fid.interval, "gflops": flops / 1e9, "num_images": num_images}
    write_text(setting.score_file(num_images), json.dumps(record) + "\n")


def finish(config: SweepConfig, settings: list[Setting], winner: Setting, rounds: list[tuple[int, int]]) -> None:
    """Write pareto.png, the winner as a recipe for `flowar sample`, and sweep.json, which says that all is done."""
    out_dir = Path(config.out_dir)
    rows = []
    for setting in settings:
        last = max(images for _, images in rounds if setting.score_file(images).exists())
        rows.append({"name": setting.name, **setting.score(last)})
    most = rounds[-1][1]
    rows.sort(key=lambda row: (-row["num_images"], row["fid"]))
    for row in rows:  # FIDs of as many images compare, others don't
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
    header = (
        f"# The best of {len(settings)} settings of `flowar sweep`: FID {best['fid']:.3f} on {most:,} images against\n"
        f"# {config.reference}\n# flowar sample {out_dir / RECIPE_FILE} model={winner.sample.model} out_dir=OUT_DIR\n"
    )
    plain = SampleConfig(model=winner.sample.model, out_dir=winner.sample.out_dir)
    write_text(out_dir / RECIPE_FILE, header + describe_changes(plain, winner.sample, without=CARRIED_OUT))
    write_text(out_dir / RESULTS_FILE, json.dumps({"winner": winner.name, "settings": rows}, indent=2) + "\n")


def table_of(rows: list[dict[str, object]], model: str) -> Table:
    """Return the table of a sweep."""
    table = Table("setting", "images", "FID", "95% interval", "GFLOPs an image", "Pareto", title=f"sweep of {model}")
    for row in rows:
        ends = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        cells = (f"{row['num_images']:,}", f"{row['fid']:.3f}", ends, f"{row['gflops']:,.1f}", "*" * row["pareto"])
        table.add_row(row["name"], *cells)
    return table


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("sweep")
