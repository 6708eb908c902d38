"""`flowar train`: the loop, read top to bottom. Read next: flow.py for the loss, data.py for the order of the samples.

Everything random in a step follows from (seed, step) alone, and so does the learning rate: a run that was killed and
started again gives the same weights, on a CPU bit for bit (on a GPU some kernels add up in an order of their own).
"""

import contextlib
import copy
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from data_prep.schema import Passport, read_passport, write_passport
from flowar.checkpoint import load_checkpoint, remove_unfinished, save_checkpoint
from flowar.config import FREE_ON_RESUME, ModelConfig, TrainConfig, changed_settings, describe_config, load_config
from flowar.data import Batch, check_fits, check_same_vae, read_batches
from flowar.distributed import pick_device, refuse_many_processes
from flowar.ema import EMA
from flowar.errors import UserError
from flowar.files import write_text
from flowar.flow import released_time_grid, sample_time, scale_losses, weigh
from flowar.layers import import_flash_attention
from flowar.model import FlowAR
from flowar.optim import learning_rate, make_optimizer, set_learning_rate
from flowar.pictures import save_grid
from flowar.report import TrainingReport
from flowar.run_folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, find_latest
from flowar.sample import draw_noise, sample_latents
from flowar.scales import num_tokens
from flowar.seeding import derive_seed
from flowar.shards import LatentShards
from flowar.vae import VAE, load_vae, sample_posterior, to_uint8
from flowar.weights import create_model

FREE_IN_PASSPORT = ("images", "encoded_with")  # where and on what the shards were made; their hashes say what they are
DRAW_STREAM = 2  # keeps the seeds of the steps' draws apart from those of the data's order


def main(config: TrainConfig, dry_run: bool = False) -> None:
    """Train, or go on training, the run in `run_dir`."""
    # Check what can be known before anything is built.
    refuse_many_processes("train")
    run_dir = Path(config.run_dir)
    device = pick_device(config.device)
    if config.attention == "flash":
        import_flash_attention()
        if device.type != "cuda":
            raise UserError(f"attention=flash needs a GPU, but device is {device}; set attention=sdpa")
    shards = LatentShards(config.data)
    passport = shards.passport
    check_fits(passport, config.model, config.data.path)
    num_steps = math.ceil(config.epochs * passport.num_images / config.batch_size)
    warmup_steps = config.optim.warmup_epochs * passport.num_images / config.batch_size
    in_parts = f" (in parts of {config.micro_batch_size})" if config.micro_batch_size else ""
    print(
        f"{passport.num_images:,} images / batch of {config.batch_size:,}{in_parts} = "
        f"{passport.num_images / config.batch_size:,.1f} steps per epoch; {config.epochs:g} epochs = {num_steps:,} "
        f"steps, {warmup_steps:,.0f} of them warm-up; {device}, {config.precision}, attention {config.attention}"
    )
    check_resumable(run_dir, config, passport)
    vae = load_vae(config.vae.name, config.vae.weights) if config.preview.every_steps else None
    if vae is not None:
        check_same_vae(passport, vae, config.data.path)
    elif passport.vae_name != config.vae.name:  # without previews the VAE isn't loaded, its weights may not be here
        raise UserError(
            f"data.path={config.data.path} was made with VAE {passport.vae_name}, but vae.name={config.vae.name}; set "
            f"vae.name={passport.vae_name}, or use other shards"
        )
    if dry_run:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FlowAR(config.model).parameters())
        print(f"{config.model.variant}: {parameters / 1e6:.1f} M parameters; dry run, nothing was written")
        return

    # Set up.
    prepare_run_dir(run_dir, config, passport)
    if config.precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    model = create_model(config.model).to(device).train()
    model.set_attention(config.attention)
    ema = EMA(model, config.ema_decay)
    optimizer = make_optimizer(model, config.optim)

    # Resume.
    first_step = 0
    latest = find_latest(run_dir)
    if latest is not None:
        first_step = load_checkpoint(latest, model, ema, optimizer)
        print(f"resuming from {latest}")
    batches = read_batches(
        shards,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=range(first_step, num_steps),
    )

    # Loop: step counts finished steps.
    settings = dataclasses.asdict(config)
    with TrainingReport(run_dir, config.wandb, settings, first_step=first_step, num_steps=num_steps) as report:
        interval = Interval(first_step, len(config.model.scales), device)
        for step, batch in enumerate(batches, start=first_step + 1):
            interval.data_arrived()
            lr = learning_rate(
                step - 1, num_steps=num_steps, warmup_steps=warmup_steps, lr=config.optim.lr, min_lr=config.optim.min_lr
            )
            set_learning_rate(optimizer, lr)
            losses, grad_norm = train_step(model, optimizer, batch, step, config, passport.latent_multiplier, device)
            ema.update(model)
            interval.add(losses, grad_norm)
            report.advance(step)
            if step % config.log_every_steps == 0 or step == num_steps:
                report.log(interval.record(step, num_steps, lr, config))
                interval = Interval(step, len(config.model.scales), device)
            if step % config.save_every_steps == 0 or step == num_steps:
                save_checkpoint(run_dir, step, model, ema, optimizer, passport=passport, keep=config.keep_checkpoints)
            if vae is not None and (step % config.preview.every_steps == 0 or step == num_steps):
                path = run_dir / "previews" / f"step_{step:08d}.png"
                save_preview(model, ema, vae.to(device), config, path)
                report.log_image("preview", path, step)
            interval.step_ended()
    print(f"finished {num_steps:,} steps; weights in {find_latest(run_dir)}, metrics in {run_dir / METRICS_FILE}")


