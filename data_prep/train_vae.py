"""`flowar train-vae`: a VAE for one's own images, on one process or many; the same command resumes.

OUT_DIR/
    config.json, diffusion_pytorch_model.safetensors    the VAE, in diffusers' layout; there when it is finished
    vae.json                                            what it was trained on, how well it gives held-out images back
    reconstruction.png                                  held-out images, and below each what comes back
    training/                                           a run folder: settings, metrics, checkpoints (run_folder.py)

Everything random in a step follows from (seed, step, place in the batch), as in `flowar train`. Read next:
autoencoder.py, training_images.py.
"""

import dataclasses
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.autoencoder import build_autoencoder, kl_divergence, whiten
from data_prep.sources import Source, open_source
from data_prep.statistics import MomentSums
from data_prep.training_images import read_centres, read_step_batches, split_held_out
from data_prep.vae_training import LOSS_TERMS, VAETraining, describe_steps
from flowar import __version__
from flowar.base.devices import pick_device
from flowar.base.distributed import (
    StopSignals,
    World,
    broadcast_object,
    limit_waiting,
    training_world,
    world_size,
)
from flowar.base.errors import EXIT_AGAIN, UserError
from flowar.base.pictures import save_grid
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    Progress,
    find_latest,
    read_progress,
)
from flowar.config.load import changed_settings, is_free, load_described, save_described
from flowar.config.tokenizing import TrainVAEConfig
from flowar.latents.vae import TRAINING_FOLDER, VAE, VAE_FILE, to_uint8
from flowar.training.checkpoint import Checkpoints, Kept, find_whole, remove_unfinished
from flowar.training.owner import Owner, take_over
from flowar.training.report import TrainingReport

VAE_CONFIG_FILE, VAE_WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
PICTURE_COLUMNS, PICTURE_ROWS = 12, 3
WHITENED_BY = 1024  # by which the latents are made white
MEASURED_AT_ONCE = 32


def main(config: TrainVAEConfig, dry_run: bool = False) -> None:
    """Train the VAE in `out_dir`, or resume; on as many processes as were started."""
    device = pick_device(config.device)
    if config.batch_size % world_size():
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {world_size()} processes; use one that is"
        )
    if dry_run:
        source = list_source(config)
        parameters = sum(p.numel() for p in build_autoencoder(config).parameters())
        print(f"{describe_training(config, source)}; {parameters / 1e6:.1f} M parameters; dry run, nothing was written")
        return
    run_dir = Path(config.out_dir) / TRAINING_FOLDER
    with training_world(
        device,
        with_group=False,
        verb="train-vae",
        timeout=f"timeout_s={config.timeout_s:g}",
        latest=lambda: find_latest(run_dir),
    ) as world:
        train_vae(config, world)


def train_vae(config: TrainVAEConfig, world: World) -> None:
    """Do what `main` does, within a started world."""
    # Set up.
    out_dir, run_dir = Path(config.out_dir), Path(config.out_dir) / TRAINING_FOLDER
    source = broadcast_object(list_source(config) if world.is_main else None)
    assert source is not None
    identity = source.sha256()
    owner = broadcast_object(prepare_folder(config, identity) if world.is_main else None)
    assert owner is not None
    if world.is_main:
        print(describe_training(config, source))
    if broadcast_object(is_trained(config)):
        if world.is_main:
            print(f"{out_dir} is finished already; use it by vae.name={out_dir}, or train on with more steps")
        return
    training = VAETraining(config, world, run_dir)

    # Resume.
    restored = find_whole(training.load, run_dir, world)
    progress = Progress() if restored is None else restored[0]
    if world.is_main and restored is not None:
        print(f"resuming from {restored[1]}")
    if world.is_main and progress.step < config.steps:
        owner.check()
        save_described(config, run_dir / CONFIG_FILE)
    kept = Kept(config.keep_checkpoints)
    checkpoints = Checkpoints(owner, world, ImagesOfVAE(config.images, identity), CHECKPOINTS, kept)

    # Loop.
    asked_to_stop, is_set_up = 0, False
    sinks = TrainingReport(
        run_dir,
        config.wandb,
        dataclasses.asdict(config),
        step=progress.step,
        num_steps=config.steps,
        is_main=world.is_main,
        tensorboard=config.tensorboard,
    )
    with StopSignals() as stopping, sinks as report:
        batches = read_step_batches(source, config, range(progress.step, config.steps), world, training.latent_shape)
        sums, began, first = torch.zeros(len(LOSS_TERMS)), time.perf_counter(), progress.step
        while progress.step < config.steps and not asked_to_stop:
            batch = next(batches)
            losses, asked_to_stop = training.step(batch, progress.step, stopping.asked)
            sums += losses
            step = progress.step + 1
            progress = Progress(step=step, updates=step)
            if not is_set_up:
                limit_waiting(config.timeout_s)
                is_set_up = True
            report.advance(step)
            is_last = step == config.steps
            if step % config.log_every_steps == 0 or is_last:
                if world.is_main:
                    owner.check()
                report.log(describe_steps(config, sums, step, step - first, time.perf_counter() - began))
                sums, began, first = torch.zeros(len(LOSS_TERMS)), time.perf_counter(), step
            checkpoints.check()
            if step % config.save_every_steps == 0 or is_last or asked_to_stop:
                checkpoints.save(training.state() if world.is_main else {}, progress)
        checkpoints.wait()
    if progress.step < config.steps:
        if world.is_main:
            name = signal.Signals(asked_to_stop).name
            print(f"stopped by {name} after step {progress.step:,}, saved; run the same command to resume")
        sys.exit(EXIT_AGAIN)

    # Make the latents white, measure, write.
    if world.is_main:
        owner.check()
        print(finish_vae(config, training, source, identity))


