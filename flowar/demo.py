"""`flowar demo`: digits or clothes from images to a report, each part by the verb that does it at real scale.

Read next: evaluation/demo_images.py for the data, evaluation/judge.py for the classifier that judges.
"""

import dataclasses
import json
import shutil
import time
from html import escape
from pathlib import Path

import torch

from flowar.base.distributed import refuse_many_processes
from flowar.base.files import write_text
from flowar.base.pages import REPORT_FILE, embed, fold, html_table, write_page
from flowar.base.pictures import save_grid, save_loss_curve
from flowar.base.records import read_record
from flowar.base.run_folder import PASSPORT_FILE
from flowar.cli import run_verb
from flowar.config.data import DataConfig, ExtractorConfig, PrepareConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.jobs import DemoConfig
from flowar.config.load import describe_config, extend
from flowar.config.measuring import EvaluateConfig
from flowar.config.tokenizing import TrainVAEConfig
from flowar.config.training import RecipeConfig, TrainConfig
from flowar.evaluation.demo_images import (
    FASHION_NAMES,
    IMAGE_SIZE,
    NUM_CLASSES,
    RealImages,
    load_fashion,
    load_splits,
    write_image_folders,
)
from flowar.evaluation.extractors import OWN
from flowar.evaluation.judging import JUDGE_FILE
from flowar.evaluation.page import EVALUATION_FILE
from flowar.latents.vae import load_vae
from flowar.models.build import family_of
from flowar.models.folders import load_model
from flowar.sampling.folder import IMAGES_FOLDER
from flowar.sampling.gallery import draw_growth
from flowar.sampling.images import load_pngs
from flowar.training.report import read_metrics

DIGITS_PER_CLASS = 20  # images of each class in the contact sheet
REAL_IMAGES = {  # name in the demo's settings -> description
    "digits": "scikit-learn's 1,797 handwritten digits",
    "fashion": "Fashion-MNIST's 70,000 clothes",
}
FLIPS = {"digits": False, "fashion": False}  # mirrored digits are wrong, and all shoes point left
HEADINGS = {"digits": "handwritten digits", "fashion": "clothes"}
SHOWN = {"digits": "digit", "fashion": "garment"}
DEMO_METRICS = ("fid", "inception_score", "precision", "recall")


