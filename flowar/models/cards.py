"""Cards: the README.md of a model folder and of a dataset, as the Hugging Face hub shows them. Read next: folders.py.

What a card says comes from the records beside it. Names of classes and folders are shown as code, so none of them is
markup; the same records give the same card.
"""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCardData

from flowar import __version__
from flowar.base.records import read_record
from flowar.base.run_folder import CONFIG_FILE, EVALUATIONS, PASSPORT_FILE, checkpoint_step
from flowar.config.load import load_described
from flowar.config.models import ModelConfig
from flowar.config.training import TrainConfig
from flowar.latents.schema import Passport, read_passport

CARD_FILE = "README.md"
TAGS = ["image-generation", "class-conditional", "flow-matching", "autoregressive"]
CLASSES_NAMED = 10
EVALUATION_CURE = "remove it and evaluate those samples again"
NOT_METRICS = ("step", "num_samples", "protocol", "samples", "reference", "intervals", "weights")


def as_code(value: object) -> str:
    """Return a value as inline code, which no name can end: backticks and line breaks in it are replaced."""
    return f"`{' '.join(str(value).replace('`', chr(39)).replace('|', '/').splitlines())}`"


def model_card(config: ModelConfig, checkpoint: Path | None = None, weights: str = "raw") -> str:
    """Return the card of a model.

    Args:
        config: its shape.
        checkpoint: of which it was exported, if it was; its run's settings, dataset and evaluations go into the card.
        weights: which weights of the checkpoint.
    """
    data = ModelCardData(
        library_name="flowar", license="apache-2.0", pipeline_tag="unconditional-image-generation",
        tags=[config.family, *([f"arxiv:{config.paper}"] if config.paper else []), *TAGS],
    )  # fmt: skip
    name = config.title or config.family
    method = f"[{name}](https://arxiv.org/abs/{config.paper})" if config.paper else name
    channels, *sides = config.latent_shape
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {name}, variant {as_code(config.variant)}\n",
        f"Draws latents of {channels} x {' x '.join(map(str, sides))} of {config.num_classes:,} classes "
        f"({method}). Made by flowar {__version__}{code_commit()}.\n",
        f"## Use\n\n```python\n{USE}```\n",
    ]
    if checkpoint is not None:
        parts.append(f"## Training\n\nStep {checkpoint_step(checkpoint):,}, weights {as_code(weights)}.\n")
        if (checkpoint / PASSPORT_FILE).is_file():
            parts.append(f"{describe_data(read_passport(checkpoint))}\n")
        run_dir = checkpoint.parent.parent
        if (run_dir / CONFIG_FILE).is_file():
            parts.append(f"```yaml\n{public_settings(load_described(TrainConfig, run_dir / CONFIG_FILE))}```\n")
        parts.append(describe_evaluations(run_dir, checkpoint_step(checkpoint), weights))
    parts.append("## Licence\n\nApache-2.0 for the code; the weights follow the licence of the images they learned.\n")
    return "\n".join(part for part in parts if part)


USE = """import torch
from flowar import FlowARPipeline

pipe = FlowARPipeline.from_pretrained("THIS_FOLDER")
pipe(class_labels=[0], generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
"""
# Settings that say how a model was made; all others, such as paths and names of users, stay out of a card.
PUBLIC = ("model", "optim", "epochs", "batch_size", "label_dropout", "ema", "precision", "seed")


def code_commit() -> str:
    """Return the commit of this code in words, if it lies in a git checkout; else nothing."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or refuses somebody else's checkout
        return ""
    return f", commit {as_code(answer.stdout.strip())}"


def public_settings(config: TrainConfig) -> str:
    """Return the recipe of a run as YAML, without its paths and accounts."""
    values = json.loads(json.dumps({key: value for key, value in asdict(config).items() if key in PUBLIC}))
    return yaml.safe_dump(values, sort_keys=False)


def describe_data(passport: Passport) -> str:
    """Return what a dataset is, in Markdown."""
    shown = ", ".join(as_code(name) for name in passport.class_names[:CLASSES_NAMED])
    more = len(passport.class_names) - CLASSES_NAMED
    rows = [
        ("images", f"{passport.num_images:,}"),
        ("classes", f"{len(passport.class_names):,}: {shown}{f' and {more:,} more' if more > 0 else ''}"),
        ("views", f"{passport.views} each, crop {passport.crop}, {passport.image_size} px, mirrored: {passport.flip}"),
        ("VAE", f"{as_code(Path(passport.vae_name).name)}, weights with sha256 {passport.vae_sha256[:16]}..."),
        (
            "latents",
            f"multiplier {passport.latent_multiplier:g}, moments {passport.moments_shape} {passport.moments_dtype}",
        ),
        ("listing", f"sha256 {passport.listing_sha256[:16]}..."),
    ]
    return "\n".join(["| dataset | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def describe_evaluations(run_dir: Path, step: int, weights: str) -> str:
    """Return the evaluations of these weights of a checkpoint as a table; "" if it was never measured."""
    rows = []
    for file in sorted((run_dir / EVALUATIONS).glob(f"step_{step:08d}.*.json")):
        record = read_record(file, EVALUATION_CURE)
        if record.get("weights", weights) != weights:
            continue
        metrics = {key: value for key, value in record.items() if key not in NOT_METRICS and isinstance(value, float)}
        said = ", ".join(f"{key} {value:.4g}{_interval(record, key)}" for key, value in metrics.items())
        rows.append(f"| {record['num_samples']:,} | {as_code(record['protocol'])} | {said} |")
    if not rows:
        return ""
    return "\n".join(["## Evaluations\n", "| samples | protocol | metrics |", "|---|---|---|", *rows, ""])


def _interval(record: dict[str, Any], metric: str) -> str:
    ends = record.get("intervals", {}).get(metric)
    return f" (95%: {ends[0]:.4g} to {ends[1]:.4g})" if ends else ""


def data_card(passport: Passport) -> str:
    """Return the card of a dataset of latents."""
    data = DatasetCardData(tags=["latents", "mds", "mosaicml-streaming", "flowar"], license="other")
    made = "VAE moments of images as MDS shards, to train latent image generators. Made by flowar "
    parts = [
        f"---\n{data.to_yaml()}\n---\n# Latents of images\n",
        f"{made}{__version__}; {as_code(PASSPORT_FILE)} has every detail and the hash of every shard.\n",
        describe_data(passport),
        f"\n## Use\n\n```bash\n{TRAINING}```\n\n```python\n{READING}```\n",
        "## Licence\n\nThat of the images.\n",
    ]
    return "\n".join(parts)


TRAINING = "flowar train data.path=THIS_FOLDER run_dir=runs/new\n"
READING = """from streaming import StreamingDataset

for sample in StreamingDataset(local="THIS_FOLDER", batch_size=1):
    sample["label"], sample["moments"]  # int, (2 C, h, w): mean, then log-variance
"""
