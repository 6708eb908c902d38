"""A sampling job: what to draw, with which networks, into which folder; checked first. Read next: worker.py."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowar import __version__
from flowar.base.devices import pick_device
from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.base.leases import WAIT_S, Leases
from flowar.base.records import create_record, write_record
from flowar.base.run_folder import CHECKPOINTS, CONFIG_FILE, PASSPORT_FILE, is_checkpoint
from flowar.base.seeding import Stream, derive_seed
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.load import did_you_mean, load_described
from flowar.config.models import ModelConfig
from flowar.config.training import TrainConfig
from flowar.latents.batches import check_same_vae
from flowar.latents.schema import read_passport
from flowar.latents.vae import VAE, load_vae
from flowar.models.build import compile_blocks
from flowar.models.family import Model
from flowar.models.folders import load_model
from flowar.sampling.folder import (
    CLASS_NAMES,
    IDENTITY,
    SAMPLES_FILE,
    hash_json,
    identify,
    read_samples,
    refuse_unrecorded,
    settings_of_images,
)
from flowar.sampling.weights import Weights, find_weights, say_if_outdated

MOST_NAMED = 20  # classes that a message lists
ABSENT_IN_0_1 = {
    "compile": False,
    "random_labels": False,
    "names": False,
}  # settings that the samples.json of version 0.1 does not have
LABELS_KEY = "labels_xxh64"  # in samples.json: a hash of label_file's content; version 0.1 didn't write it


def open_job(config: SampleConfig, weights: Weights | None = None) -> "SamplingJob":
    """Return the job that the settings describe, with all networks loaded.

    Args:
        config: the settings.
        weights: to draw with; None: those that `config` names.

    Raises:
        UserError: if something is missing or does not fit.
    """
    device = pick_device(config.device)
    weights = weights or find_weights(config)
    say_if_outdated(config, weights)
    model = load_model(weights.stored, config.weights).to(device)
    vae_config = choose_vae(config.vae, weights.folder)
    vae = load_vae(vae_config.name, vae_config.weights).to(device)
    fit_vae(weights.stored, model.config, vae)
    weights_sha256 = hash_weights(model.state_dict())
    class_names = read_class_names(weights.stored)
    config = dataclasses.replace(config, classes=resolve_classes(config.classes, class_names))
    if config.names and len(class_names) < model.config.num_classes:
        raise UserError(
            f"names=true puts class names into file names, but {weights.stored} has no class names, as it has no "
            f"{PASSPORT_FILE} of its dataset; leave out names"
        )
    if config.compile:
        compile_blocks(model)
    return SamplingJob(
        config, model, vae, device, choose_classes(config, model.config), weights, weights_sha256, class_names
    )


def choose_vae(given: VAEConfig | None, folder: Path) -> VAEConfig:
    """Return the VAE to decode with; by default the VAE of the training run, which is then printed.

    Args:
        given: the setting; None, or without weights: find them.
        folder: a run's checkpoint, which may be deleted (the run's config.yaml names the VAE), or a model folder with a
            dataset's passport.
    """
    if given is not None and (given.weights is not None or given.name != VAEConfig().name):
        return given
    config = folder.parent.parent / CONFIG_FILE
    if (is_checkpoint(folder) or folder.parent.name == CHECKPOINTS) and config.is_file():
        found, source = load_described(TrainConfig, config).vae, config
    elif (folder / PASSPORT_FILE).is_file():
        found, source = VAEConfig(name=read_passport(folder).vae_name), folder / PASSPORT_FILE
    else:
        return given or VAEConfig()
    if given is not None and given.name != found.name:
        return given
    weights = f" vae.weights={found.weights}" if found.weights else ""
    print(f"vae.name={found.name}{weights}, as {source} says")
    return found


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's classes from the passport of its dataset; () if it has no passport."""
    return tuple(read_passport(folder).class_names) if (folder / PASSPORT_FILE).is_file() else ()


