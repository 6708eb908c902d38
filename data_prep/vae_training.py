"""One step of training a VAE, and the content of its checkpoints. Read next: train_vae.py, autoencoder.py."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.autoencoder import (
    Discriminator,
    Reconstruction,
    build_autoencoder,
    hinge_loss,
    kl_divergence,
    load_lpips,
)
from data_prep.training_images import ImageBatch
from flowar.base.distributed import World, sum_over_ranks
from flowar.base.errors import UserError
from flowar.base.run_folder import Progress, find_latest, optimizer_key, read_progress, weight_key
from flowar.config.tokenizing import TrainVAEConfig
from flowar.config.training import OptimConfig
from flowar.latents.vae import from_uint8
from flowar.models.folders import load_state
from flowar.training.optim import ADAM_MOMENTS, LocalAdamW, learning_rate
from flowar.training.step import autocast

WARMUP_SHARE = 0.05  # of the steps, in which the learning rate rises
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
LOSS_TERMS = ("l1", "kl", "lpips", "generator", "discriminator")  # as metrics.jsonl has them, before their weights


class VAETraining:
    """A VAE, its discriminator if it has one, and their optimizers, on this rank; every rank has a whole copy."""

    def __init__(self, config: TrainVAEConfig, world: World, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self.world = world
        torch.manual_seed(config.seed)
        if config.precision == "tf32" and world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.networks: dict[str, nn.Module] = {"vae": Reconstruction(build_autoencoder(config))}
        if config.gan_weight:
            self.networks["discriminator"] = Discriminator()
        self.lpips = load_lpips(world.device) if config.lpips_weight else None
        self.forward: dict[str, Any] = {}
        self.optimizers: dict[str, LocalAdamW] = {}
        for name, network in self.networks.items():
            network.to(world.device)
            self.forward[name] = network
            if world.size > 1:
                ids = [world.device.index] if world.device.type == "cuda" else None
                self.forward[name] = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
            parameters = dict(network.named_parameters())
            like = torch.optim.AdamW(parameters.values(), config.lr, BETAS, weight_decay=WEIGHT_DECAY)
            self.optimizers[name] = LocalAdamW(parameters, like)
        side = config.image_size // config.shape.stride
        self.latent_shape = (config.shape.channels, side, side)
        self.gan_from = math.ceil(config.gan_start * config.steps)

    @property
    def autoencoder(self) -> Any:
        """diffusers' AutoencoderKL."""
        return self.networks["vae"].autoencoder

    def step(self, batch: ImageBatch, number: int, asked_to_stop: int) -> tuple[Tensor, int]:
        """Train on one batch; return the terms of the loss, means over all ranks, and the signal to stop by, or 0.

        Args:
            batch: this rank's images.
            number: of the step, from 0.
            asked_to_stop: the signal that this rank got, or 0.

        Raises:
            UserError: if the loss is not finite.
        """
        config, device = self.config, self.world.device
        images, noise = from_uint8(batch.images.to(device)), batch.noise.to(device)
        judge = self.networks.get("discriminator") if number >= self.gan_from else None
        with autocast(config.precision, device):
            rebuilt, mean, log_variance = self.forward["vae"](images, noise)
        rebuilt, values = rebuilt.float(), images[0].numel()
        kl = kl_divergence(mean.float(), log_variance.float()).mean() / values
        terms = {"l1": F.l1_loss(rebuilt, images), "kl": kl}
        loss = terms["l1"] + config.kl_weight * kl
        if self.lpips is not None:
            terms["lpips"] = self.lpips((rebuilt + 1) * 127.5, (images + 1) * 127.5).mean()
            loss = loss + config.lpips_weight * terms["lpips"]
        if judge is not None:
            judge.requires_grad_(False)
            terms["generator"] = -judge(rebuilt).mean()
            judge.requires_grad_(True)
            loss = loss + config.gan_weight * terms["generator"]
        loss.backward()
        self._update("vae", number)
        if judge is not None:
            both = self.forward["discriminator"](torch.cat([images, rebuilt.detach()]))
            terms["discriminator"] = hinge_loss(*both.chunk(2))
            terms["discriminator"].backward()
            self._update("discriminator", number)

        numbers = torch.zeros(len(LOSS_TERMS) + self.world.size, device=device)
        for place, name in enumerate(LOSS_TERMS):
            numbers[place] = terms[name].detach() / self.world.size if name in terms else 0.0
        numbers[len(LOSS_TERMS) + self.world.rank] = asked_to_stop
        sum_over_ranks(numbers)
        found = numbers.cpu()
        if not found.isfinite().all():
            latest = find_latest(self.run_dir)
            raise UserError(
                f"the loss is not finite in step {number + 1}; run the same command with a lower lr than {config.lr:g}"
                f"{f', which resumes from {latest}' if latest else ''}"
            )
        return found[: len(LOSS_TERMS)], int(found[len(LOSS_TERMS) :].max())

    def _update(self, name: str, number: int) -> None:
        optimizer, config = self.optimizers[name], self.config
        norm = optimizer.take_gradients()
        optimizer.clip(norm, OptimConfig(max_grad_norm=config.max_grad_norm))
        warmup = max(1.0, WARMUP_SHARE * config.steps)
        optimizer.step(
            learning_rate(number + 1, num_steps=config.steps + 1, warmup_steps=warmup, lr=config.lr, min_lr=0.0)
        )

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that a run resumes with, by the names that checkpoints give them."""
        found = {}
        for network, optimizer in self.optimizers.items():
            for name, parameter in optimizer.parameters.items():
                own = f"{network}.{name}"
                found[weight_key(own)] = parameter.detach()
                found |= {optimizer_key(own, key): optimizer.moments[name][key] for key in ADAM_MOMENTS}
            found[f"optim.{network}.steps"] = optimizer.steps
        return found

    def load(self, folder: Path) -> Progress:
        """Take over a checkpoint; return how far it was.

        Raises:
            DamagedCheckpointError: on all ranks, if it is not what was written.
        """
        load_state(self.state(), folder, self.world.control)
        return read_progress(folder)


def describe_steps(config: TrainVAEConfig, sums: Tensor, step: int, steps: int, seconds: float) -> dict[str, float]:
    """Return the means over some steps as one record of metrics.jsonl."""
    terms = dict(zip(LOSS_TERMS, (sums / steps).tolist(), strict=True))
    weights = {"l1": 1.0, "kl": config.kl_weight, "lpips": config.lpips_weight, "generator": config.gan_weight}
    shown = [name for name, weight in weights.items() if weight] + ["discriminator"] * bool(config.gan_weight)
    return {
        "step": step,
        "loss": sum(weight * terms[name] for name, weight in weights.items()),
        **{f"loss/{name}": terms[name] for name in shown},
        "images_per_s": steps * config.batch_size / seconds,
        "remaining_s": (config.steps - step) * seconds / steps,
    }
