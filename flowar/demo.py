"""`flowar demo`: handwritten digits from images to a report, each part by the verb that does it at real scale.

Read next: digits.py for the data and the judge, demo_report.py for the page.
"""

import json
import time
from html import escape
from pathlib import Path

import torch

from flowar.base.distributed import refuse_many_processes
from flowar.base.files import write_text
from flowar.base.pages import REPORT_FILE, embed, write_page
from flowar.base.pictures import save_grid, save_loss_curve
from flowar.base.records import read_record
from flowar.base.run_folder import PASSPORT_FILE
from flowar.cli import run_verb
from flowar.config.data import DataConfig, ExtractorConfig, PrepareConfig
from flowar.config.drawing import SampleConfig
from flowar.config.jobs import DemoConfig
from flowar.config.load import describe_config, extend
from flowar.config.measuring import EvaluateConfig
from flowar.config.training import RecipeConfig, TrainConfig
from flowar.evaluation.digits import (
    IMAGE_SIZE,
    NUM_CLASSES,
    accuracy,
    load_classifier,
    load_splits,
    save_classifier,
    train_classifier,
    write_image_folders,
)
from flowar.evaluation.extractors import DEMO_EXTRACTOR
from flowar.evaluation.page import EVALUATION_FILE
from flowar.latents.vae import load_vae
from flowar.models.build import family_of
from flowar.models.folders import load_model
from flowar.sampling.folder import IMAGES_FOLDER
from flowar.sampling.gallery import draw_growth
from flowar.sampling.images import load_pngs
from flowar.training.report import read_metrics

DIGITS_PER_CLASS = 20  # images of each class in the contact sheet
DEMO_METRICS = ("fid", "inception_score", "precision", "recall")