def list_source(config: TrainVAEConfig) -> Source:
    """Return the listing of the source."""
    return open_source(config.images, image_column=config.image_column, label_column=config.label_column)


def describe_training(config: TrainVAEConfig, source: Source) -> str:
    """Return what will be trained, in one line."""
    shape, side = config.shape, config.image_size // config.shape.stride
    train, held_out = split_held_out(len(source))
    ratio = 3 * config.image_size**2 / (shape.channels * side**2)
    return (
        f"{len(train):,} images of {config.images} ({len(held_out):,} more are held out) -> latents ({shape.channels}, "
        f"{side}, {side}), {ratio:.3g} numbers into one; {config.steps:,} steps of {config.batch_size} images = "
        f"{config.steps * config.batch_size / len(train):.3g} epochs"
    )


@dataclasses.dataclass(frozen=True)
class ImagesOfVAE:
    """What a checkpoint of a VAE says of itself: which images it saw."""

    images: str
    listing_sha256: str

    def write(self, folder: Path) -> None:
        """Write vae.json."""
        write_record(folder / VAE_FILE, dataclasses.asdict(self))


def prepare_folder(config: TrainVAEConfig, listing_sha256: str) -> Owner:
    """Make the folder of the run, own it, and refuse another run's.

    Raises:
        UserError: if it holds another training, or can't be written.
    """
    out_dir, run_dir = Path(config.out_dir), Path(config.out_dir) / TRAINING_FOLDER
    if out_dir.is_dir() and any(out_dir.iterdir()) and not run_dir.is_dir():
        raise UserError(f"out_dir={out_dir} is not empty, but no VAE was trained there; give a new folder")
    if (run_dir / CONFIG_FILE).exists():
        before = load_described(TrainVAEConfig, run_dir / CONFIG_FILE)
        changed = {
            key: pair for key, pair in changed_settings(before, config).items() if not is_free(TrainVAEConfig, key)
        }
        if changed:
            listed = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())
            raise UserError(
                f"out_dir={out_dir} holds another VAE: {listed}; give another out_dir, or the same settings"
            )
    latest = find_latest(run_dir)
    if latest is not None:
        of_step, of_images = (
            read_progress(latest).step,
            ImagesOfVAE(**read_record(latest / VAE_FILE, f"remove {latest}")),
        )
        if of_images.listing_sha256 != listing_sha256:
            raise UserError(
                f"out_dir={out_dir} holds a VAE of other images, {of_images.images}, or some were added or removed; "
                "give another out_dir, or those images"
            )
        if of_step > config.steps:
            raise UserError(
                f"steps={config.steps}, but out_dir={out_dir} has trained {of_step}; give at least steps={of_step}, or "
                "another out_dir"
            )
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        owner = take_over(run_dir)
        remove_unfinished(run_dir)
    except OSError as error:
        raise UserError(f"can't write to out_dir={out_dir}: {error.strerror or error}") from error
    return owner