def train_step(
    model: FlowAR,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
    latent_multiplier: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Do one optimizer step; return the loss of each scale (K,) and the gradient's norm before clipping.

    Raises:
        UserError: if the loss or the gradient is not finite; the weights are then as before the step.
    """
    torch.manual_seed(derive_seed(config.seed, DRAW_STREAM, step))  # for the draws below and for dropout
    latents, labels, at, noise = draw(batch, config.model, config.label_dropout, latent_multiplier, device)
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()
    micro = config.micro_batch_size or len(labels)
    losses = torch.zeros(len(config.model.scales), device=device)
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(labels), micro):
        part = slice(start, start + micro)
        with autocast:
            part_losses = scale_losses(
                model,
                latents[part],
                labels[part],
                scales=config.model.scales,
                patch_size=config.model.patch_size,
                time=at[part],
                noise=noise[part],
            )
        share = micro / len(labels)
        (weigh(part_losses, config.model.scales) * share).backward()
        losses += part_losses.detach() * share
    loss = weigh(losses, config.model.scales)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    if not torch.isfinite(loss + grad_norm):
        by_scale = dict(zip(config.model.scales, losses.tolist(), strict=True))
        raise UserError(
            f"loss is {loss.item()} and gradient norm {grad_norm.item()} at step {step}; losses by scale: {by_scale}; "
            f"samples: {batch.samples.tolist()}; newest checkpoint: {find_latest(config.run_dir)}; going on from "
            "there with a lower optim.lr or precision=tf32 may help"
        )
    optimizer.step()
    return losses, grad_norm.detach()


def draw(
    batch: Batch, model: ModelConfig, label_dropout: float, latent_multiplier: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a step is made of: latents, labels (some dropped), time and noise, all on `device`.

    Drawn on the CPU, so that a run doesn't depend on the kind of device.
    """
    moments = batch.moments.float()
    size = len(moments)
    latents = sample_posterior(moments, torch.randn_like(moments.chunk(2, dim=1)[0]), latent_multiplier)
    dropped = torch.rand(size) < label_dropout
    labels = batch.labels.masked_fill(dropped, model.num_classes)
    at = sample_time(size, len(model.scales))
    noise = torch.randn(size, num_tokens(model.scales), model.token_width)
    return latents.to(device), labels.to(device), at.to(device), noise.to(device)


class Interval:
    """Sums and times of the steps since the last log record."""

    def __init__(self, step: int, num_scales: int, device: torch.device) -> None:
        self.first_step = step
        self.losses = torch.zeros(num_scales, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.started = self.waiting_since = time.perf_counter()
        self.data_wait_s = 0.0

    def data_arrived(self) -> None:
        """Note that the wait for the next batch is over."""
        self.data_wait_s += time.perf_counter() - self.waiting_since

    def step_ended(self) -> None:
        """Note that the wait for the next batch begins."""
        self.waiting_since = time.perf_counter()

    def add(self, losses: Tensor, grad_norm: Tensor) -> None:
        """Add one step; nothing is read back from the device."""
        self.losses += losses
        self.grad_norm += grad_norm

    def record(self, step: int, num_steps: int, lr: float, config: TrainConfig) -> dict[str, float]:
        """Return the means over the interval, speeds and the time that is left, as one record of metrics.jsonl."""
        steps = step - self.first_step
        losses = self.losses / steps
        elapsed_s = time.perf_counter() - self.started
        by_scale = {f"loss/scale_{side}": loss for side, loss in zip(config.model.scales, losses.tolist(), strict=True)}
        return {
            "step": step,
            "loss": weigh(losses, config.model.scales).item(),
            **by_scale,
            "grad_norm": (self.grad_norm / steps).item(),
            "lr": lr,
            "images_per_s": steps * config.batch_size / elapsed_s,
            "data_wait_share": self.data_wait_s / elapsed_s,
            "remaining_s": (num_steps - step) * elapsed_s / steps,
        }


def check_resumable(run_dir: Path, config: TrainConfig, passport: Passport) -> None:
    """Raise a UserError if `run_dir` holds a run with other settings or other data, naming what differs."""
    if not (run_dir / CONFIG_FILE).exists():
        return
    before = load_config(TrainConfig, run_dir / CONFIG_FILE)
    changed = changed_settings(before, config)
    free = {key for key in changed if any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)}
    for key in sorted(free):
        old, new = changed.pop(key)
        print(f"{key} was {old}, now {new}")
    if changed:
        listed = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())
        raise UserError(f"run_dir={run_dir} holds another run: {listed}; give another run_dir, or the same settings")
    recorded = dataclasses.asdict(read_passport(run_dir))
    found = dataclasses.asdict(passport)
    differing = [key for key in found if key not in FREE_IN_PASSPORT and recorded[key] != found[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"run_dir={run_dir} was trained on other shards: {key} was {str(recorded[key])[:40]}, data.path="
            f"{config.data.path} has {str(found[key])[:40]}; give another run_dir, or those shards"
        )


def prepare_run_dir(run_dir: Path, config: TrainConfig, passport: Passport) -> None:
    """Make the folder, write the resolved config and the data's passport, remove what a killed process left."""
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        remove_unfinished(run_dir)
        write_passport(passport, run_dir)
        write_text(run_dir / CONFIG_FILE, describe_config(config))
    except OSError as error:
        raise UserError(f"can't write to run_dir={run_dir}: {error.strerror or error}") from error


def save_preview(model: FlowAR, ema: EMA, vae: VAE, config: TrainConfig, path: Path) -> None:
    """Write a grid of images drawn with the averaged weights; always the same noise, classes in turn."""
    averaged = copy.deepcopy(model).eval()
    averaged.set_attention("sdpa")  # flash-attn has no float32
    ema.copy_to(averaged)
    device = next(model.parameters()).device
    preview = config.preview
    labels = torch.arange(preview.num_images) % config.model.num_classes
    noise = draw_noise(config.model, range(preview.num_images), config.seed)
    latents = sample_latents(
        averaged,
        labels.to(device),
        time_grid=released_time_grid(preview.num_steps),
        guidance=preview.guidance,
        guidance_interval=preview.guidance_interval,
        noise=noise.to(device),
    )
    with torch.inference_mode():
        images = to_uint8(vae.decode(latents))
    save_grid(images, path, columns=min(10, config.model.num_classes))


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("train")
