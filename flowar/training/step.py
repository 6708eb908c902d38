"""One step: what is drawn for a batch, and the gradients of it. Read next: models/family.py, train.py for the loop.

Everything random follows from (seed, number of the batch, place in the batch), whatever the number of processes;
dropout masks alone belong to the process.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowar.base.distributed import sum_over_ranks
from flowar.base.seeding import Stream, derive_seed, make_generator
from flowar.config.models import ModelConfig
from flowar.config.training import RecipeConfig
from flowar.latents.batches import Batch
from flowar.latents.vae import sample_posterior
from flowar.models.build import family_of
from flowar.models.family import Family, weigh
from flowar.training.engine import GradientEngine


@dataclass(frozen=True)
class StepSettings:
    """All that a step's gradients depend on beside weights and batch."""

    model: ModelConfig
    seed: int
    label_dropout: float
    precision: str
    micro_batch_size: int  # samples at once
    latent_multiplier: float  # of the shards

    @classmethod
    def of(cls, recipe: RecipeConfig, micro_batch_size: int, latent_multiplier: float) -> "StepSettings":
        """Return those of a run."""
        names = (recipe.model, recipe.seed, recipe.label_dropout, recipe.precision)
        return cls(*names, micro_batch_size, latent_multiplier)

    @property
    def family(self) -> Family[Any, Any]:
        """The model's family."""
        return family_of(self.model)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """The weights of the terms of the loss."""
        return tuple(self.family.loss_terms(self.model).values())


class TrainingInputs:
    """What a step is made of, on the CPU: latents, labels (some dropped), and what the model's family draws."""

    def __init__(self, latents: Tensor, labels: Tensor, draws: dict[str, Tensor]) -> None:
        self.latents = latents  # (B, C, h, w), about unit std
        self.labels = labels  # (B,) int64
        self.draws = draws  # (B, ...) each

    def part(self, part: slice, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return some of the samples, on a device."""
        draws = {name: tensor[part].to(device) for name, tensor in self.draws.items()}
        return self.latents[part].to(device), self.labels[part].to(device), draws


def accumulate(
    engine: GradientEngine, batch: Batch, number: int, settings: StepSettings, asked_to_stop: int = 0
) -> tuple[Tensor, int]:
    """Add up the gradients of one batch, in parts; return the terms of the loss (terms,) and the signal to stop, or 0.

    Both are the same on all ranks: the mean of their losses, and the largest signal that one of them got.

    Args:
        engine: whose gradients are filled.
        batch: this rank's samples.
        number: of the batch, from 1; what is drawn for it follows from this.
        settings: of the run.
        asked_to_stop: the signal that asked this rank to stop, or 0.
    """
    world, family, weights = engine.world, settings.family, settings.loss_weights
    first = world.rank * len(batch.labels)
    inputs = draw_training_inputs(batch, range(first, first + len(batch.labels)), number, settings)
    torch.manual_seed(derive_seed(settings.seed, Stream.DROPOUT, number, world.rank))
    parts = len(batch.labels) // settings.micro_batch_size
    sums = torch.zeros(len(weights) + world.size, device=world.device)  # the terms, and every rank's signal
    terms, signals = sums[: len(weights)], sums[len(weights) :]
    for index in range(parts):
        part = slice(index * settings.micro_batch_size, (index + 1) * settings.micro_batch_size)
        latents, labels, draws = inputs.part(part, world.device)
        with engine.part(is_last=index == parts - 1):
            with autocast(settings.precision, world.device):
                losses = family.losses(engine.forward, settings.model, latents, labels, draws)
            engine.backward(weigh(losses, weights) / parts)
        terms += losses.detach() / (parts * world.size)
    signals[world.rank] = asked_to_stop
    sum_over_ranks(sums)
    return terms, int(signals.max().item())


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the forward pass; the weights, norms, rotary angles, times and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def draw_training_inputs(batch: Batch, places: range, number: int, settings: StepSettings) -> TrainingInputs:
    """Return what a step is made of.

    Each sample's draws are a function of (seed, number of the batch, its place in the batch of all ranks).
    """
    model, family = settings.model, settings.family
    noises, dropped, draws = [], [], []
    for place in places:
        generator = make_generator(settings.seed, Stream.TRAINING_DRAW, number, place)
        noises.append(torch.randn(model.latent_shape, generator=generator))
        dropped.append(torch.rand((), generator=generator) < settings.label_dropout)
        draws.append(family.draw(model, generator))
    latents = sample_posterior(batch.moments.float(), torch.stack(noises), settings.latent_multiplier)
    labels = batch.labels.masked_fill(torch.stack(dropped), model.num_classes)
    return TrainingInputs(latents, labels, {name: torch.stack([each[name] for each in draws]) for name in draws[0]})