def main(config: DemoConfig, dry_run: bool = False) -> None:
    """Prepare, train, sample, evaluate and report; parts that are done already are not done again."""
    refuse_many_processes("demo")
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    data = DataConfig(path=str(run_dir / "data"), num_workers=0)
    training = extend(TrainConfig, config.train, run_dir=str(run_dir / "train"), data=data)
    if dry_run:
        print(f"would write to {run_dir}")
        return

    _say(1, "real images: scikit-learn's 1,797 handwritten digits, as PNG folders")
    images = run_dir / "images"
    if not (run_dir / "data" / PASSPORT_FILE).exists():
        write_image_folders(images)
    _say(2, "prepare: images -> VAE moments -> MDS shards")
    if not (run_dir / "data" / PASSPORT_FILE).exists():
        run_verb(
            "prepare",
            PrepareConfig(
                images=str(images / "train"),
                out_dir=str(run_dir / "data"),
                vae=training.vae,
                image_size=IMAGE_SIZE,
                flip=False,  # no digit is its own mirror image
                num_workers=0,
                device=training.device,
            ),
        )
    _say(3, f"train {training.model.variant} on the shards; kill it at any time; the same command resumes")
    run_verb("train", training)
    _say(4, "train the judge: a small classifier of the real digits")
    judge_file = run_dir / "classifier.safetensors"
    if not judge_file.exists():
        save_classifier(train_classifier(), judge_file)
    _say(5, f"sample {config.num_samples} images, classes in turn")
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
    _say(6, "evaluate: samples against held-out digits, beside real training digits against the same")
    numbers = measure_demo(config, judge_file)
    draw_pictures(run_dir, training, sampling)
    numbers["minutes"] = (time.perf_counter() - started) / 60
    write_text(run_dir / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    report = write_demo_page(run_dir, config, numbers)
    print(
        f"\nclassified as asked: {numbers['class_accuracy']:.1%} of {config.num_samples} samples (the classifier knows "
        f"{numbers['judge_accuracy']:.1%} of the held-out real digits)\n"
        f"Frechet distance to the held-out digits: samples {numbers['fid_samples']:.2f}, training digits "
        f"{numbers['fid_training']:.2f}, ratio {numbers['fid_samples'] / numbers['fid_training']:.2f}\n"
        f"{numbers['minutes']:.1f} minutes; open {report.resolve()}"
    )


def measure_demo(config: DemoConfig, judge_file: Path) -> dict[str, float]:
    """Return the demo's numbers: how many samples show the class they were asked for, and distances to real digits."""
    run_dir = Path(config.run_dir)
    judge = load_classifier(judge_file)
    files = sorted((run_dir / "samples" / IMAGES_FOLDER).glob("*.png"))[: config.num_samples]
    asked = torch.arange(len(files)) % NUM_CLASSES
    numbers = {
        "judge_accuracy": accuracy(judge, *load_splits()["held_out"]),
        "class_accuracy": accuracy(judge, load_pngs(files).permute(0, 2, 3, 1).numpy(), asked.numpy()),
    }
    for name, images in (("samples", run_dir / "samples"), ("training", run_dir / "images" / "train")):
        out_dir = run_dir / f"evaluation_{name}"
        run_verb(
            "evaluate",
            EvaluateConfig(
                samples=str(images),
                reference=str(run_dir / "images" / "held_out"),
                out_dir=str(out_dir),
                protocol="torch-fidelity",
                extractor=ExtractorConfig(name=DEMO_EXTRACTOR, weights=str(judge_file)),
                device=config.train.device,
            ),
        )
        found = read_record(out_dir / EVALUATION_FILE, "delete it and run the same command again")["metrics"]
        numbers |= {f"{metric}_{name}": found[metric]["value"] for metric in DEMO_METRICS}
    return numbers


def draw_pictures(run_dir: Path, training: TrainConfig, sampling: SampleConfig) -> None:
    """Write contact_sheet.png (a row per class), real_digits.png, loss_curve.png; growth.png if there are stages."""
    files = sorted((run_dir / "samples" / IMAGES_FOLDER).glob("*.png"))
    columns = min(DIGITS_PER_CLASS, len(files) // NUM_CLASSES)
    by_class = [file for label in range(NUM_CLASSES) for file in files[label::NUM_CLASSES][:columns]]
    save_grid(load_pngs(by_class), run_dir / "contact_sheet.png", columns=columns, enlarge=2)

    images, labels = load_splits()["held_out"]
    real = [image for label in range(NUM_CLASSES) for image in images[labels == label][:columns]]
    save_grid(
        torch.stack([torch.from_numpy(i) for i in real]).permute(0, 3, 1, 2),
        run_dir / "real_digits.png",
        columns=columns,
        enlarge=2,
    )

    if len(stages_of(training)) > 1:
        model, vae = load_model(training.run_dir), load_vae(training.vae.name, training.vae.weights)
        classes = range(NUM_CLASSES)
        growth = draw_growth(sampling, model, vae, classes, classes)
        save_grid(growth, run_dir / "growth.png", columns=NUM_CLASSES, enlarge=2)
    save_loss_curve(read_metrics(training.run_dir), run_dir / "loss_curve.png")


def stages_of(training: RecipeConfig) -> list[str]:
    """Return the names of the stages in which the model draws an image."""
    return [name for name, _, _ in family_of(training.model).token_rows(training.model)]


def _say(part: int, what: str) -> None:
    print(f"\n[{part}/6] {what}", flush=True)


def write_demo_page(run_dir: Path, config: DemoConfig, numbers: dict[str, float]) -> Path:
    """Write report.html, all pictures inside, and return its path."""
    ratio = numbers["fid_samples"] / numbers["fid_training"]
    rows = "".join(
        f"<tr><td>{name}</td><td>{numbers[f'{key}_samples']:.2f}</td><td>{numbers[f'{key}_training']:.2f}</td></tr>"
        for name, key in (
            ("Fr&eacute;chet distance (lower is better)", "fid"),
            ("Inception score (10 at most)", "inception_score"),
            ("precision", "precision"),
            ("recall", "recall"),
        )
    )
    stages, growth, variant = stages_of(config.train), "", escape(config.train.model.variant)
    if len(stages) > 1:
        growth = f"""<h2>One sample of each class, growing scale by scale</h2>
<p class="note">From top to bottom: {escape(", ".join(stages))}; each brought to full size and decoded by the VAE.</p>
{embed(run_dir / "growth.png")}"""
    body = f"""<h1>{variant} on handwritten digits</h1>
<p class="note">Trained from scratch on scikit-learn's digits; the
last call of the demo took {numbers["minutes"]:.1f} minutes.</p>
<h2>Numbers</h2>
<p><b>{numbers["class_accuracy"]:.1%}</b> of {config.num_samples} samples show the digit they were asked for, by a
classifier that was trained on the real training digits and knows {numbers["judge_accuracy"]:.1%} of the real held-out
ones.</p>
<table><tr><th>against the held-out digits</th><th>samples</th><th>real training digits</th></tr>{rows}</table>
<p class="note">On the classifier's 64 features, by torch-fidelity. The samples are {ratio:.2f} times as far from the
held-out digits as the training digits are.</p>
<h2>Samples, a row per class</h2>
{embed(run_dir / "contact_sheet.png")}
<h2>Real held-out digits, a row per class</h2>
{embed(run_dir / "real_digits.png")}
{growth}
<h2>Training loss</h2>
{embed(run_dir / "loss_curve.png", "curve")}
<h2>Settings</h2>
<pre>{escape(describe_config(config))}</pre>
"""
    write_page(run_dir / REPORT_FILE, variant, body)
    return run_dir / REPORT_FILE