def main(config: DemoConfig, dry_run: bool = False) -> None:
    """Prepare, train, sample, evaluate and report; parts that are finished are skipped."""
    refuse_many_processes("demo")
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    data = DataConfig(path=str(run_dir / "data"), num_workers=0)
    training = extend(TrainConfig, config.train, run_dir=str(run_dir / "train"), data=data)
    if dry_run:
        print(f"would write to {run_dir}")
        return

    _say(1, f"real images: {REAL_IMAGES[config.data]}, as PNG folders")
    images = run_dir / "images"
    if not images.exists():
        hidden = run_dir / ".images"
        shutil.rmtree(hidden, ignore_errors=True)
        write_image_folders(hidden, load_real(config), FASHION_NAMES if config.data == "fashion" else None)
        hidden.replace(images)
    if config.data == "fashion" and training.vae.name == "demo":
        own = TrainVAEConfig(
            images=str(images / "train"),
            out_dir=str(run_dir / "vae"),
            image_size=IMAGE_SIZE,
            flip=FLIPS[config.data],
            steps=config.vae_steps,
            device=training.device,
        )
        _say(2, "train-vae: a VAE for these images")
        run_verb("train-vae", own)
        training = dataclasses.replace(training, vae=VAEConfig(name=own.out_dir))
    _say(2, "prepare: images -> VAE moments -> MDS shards")
    if not (run_dir / "data" / PASSPORT_FILE).exists():
        run_verb(
            "prepare",
            PrepareConfig(
                images=str(images / "train"),
                out_dir=str(run_dir / "data"),
                vae=training.vae,
                image_size=IMAGE_SIZE,
                flip=FLIPS[config.data],
                num_workers=0,
                device=training.device,
            ),
        )
    _say(3, f"train {training.model.variant} on the shards; you can kill it at any time, the same command resumes")
    run_verb("train", training)
    _say(4, f"sample {config.num_samples} images, classes in turn")
    sampling = extend(
        SampleConfig,
        config.draw,
        model=training.run_dir,
        out_dir=str(run_dir / "samples"),
        vae=training.vae,
        num_images=config.num_samples,
        batch_size=100,
        device=training.device,
    )
    run_verb("sample", sampling)
    _say(5, "evaluate samples, and training images for comparison, with a judge: a classifier of the real images")
    numbers = measure_demo(config)
    draw_pictures(run_dir, training, sampling, load_real(config)["held_out"])
    numbers["minutes"] = (time.perf_counter() - started) / 60
    write_text(run_dir / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    report = write_demo_page(run_dir, config, numbers)
    print(
        f"\nrecognised as the requested class: {numbers['class_accuracy']:.1%} of {config.num_samples} samples (the "
        f"judge gets {numbers['judge_accuracy']:.1%} of the held-out real images right)\n"
        f"Frechet distance to the held-out {config.data}: samples {numbers['fid_samples']:.2f}, training images "
        f"{numbers['fid_training']:.2f}, ratio {numbers['fid_samples'] / numbers['fid_training']:.2f}\n"
        f"{numbers['minutes']:.1f} minutes; open {report.resolve()}"
    )


def measure_demo(config: DemoConfig) -> dict[str, float]:
    """Return the demo's numbers: the share of samples that show the requested class, and distances to real images."""
    run_dir = Path(config.run_dir)
    judge = ExtractorConfig(
        name=OWN, weights=str(run_dir / JUDGE_FILE), images=str(run_dir / "images" / "train"), flip=FLIPS[config.data]
    )
    numbers: dict[str, float] = {}
    for name, images in (("samples", run_dir / "samples"), ("training", run_dir / "images" / "train")):
        out_dir = run_dir / f"evaluation_{name}"
        run_verb(
            "evaluate",
            EvaluateConfig(
                samples=str(images),
                reference=str(run_dir / "images" / "held_out"),
                out_dir=str(out_dir),
                protocol="torch-fidelity",
                extractor=judge,
                ceiling=name == "samples",
                device=config.train.device,
            ),
        )
        record = read_record(out_dir / EVALUATION_FILE, "delete it and run the same command again")
        numbers |= {f"{metric}_{name}": record["metrics"][metric]["value"] for metric in DEMO_METRICS}
        if name == "samples":
            numbers["judge_accuracy"] = record["judge"]["accuracy_on_reference"]
            numbers["class_accuracy"] = record["metrics"]["class_accuracy"]["value"]
            ceiling = record["ceiling"]["metrics"]
            numbers |= {f"{metric}_ceiling": ceiling[metric]["value"] for metric in (*DEMO_METRICS, "class_accuracy")}
    return numbers


def draw_pictures(run_dir: Path, training: TrainConfig, sampling: SampleConfig, held_out: RealImages) -> None:
    """Write contact_sheet.png (a row per class), real_images.png, loss_curve.png; growth.png if it draws in stages."""
    files = sorted((run_dir / "samples" / IMAGES_FOLDER).glob("*.png"))
    columns = min(DIGITS_PER_CLASS, len(files) // NUM_CLASSES)
    by_class = [file for label in range(NUM_CLASSES) for file in files[label::NUM_CLASSES][:columns]]
    save_grid(load_pngs(by_class), run_dir / "contact_sheet.png", columns=columns, enlarge=2)

    images, labels = held_out
    real = [image for label in range(NUM_CLASSES) for image in images[labels == label][:columns]]
    save_grid(
        torch.stack([torch.from_numpy(i) for i in real]).permute(0, 3, 1, 2),
        run_dir / "real_images.png",
        columns=columns,
        enlarge=2,
    )

    if len(stages_of(training)) > 1:
        model, vae = load_model(training.run_dir), load_vae(training.vae.name, training.vae.weights)
        classes = range(NUM_CLASSES)
        growth = draw_growth(sampling, model, vae, classes, classes)
        save_grid(growth, run_dir / "growth.png", columns=NUM_CLASSES, enlarge=2)
    save_loss_curve(read_metrics(training.run_dir), run_dir / "loss_curve.png")


def load_real(config: DemoConfig) -> dict[str, RealImages]:
    """Return the real images, {"train", "held_out"}."""
    return load_fashion(config.images) if config.data == "fashion" else load_splits()


def stages_of(training: RecipeConfig) -> list[str]:
    """Return the names of the stages in which the model draws an image."""
    return [name for name, _, _ in family_of(training.model).token_rows(training.model)]


def _say(part: int, what: str) -> None:
    print(f"\n[{part}/5] {what}", flush=True)


def write_demo_page(run_dir: Path, config: DemoConfig, numbers: dict[str, float]) -> Path:
    """Write report.html with all pictures embedded, and return its path."""
    ratio = numbers["fid_samples"] / numbers["fid_training"]
    columns = ["samples", "held-out images through the VAE", "real training images"]
    rows = [
        [name, *(f"{numbers[f'{key}_{which}']:.2f}" for which in ("samples", "ceiling", "training"))]
        for name, key in (
            ("Fr\u00e9chet distance (lower is better)", "fid"),
            ("Inception score (10 at most)", "inception_score"),
            ("precision", "precision"),
            ("recall", "recall"),
        )
    ]
    stages, growth, variant = stages_of(config.train), "", escape(config.train.model.variant)
    if len(stages) > 1:
        growth = f"""<h2>One sample of each class, growing scale by scale</h2>
<p class="note">From top to bottom: {escape(", ".join(stages))}; each upsampled to full size and decoded by the VAE.</p>
{embed(run_dir / "growth.png")}"""
    body = f"""<h1>{variant} on {HEADINGS[config.data]}</h1>
<p class="note">Trained from scratch on {REAL_IMAGES[config.data]}; the
last run of the demo command took {numbers["minutes"]:.1f} minutes.</p>
<h2>Numbers</h2>
<p><b>{numbers["class_accuracy"]:.1%}</b> of {config.num_samples} samples show the requested {SHOWN[config.data]},
according to a classifier trained on the real training images. It recognises {numbers["judge_accuracy"]:.1%} of the
real held-out images, and {numbers["class_accuracy_ceiling"]:.1%} of them after a round trip through the VAE.</p>
{html_table(["against the held-out images", *columns], rows)}
<p class="note">Computed by torch-fidelity on the classifier's 64 features. The samples are {ratio:.2f} times as far
from the held-out images as the training images are. <a href="evaluation_samples/report.html">The report of the
evaluation</a> has more, with a table of what each class shows.</p>
<h2>Samples, a row per class</h2>
{embed(run_dir / "contact_sheet.png")}
<h2>Real held-out images, a row per class</h2>
{embed(run_dir / "real_images.png")}
{growth}
<h2>Training loss</h2>
{embed(run_dir / "loss_curve.png", "curve")}
<h2>Settings</h2>
{fold("all settings of this demo", describe_config(config))}
"""
    write_page(run_dir / REPORT_FILE, variant, body)
    return run_dir / REPORT_FILE
