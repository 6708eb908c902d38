"""What follows from the settings of a run before its first step: sizes, checks, folder, engine. Read next: step.py."""

import dataclasses
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowar import __version__
from flowar.base.distributed import World, broadcast_object
from flowar.base.errors import UserError
from flowar.base.run_folder import CHECKPOINTS, CONFIG_FILE, HISTORY_FILE, checkpoint_step, find_latest
from flowar.config.load import (
    changed_settings,
    decisive_settings,
    has_environment,
    is_free,
    load_described,
    save_described,
)
from flowar.config.training import BASE_BATCH_SIZE, TrainConfig
from flowar.latents.batches import check_fits, check_same_vae
from flowar.latents.schema import Passport, read_passport, write_passport
from flowar.latents.shards import LatentShards
from flowar.latents.vae import VAE, load_vae
from flowar.models.attention import import_flash_attention
from flowar.models.build import create_model
from flowar.models.family import Model
from flowar.training.checkpoint import remove_unfinished
from flowar.training.engine import Engine, EngineSettings, engine_name
from flowar.training.optim import freeze_parts, learning_rate
from flowar.training.owner import Owner, owner_lock, take_over
from flowar.training.start import StartPlan, is_same_start, plan_start, show_start
from flowar.training.step import StepSettings
from flowar.training.torch_engine import TorchEngine
from flowar.training.zero_engine import ZeROEngine


def make_engine(settings: EngineSettings, model: Model, world: World) -> Engine:
    """Return the engine that the settings name, around a model; rank 0 has the weights, others may be on "meta"."""
    freeze_parts(model, settings.optim.frozen)
    kind = ZeROEngine if engine_name(settings.parallel.engine, world.size) == "deepspeed" else TorchEngine
    return kind(settings, model, world)