def resolve_classes(classes: Sequence[int | str] | None, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers of classes that are given by number or by name.

    Args:
        classes: a text is a name; if no class has that name and it is all digits, it is a number.
        names: by class number.

    Raises:
        UserError: if no class has the name.
    """
    if classes is None:
        return None
    by_name = {name: number for number, name in enumerate(names)}
    numbers: list[int] = []
    for given in classes:
        if isinstance(given, int):
            numbers.append(given)
        elif given in by_name:
            numbers.append(by_name[given])
        elif given.isdecimal():
            numbers.append(int(given))
        elif not names:
            raise UserError(f"classes={given} is a name, but the model has no names of its classes; give numbers")
        else:
            near = did_you_mean(given, names)
            near = near if "did you mean" in near or len(names) <= MOST_NAMED else f"; the first is {names[0]}"
            raise UserError(f"classes={given} is not a class of the model{near}")
    return tuple(numbers)


def as_numbers(classes: Sequence[int | str] | None) -> tuple[int, ...] | None:
    """Return classes as numbers; they must all be numbers already, as `resolve_classes` returns them."""
    return None if classes is None else tuple(int(label) for label in classes)


def choose_classes(config: SampleConfig, model: ModelConfig) -> tuple[int, ...]:
    """Return the classes that the images show in turn; with random_labels, one for each image.

    Raises:
        UserError: if the label file can't be read, or the model doesn't have one of the classes.
    """
    if config.unconditional:
        return (model.num_classes,)  # stands for "no class"
    classes, source = as_numbers(config.classes), "classes"
    if config.label_file is not None:
        source = f"label_file={config.label_file}"
        try:
            classes = tuple(int(line) for line in Path(config.label_file).read_text().split())
        except (OSError, ValueError) as error:
            raise UserError(f"{source} must hold one class number per line: {error}") from error
    if classes is None:
        classes = tuple(range(model.num_classes))
    wrong = [label for label in classes if not 0 <= label < model.num_classes]
    if wrong or not classes:
        found = f"holds {wrong[0]}" if wrong else "is empty"
        raise UserError(f"{source} {found}; give class numbers of the model, 0 to {model.num_classes - 1}")
    if config.random_labels:  # each a function of (seed, number), so that a set can grow
        drawn = (derive_seed(config.seed, Stream.LABEL, number) for number in range(config.num_images))
        return tuple(classes[seed % len(classes)] for seed in drawn)
    return classes


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """What to draw, with which networks, into which folder."""

    config: SampleConfig
    model: Model
    vae: VAE
    device: torch.device
    classes: tuple[int, ...]
    weights: Weights
    weights_sha256: str
    class_names: tuple[str, ...] = ()  # by class number, if the model has them

    @property
    def out_dir(self) -> Path:
        """The folder of samples."""
        return Path(self.config.out_dir)

    @property
    def chunk_images(self) -> int:
        """Number of images in a chunk, the piece of work that one process claims."""
        return self.config.chunk_batches * self.config.batch_size

    @property
    def chunks(self) -> range:
        """The numbers of the chunks."""
        return range(-(-self.config.num_images // self.chunk_images))

    def chunk(self, number: int) -> range:
        """Return the images of a chunk."""
        start = number * self.chunk_images
        return range(start, min(start + self.chunk_images, self.config.num_images))

    def label(self, number: int) -> int:
        """Return the class of an image."""
        return self.classes[number % len(self.classes)]


def fit_vae(folder: Path, model: ModelConfig, vae: VAE) -> None:
    """Set up the VAE to decode the latents that the model makes.

    Raises:
        UserError: if the model makes latents of another VAE.
    """
    if model.latent_channels != vae.latent_channels:
        raise UserError(
            f"the model in {folder} makes latents of {model.latent_channels} channels, but VAE {vae.name} decodes "
            f"{vae.latent_channels}; set vae.name to the VAE that the model was trained with"
        )
    if (folder / PASSPORT_FILE).is_file():
        passport = read_passport(folder)
        check_same_vae(passport, vae, str(folder))
        vae.latent_scale = passport.latent_scale


def check_finite(job: SamplingJob, decoded: Tensor, numbers: range) -> None:
    """Raise a UserError if images are not finite."""
    if not decoded.isfinite().all():
        raise UserError(
            f"images {numbers[0]} to {numbers[-1]} are not finite: the weights of {job.config.model} are broken; draw "
            "from another checkpoint"
        )


def describe_samples(job: SamplingJob) -> dict[str, Any]:
    """Return everything that the images depend on, for samples.json."""
    settings = dataclasses.asdict(job.config)
    for key in ("out_dir", "model", "vae"):
        settings.pop(key)
    model: dict[str, Any] = {"model": str(job.weights.folder.absolute()), "variant": job.model.config.variant}
    if job.weights.step is not None:
        model["step"] = job.weights.step
    networks = {"weights_sha256": job.weights_sha256, "vae_sha256": job.vae.weights_sha256, "vae_name": job.vae.name}
    # Stochastic solvers used other seeds in 0.1; only those samples need this entry.
    stream = {"noise_stream": int(Stream.STEP_NOISE)} if job.config.solver == "euler-maruyama" else {}
    labels: dict[str, Any] = {LABELS_KEY: hash_json(job.classes)} if job.config.label_file is not None else {}
    if job.class_names:
        labels[CLASS_NAMES] = list(job.class_names)
    record = {**model, "flowar": __version__, "torch": torch.__version__, **networks, **settings, **stream}
    record |= {**job.config.annealing, **labels}
    return record | {IDENTITY: identify(record)}


def check_same_samples(out_dir: Path, record: dict[str, Any]) -> None:
    """Raise a UserError if `out_dir` holds images drawn with other settings, saying what differs, or unknown ones."""
    refuse_unrecorded(out_dir)
    if not (out_dir / SAMPLES_FILE).exists():
        return
    before, now = ABSENT_IN_0_1 | read_samples(out_dir), settings_of_images(record)
    compared = [key for key in now if key in before or key != LABELS_KEY]
    changed = [f"{key} was {before.get(key)}, now {now[key]}" for key in compared if before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"out_dir={out_dir} holds images drawn with other settings: {'; '.join(changed)}; give another out_dir"
        )


def check_not_fewer(out_dir: Path, num_images: int) -> None:
    """Raise a UserError if `out_dir` is for more images: another process may be drawing them."""
    before = read_samples(out_dir)["num_images"] if (out_dir / SAMPLES_FILE).exists() else 0
    if num_images < before:
        raise UserError(
            f"num_images={num_images:,} is less than the {before:,} images that out_dir={out_dir} was started for; "
            f"set num_images={before}, or give another out_dir"
        )


def agree_on_samples(job: SamplingJob, leases: Leases) -> None:
    """Write samples.json before anything is drawn. One process writes it, and all others compare.

    A set of samples can grow: its number of images is the largest that was ever requested.

    Raises:
        UserError: if the folder holds images drawn with other or unknown settings.
    """
    file, record = job.out_dir / SAMPLES_FILE, describe_samples(job)
    check_same_samples(job.out_dir, record)
    if file.exists() or not create_record(file, record):
        check_same_samples(job.out_dir, record)  # another process was faster, maybe with other settings
    while (before := read_samples(job.out_dir))["num_images"] < job.config.num_images:
        if not leases.claim(SAMPLES_FILE):
            time.sleep(WAIT_S)
            continue
        before = read_samples(job.out_dir)
        if before["num_images"] < job.config.num_images:
            write_record(file, record | {IDENTITY: identify(before)})
        leases.release(SAMPLES_FILE)
