"""`flowar suggest`: a dataset and a machine -> the settings of a training, each with its reason. A recipe to edit.

The suggestions are starting points: the authors' rules where they give any, and for small data and small machines what
worked on the handwritten digits and on Fashion-MNIST. Read next: config/training.py, train.py.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from flowar.base.devices import pick_device
from flowar.base.distributed import World, refuse_many_processes
from flowar.base.errors import UserError
from flowar.base.files import create_whole
from flowar.config.load import did_you_mean
from flowar.config.models import MODEL_VARIANTS, FlowARConfig, config_from_dict, suggested_shape
from flowar.config.suggesting import SuggestConfig
from flowar.config.training import OptimConfig, ParallelConfig
from flowar.latents.batches import Batch
from flowar.latents.schema import Passport
from flowar.latents.shards import LatentShards
from flowar.models.build import create_model
from flowar.models.costs import count_parameters
from flowar.training.engine import EngineSettings
from flowar.training.setup import make_engine
from flowar.training.step import StepSettings, accumulate, agree, draw_training_inputs

# (smallest number of images, model): with fewer images a larger model would memorise them.
BY_IMAGES = ((0, "flowar-xs"), (100_000, "flowar-s"), (400_000, "flowar-b"), (1_000_000, "flowar-l"))
ON_CPU = "flowar-xxs"
CPU_MINUTES, GPU_MINUTES = 15, 24 * 60
AUTHORS_EPOCHS, AUTHORS_BATCH, AUTHORS_WARMUP = 400, 2048, 100
AUTHORS_BASE_LR = 5e-5  # for a batch of 256
SMALL_LR = {"flowar-xxs": 2e-3, "flowar-xs": 1e-3}  # for batches of 64, found on Fashion-MNIST
SMALL_BATCH, MIDDLE_BATCH = 64, 256
UNEVEN_STD, UNEVEN_MEAN, UNEVEN_SCALE = 1.25, 0.25, 0.1  # beyond these, each channel is normalised by itself
MEASURED_STEPS, MEASURED_S = 5, 5.0  # at least this many steps, for at least this long


class Suggestion(NamedTuple):
    """One setting."""

    key: str
    value: Any
    reason: str


def main(config: SuggestConfig, dry_run: bool = False) -> None:
    """Print or write the YAML, and the command that trains with it."""
    refuse_many_processes("suggest")
    device = pick_device(config.device)
    shards = LatentShards(config.data)
    if config.file is not None and Path(config.file).exists():
        raise UserError(f"file={config.file} already exists; give a new name, or remove the file first")
    if dry_run:
        print(f"would measure {device} and suggest a training on {config.data.path}")
        return
    text = describe_suggestions(shards.passport, suggest(config, shards.passport, device))
    if config.file is None:
        print(text, end="")
        return
    Path(config.file).parent.mkdir(parents=True, exist_ok=True)
    if not create_whole(Path(config.file), lambda hidden: hidden.write_text(text)):
        raise UserError(f"file={config.file} was just written by another process; give a new name")
    print(text)
    print(f"wrote {config.file}; check it, then run: flowar train {config.file}")


def suggest(config: SuggestConfig, passport: Passport, device: torch.device) -> list[Suggestion]:
    """Return the settings of a training on a dataset, after measuring how fast the device trains the model."""
    is_gpu = device.type == "cuda"
    variant, why_variant = choose_variant(config, passport, is_gpu)
    small = variant in SMALL_LR
    row = MODEL_VARIANTS[variant]
    assert isinstance(row, FlowARConfig)
    shape: dict[str, Any] = {
        "variant": variant,
        **suggested_shape(row, passport.latent_size, passport.latent_channels, coarse=not is_gpu),
        "latent_channels": passport.latent_channels,
        "num_classes": len(passport.class_names),
    }
    model = config_from_dict(shape)
    batch = SMALL_BATCH if not is_gpu else MIDDLE_BATCH if passport.num_images < BY_IMAGES[-1][0] else AUTHORS_BATCH
    batch = min(batch, max(8, 2 ** int(math.log2(max(passport.num_images / 4, 8)))))
    precision = "bf16" if is_gpu else "fp32"
    gpus = config.gpus if is_gpu else 1
    share = max(1, batch // gpus)  # of one GPU; the batch must split into equal parts
    batch, micro = share * gpus, max(size for size in range(1, min(share, SMALL_BATCH) + 1) if share % size == 0)
    step_s = measure_step(model, device, precision, micro) * share / micro
    lr = SMALL_LR[variant] * batch / SMALL_BATCH if small else AUTHORS_BASE_LR * batch / 256

    minutes = config.minutes or (GPU_MINUTES if is_gpu else CPU_MINUTES)
    most = math.ceil(AUTHORS_EPOCHS * passport.num_images / batch)
    steps = max(100, min(most, int(60 * minutes / step_s)))
    epochs = float(f"{steps * batch / passport.num_images:.4g}")
    is_whole = steps == most
    warmup = min(AUTHORS_WARMUP / AUTHORS_EPOCHS if is_whole and not small else 0.05, 0.25) * epochs
    decay = max(0.9, min(0.9999, round(1 - 20 / steps, 5)))
    time_says = f"{steps:,} steps of {1000 * step_s:.0f} ms on {device}: about {steps * step_s / 60:.0f} min"
    normalize, why_normalize = choose_normalization(passport)
    fits = f"for latents of side {passport.latent_size}, and the dataset's classes"
    parameters = count_parameters(model)["total"]
    run_dir = config.run_dir or f"runs/{Path(config.data.path).name}"
    found = [
        Suggestion("run_dir", run_dir, "where the run writes everything"),
        Suggestion("data.path", config.data.path, f"{passport.num_images:,} images, {shape['num_classes']:,} classes"),
        Suggestion("data.normalize", normalize, why_normalize),
        Suggestion("vae.name", passport.vae_name, "the VAE that made the dataset"),
        Suggestion("model.variant", variant, f"{parameters / 1e6:.1f} M parameters: {why_variant}"),
        *(Suggestion(f"model.{name}", value, fits) for name, value in shape.items() if name != "variant"),
        Suggestion("epochs", epochs, f"{time_says}{'; the same number as the authors' if is_whole else ''}"),
        Suggestion("batch_size", batch, "of all processes together"),
        Suggestion(
            "optim.lr", float(f"{lr:.3g}"), "higher for small models" if small else "the authors': 5e-5 x batch / 256"
        ),
        Suggestion("optim.min_lr", float(f"{lr / 40:.3g}"), "a fortieth of the peak, like the authors"),
        Suggestion("optim.warmup_epochs", float(f"{warmup:.3g}"), "fits the length of the run"),
        Suggestion("ema.decays", [decay], "an average over about the last twentieth of the steps"),
        Suggestion("precision", precision, "fast and accurate enough on this device"),
        Suggestion("log_every_steps", max(1, min(50, steps // 100)), "at least a hundred lines in metrics.jsonl"),
        Suggestion("save_every_steps", max(50, min(1000, steps // 10)), "the most steps lost when the machine dies"),
        Suggestion("preview.every_steps", max(100, steps // 6), "pictures during training"),
        Suggestion("preview.num_images", min(64, 4 * len(passport.class_names)), "classes in turn"),
        Suggestion("preview.num_steps", 16, "fast, at some loss of quality"),
        Suggestion("preview.guidance", 1.5, "between no guidance (1) and ImageNet's (2.4 and more)"),
    ]
    if config.vae_weights is not None:
        found.insert(4, Suggestion("vae.weights", config.vae_weights, "as given"))
    if is_gpu:
        found.append(Suggestion("micro_batch_size", micro, "what one GPU takes at once; `flowar plan` says what fits"))
        found.append(Suggestion("parallel.compile", True, "about twice as fast after compiling"))
    return found


def choose_variant(config: SuggestConfig, passport: Passport, is_gpu: bool) -> tuple[str, str]:
    """Return the model, and why.

    Raises:
        UserError: if no FlowAR has that name.
    """
    if config.variant is not None:
        known = [name for name, row in MODEL_VARIANTS.items() if isinstance(row, FlowARConfig)]
        if config.variant not in known:
            raise UserError(f"variant={config.variant} is not a FlowAR{did_you_mean(config.variant, known)}")
        return config.variant, "as given"
    if not is_gpu:
        return ON_CPU, "what a CPU trains in minutes"
    name = [name for least, name in BY_IMAGES if passport.num_images >= least][-1]
    return name, f"for {passport.num_images:,} images; a larger model would memorise them"


def choose_normalization(passport: Passport) -> tuple[str, str]:
    """Return data.normalize, and why."""
    ratio = passport.latent_multiplier / passport.measured_multiplier
    spread = max(passport.latent_std) / max(min(passport.latent_std), 1e-12)
    shift = max(abs(mean) for mean in passport.latent_mean) * passport.measured_multiplier
    if abs(ratio - 1) <= UNEVEN_SCALE and spread <= UNEVEN_STD and shift <= UNEVEN_MEAN:
        return "vae", f"with the VAE's own multiplier latents have std {ratio:.2f}, and the channels are alike"
    why = f"with the VAE's own multiplier latents have std {ratio:.2f}; channels differ by a factor {spread:.1f} in std"
    return "channel", f"{why}, and their means are up to {shift:.2f} std from 0"


def measure_step(model: Any, device: torch.device, precision: str, batch_size: int) -> float:
    """Return the seconds of one training step with made-up latents: the fastest of some after a warm-up.

    The fastest, as other work on the machine, which may end soon, can slow down a step by ten times.
    """
    world = World(0, 1, device, None)
    settings = EngineSettings(ParallelConfig(engine="single"), OptimConfig(), precision, batch_size, 1)
    engine = make_engine(settings, create_model(model).train(), world)
    step = StepSettings(model, 0, 0.1, precision, batch_size, 1.0)
    channels, *sides = model.latent_shape
    count = batch_size * model.images_per_sample
    labels = torch.arange(batch_size) % model.num_classes
    batch = Batch(torch.zeros(count, 2 * channels, *sides), labels, torch.arange(count))
    seconds: list[float] = []
    while len(seconds) <= MEASURED_STEPS or sum(seconds[1:]) < MEASURED_S:
        number = len(seconds) + 1
        began = time.perf_counter()
        terms = accumulate(engine, draw_training_inputs(batch, number, step), step)
        engine.step(1e-6, agree(engine, terms, step).grad_norm)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def write_value(value: Any) -> str:
    """Return a value as YAML in one line, taken literally: any `${` is escaped."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip().replace("${", "\\${")


def describe_suggestions(passport: Passport, found: list[Suggestion]) -> str:
    """Return the YAML text, grouped by section, with the reason on each line."""
    lines = [
        f"# By `flowar suggest`, for {passport.image_size} px images encoded by VAE {write_value(passport.vae_name)}",
        "# Train, and resume, with: flowar train THIS_FILE",
    ]
    section = ""
    for key, value, reason in found:
        before, _, name = key.rpartition(".")
        if before and before != section:
            lines.append(f"{before}:")
        section = before
        lines.append(f"{'  ' if before else ''}{name}: {write_value(value)}  # {reason}")
    return "\n".join(lines) + "\n"