def check_attention(attention: str, device: torch.device) -> None:
    """Raise a UserError if attention=flash can't run here."""
    if attention == "flash":
        import_flash_attention()
        if device.type != "cuda":
            raise UserError(f"attention=flash needs a GPU, but device is {device}; set attention=sdpa")


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What follows from the settings, the shards and the number of processes."""

    shards: LatentShards
    vae: VAE | None
    num_steps: int
    warmup_steps: float
    engine: EngineSettings
    step: StepSettings
    labels: NDArray[np.int64] | None  # of all images, if a sample is a sequence of images of one class
    start: StartPlan | None  # the weights of init.model that it starts with; None: fresh weights, or it resumes


def plan_run(config: TrainConfig, world: World) -> RunPlan:
    """Check what can be checked before anything is built, and print what will be done.

    Raises:
        UserError: if settings, shards and processes don't fit together.
    """
    config = keep_recorded_rate(config)
    shards = LatentShards(config.data)
    passport = shards.passport
    check_fits(passport, config.model, config.data.path)
    micro = split_batch(config.batch_size, config.micro_batch_size, world.size)
    num_steps, warmup_steps = count_steps(config, passport)
    parts = config.batch_size // (micro * world.size)
    if world.is_main:
        engine = engine_name(config.parallel.engine, world.size)
        how = f"{engine}, {world.device}, {config.precision}, attention {config.attention}"
        print(
            f"{passport.num_images:,} images / batch of {config.batch_size:,} = "
            f"{passport.num_images / config.batch_size:,.1f} steps per epoch, "
            f"{config.epochs:g} epochs = {num_steps:,} steps, {warmup_steps:,.0f} of them warm-up; batch = {micro:,} x "
            f"{parts} parts x {world.size} processes ({how})"
        )
    say_learning_rate(config, is_said=world.is_main)
    check_resumable(Path(config.run_dir), config, passport, say=world.is_main)
    start = plan_start(config, passport)
    if start is not None and world.is_main:
        show_start(start, config.init)
    if config.optim.frozen:
        with torch.device("meta"):
            freeze_parts(create_model(config.model), config.optim.frozen)
    vae = load_vae(config.vae.name, config.vae.weights) if config.preview.every_steps else None
    if vae is not None:
        check_same_vae(passport, vae, config.data.path)
        vae.latent_scale = passport.latent_scale
    elif passport.vae_name != config.vae.name:  # without previews the VAE isn't loaded, and may not be on this machine
        raise UserError(
            f"data.path={config.data.path} was made with VAE {passport.vae_name}, but vae.name={config.vae.name}; set "
            f"vae.name={passport.vae_name}, or use other shards"
        )
    labels = None
    if config.model.images_per_sample > 1:
        if shards.is_remote:
            shards.fetch_all()
        labels = broadcast_object(shards.read_labels() if world.is_main else None)
    return RunPlan(
        shards,
        vae,
        num_steps,
        warmup_steps,
        EngineSettings(config.parallel, config.optim, config.precision, micro, parts),
        StepSettings.of(config, micro, passport.latent_scale),
        labels,
        start,
    )


def count_steps(config: TrainConfig, passport: Passport) -> tuple[int, float]:
    """Return how many steps a run has, and how many of them (not a whole number) warm up."""
    warmup_steps = config.optim.warmup_epochs * (passport.num_images / config.batch_size)
    return config.count_steps(passport.num_images), warmup_steps


def say_learning_rate(config: TrainConfig, *, is_said: bool) -> None:
    """Print the learning rate and what it follows from.

    Raises:
        UserError: if the batch is so small that the rate would be below `optim.min_lr`.
    """
    optim = config.optim
    peak = optim.peak_lr(config.batch_size)
    source = "optim.lr"
    if optim.lr is None:
        source = f"optim.base_lr {optim.base_lr:g} x batch_size {config.batch_size} / {BASE_BATCH_SIZE}"
        if peak < optim.min_lr:
            raise UserError(
                f"the learning rate {peak:g} = {source} is below optim.min_lr={optim.min_lr:g}, where its cosine ends; "
                "set optim.lr, or a lower optim.min_lr"
            )
    if is_said:
        print(f"learning rate {peak:g} = {source}")


def keep_recorded_rate(config: TrainConfig) -> TrainConfig:
    """Return the settings with the learning rate of a run that flowar 0.1 began, unless they set another one.

    In 0.1 the rate didn't follow from the batch; without this, such a run would continue with another rate.
    """
    file = Path(config.run_dir) / CONFIG_FILE
    if config.optim.lr is not None or not file.is_file() or "base_lr:" in file.read_text(errors="replace"):
        return config
    before = load_described(TrainConfig, file)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=before.optim.lr))


def split_batch(batch_size: int, micro_batch_size: int | None, num_ranks: int) -> int:
    """Return how many samples each process takes at once.

    Args:
        batch_size: of all ranks together.
        micro_batch_size: requested; None: all samples of a rank.
        num_ranks: number of processes.

    Raises:
        UserError: if the batch can't be split into equal parts; it suggests a size that can.
    """
    if batch_size % num_ranks:
        fitting = max(1, round(batch_size / num_ranks)) * num_ranks
        raise UserError(
            f"batch_size={batch_size} is not a multiple of {num_ranks} processes; try batch_size={fitting}, or "
            "another number of processes"
        )
    share_of_rank = batch_size // num_ranks
    micro = micro_batch_size or share_of_rank
    if share_of_rank % micro:
        fitting = max(n for n in range(1, micro + 1) if share_of_rank % n == 0)
        raise UserError(
            f"batch_size={batch_size} is not a multiple of micro_batch_size={micro} x {num_ranks} processes = "
            f"{micro * num_ranks}; try micro_batch_size={fitting}"
        )
    return micro


def check_resumable(run_dir: Path, config: TrainConfig, passport: Passport, *, say: bool) -> None:
    """Raise a UserError if `run_dir` holds a run with other settings or other data, saying what differs.

    Args:
        run_dir: may not exist yet.
        config, passport: of the run that would resume there.
        say: print which settings change from here on.
    """
    if not (run_dir / CONFIG_FILE).exists():
        if (latest := find_latest(run_dir)) is not None:
            raise UserError(
                f"run_dir={run_dir} has {latest.name}, but no {CONFIG_FILE} with the settings it was trained with; "
                "restore that file from a backup or from RUN_DIR/jobs, or give another run_dir"
            )
        return
    before = load_described(TrainConfig, run_dir / CONFIG_FILE)
    changed = changed_settings(before, config)
    for key in sorted(key for key in changed if is_free(TrainConfig, key)):
        old, new = changed.pop(key)
        consequence = new_schedule(run_dir, before, config, passport) if key == "epochs" else ""
        if say:
            print(f"{key} was {old}, now {new}{consequence}")
    if None not in changed.get("init.model", (None,)) and is_same_start(run_dir, config.init):
        old, new = changed.pop("init.model")
        if say:
            print(f"init.model was {old}, now {new}, which holds the same weights")
    if changed:
        listed = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())
        raise UserError(f"run_dir={run_dir} holds another run: {listed}; give another run_dir, or the same settings")
    recorded, found = decisive_settings(read_passport(run_dir)), decisive_settings(passport)
    other = next((key for key in found if recorded[key] != found[key]), None)
    if other is not None:
        raise UserError(
            f"run_dir={run_dir} was trained on other shards: {other} was {str(recorded[other])[:40]}, data.path="
            f"{config.data.path} has {str(found[other])[:40]}; give another run_dir, or those shards"
        )


def new_schedule(run_dir: Path, before: TrainConfig, after: TrainConfig, passport: Passport) -> str:
    """Return in words what another number of epochs changes in a run.

    Raises:
        UserError: if the run is already past its new end.
    """
    latest = find_latest(run_dir)
    step = 0 if latest is None else checkpoint_step(latest)
    ends, rates = [], []
    for config in (before, after):
        num_steps, warmup_steps = count_steps(config, passport)
        ends.append(num_steps)
        peak, least = config.optim.peak_lr(config.batch_size), config.optim.min_lr
        rates.append(learning_rate(step, num_steps=num_steps, warmup_steps=warmup_steps, lr=peak, min_lr=least))
    if ends[1] < step:
        raise UserError(
            f"epochs={after.epochs:g} is {ends[1]:,} steps, but run_dir={run_dir} has trained {step:,}; give at least "
            f"epochs={math.ceil(step * after.batch_size / passport.num_images)}, or another run_dir"
        )
    return (
        f": {ends[0]:,} steps become {ends[1]:,}; the cosine of the learning rate now ends there, so after step "
        f"{step:,} the rate is {rates[1]:.3g}, not {rates[0]:.3g}"
    )


def prepare_run_dir(run_dir: Path, passport: Passport) -> Owner:
    """Make the folder, take it over, write the passport, and delete what a killed process left."""
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        owner = take_over(run_dir)
        remove_unfinished(run_dir)
        write_passport(passport, run_dir)
    except OSError as error:
        raise UserError(f"can't write to run_dir={run_dir}: {error.strerror or error}") from error
    return owner


def record_settings(owner: Owner, config: TrainConfig, passport: Passport, step: int, world: World) -> None:
    """Record the settings of the steps after `step`: write config.yaml, and add a line to history.jsonl.

    Raises:
        UserError: if another process has meanwhile taken over the run, or started it with other settings.
    """
    run_dir = owner.run_dir
    start = {
        "after_step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "flowar": __version__,
        "torch": torch.__version__,
        "processes": world.size,
        "settings": dataclasses.asdict(config),
    }
    history = run_dir / HISTORY_FILE
    try:
        with owner_lock(run_dir):
            owner.check()
            check_resumable(run_dir, config, passport, say=False)
            save_described(config, run_dir / CONFIG_FILE)
            if has_environment(config):
                history.touch()
                history.chmod(0o600)
            with history.open("a") as file:
                file.write(json.dumps(start) + "\n")
    except OSError as error:
        raise UserError(f"can't write to run_dir={run_dir}: {error.strerror or error}") from error