def is_trained(config: TrainVAEConfig) -> bool:
    """Return whether the VAE is there, trained for as many steps."""
    out_dir = Path(config.out_dir)
    if not (out_dir / VAE_CONFIG_FILE).exists():
        return False
    record = read_record(out_dir / VAE_FILE, "remove it and run the same command again")
    return bool(record["settings"]["steps"] == config.steps)


def finish_vae(config: TrainVAEConfig, training: VAETraining, source: Source, identity: str) -> str:
    """Make the latents white, write the VAE and how good it is; return that in words. config.json comes last."""
    out_dir, device = Path(config.out_dir), training.world.device
    autoencoder = training.autoencoder.eval()
    some = np.unique(np.linspace(0, len(source) - 1, WHITENED_BY).round().astype(np.int64))
    figures = MomentSums.of(encode_images(autoencoder, read_centres(source, config, some), device).numpy()).figures()
    whiten(autoencoder, *(torch.tensor(figures[key], device=device).float() for key in ("latent_mean", "latent_std")))

    held_out = read_centres(source, config, split_held_out(len(source))[1])
    mean, log_variance = encode_images(autoencoder, held_out, device).chunk(2, dim=1)
    vae = VAE(autoencoder, str(out_dir))
    with torch.inference_mode():
        rebuilt = torch.cat([vae.decode(part.to(device)).cpu() for part in mean.split(MEASURED_AT_ONCE)])
    psnr_db = 10 * math.log10(4 / max(F.mse_loss(rebuilt.clamp(-1, 1), held_out).item(), 1e-12))
    rate = kl_divergence(mean, log_variance).mean().item() / math.log(2) / config.image_size**2
    save_pairs(held_out, rebuilt, out_dir / "reconstruction.png")
    record = {
        "images": config.images,
        "listing_sha256": identity,
        "class_names": source.class_names,
        "held_out_images": len(held_out),
        "psnr_db": round(psnr_db, 2),
        "bits_per_pixel": round(rate, 4),
        "vae_sha256": vae.weights_sha256,
        "flowar": __version__,
        "settings": dataclasses.asdict(config),
    }

    hidden = out_dir / f".{VAE_FILE}.parts"
    shutil.rmtree(hidden, ignore_errors=True)
    autoencoder.cpu().save_pretrained(hidden)
    (out_dir / VAE_CONFIG_FILE).unlink(missing_ok=True)  # of a shorter training: none of its files with one of this
    write_record(out_dir / VAE_FILE, record)
    for name in (VAE_WEIGHTS_FILE, VAE_CONFIG_FILE):
        (hidden / name).replace(out_dir / name)
    hidden.rmdir()
    return (
        f"{len(held_out)} held-out images come back with a PSNR of {psnr_db:.2f} dB, at {rate:.3g} bits per pixel "
        f"(KL); each channel of the latents has mean 0 and std 1. Look at {out_dir / 'reconstruction.png'}; use the "
        f"VAE by vae.name={out_dir}"
    )


@torch.inference_mode()
def encode_images(autoencoder: Any, images: Tensor, device: torch.device) -> Tensor:
    """Return the moments (N, 2 C, h, w) of images in [-1, 1], on the CPU."""
    parts = [autoencoder.encode(part.to(device)).latent_dist.parameters for part in images.split(MEASURED_AT_ONCE)]
    return torch.cat(parts).float().cpu()


def save_pairs(images: Tensor, rebuilt: Tensor, path: Path) -> None:
    """Write a picture of some images in [-1, 1], evenly spaced, each row of them above what comes back."""
    shown = torch.linspace(0, len(images) - 1, min(len(images), PICTURE_COLUMNS * PICTURE_ROWS)).round().long()
    images, rebuilt, rows = images[shown], rebuilt[shown], []
    for real, back in zip(images.split(PICTURE_COLUMNS), rebuilt.split(PICTURE_COLUMNS), strict=True):
        white = torch.ones(PICTURE_COLUMNS - len(real), *real.shape[1:])
        rows += [real, white, back, white]
    save_grid(to_uint8(torch.cat(rows)), path, columns=PICTURE_COLUMNS, enlarge=2)
