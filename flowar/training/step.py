"""One step: what is drawn for a batch, and its gradients. Read next: models/family.py, train.py for the loop.

Everything random follows from (seed, number of the batch, place in the batch), whatever the number of processes; only
dropout masks depend on the process.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowar.base.distributed import sum_over_ranks
from flowar.base.seeding import Stream, derive_seed, make_generator
from flowar.config.models import ModelConfig
from flowar.config.training import RecipeConfig
from flowar.latents.batches import Batch
from flowar.latents.schema import LatentScale
from flowar.latents.vae import sample_posterior
from flowar.models.build import family_of
from flowar.models.family import Family, weigh
from flowar.training.engine import Engine, GradientEngine


@dataclass(frozen=True)
class StepSettings:
    """All that a step's gradients depend on, apart from weights and batch."""

    model: ModelConfig
    seed: int
    label_dropout: float
    precision: str
    micro_batch_size: int  # samples at once
    latent_scale: LatentScale | float  # of the shards, or a multiplier alone
    _weights: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, recipe: RecipeConfig, micro_batch_size: int, latent_scale: LatentScale | float) -> "StepSettings":
        """Return the step settings of a run."""
        names = (recipe.model, recipe.seed, recipe.label_dropout, recipe.precision)
        return cls(*names, micro_batch_size, latent_scale)

    @property
    def family(self) -> Family[Any, Any]:
        """The model's family."""
        return family_of(self.model)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """The weights of the terms of the loss."""
        return tuple(self.family.loss_terms(self.model).values())

    def weights_on(self, device: torch.device) -> Tensor:
        """Return the weights of the terms of the loss, on a device; copied once, as the host waits for the copy."""
        if device not in self._weights:
            self._weights[device] = torch.tensor(self.loss_weights, device=device)
        return self._weights[device]


class TrainingInputs(NamedTuple):
    """The inputs of a step, on the CPU: latents, labels (some dropped), and what the model's family draws."""

    number: int  # of the batch, from 1; all that is drawn follows from this
    batch: Batch  # this rank's samples, as they were read
    latents: Tensor  # (B n, C, h, w), about unit std; n is the model's images_per_sample
    labels: Tensor  # (B,) int64
    draws: dict[str, Tensor]  # (B, ...) each

    def part(self, part: slice, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return some of the samples, on a device; with pinned memory the host doesn't wait for the copy."""
        draws = {name: tensor[part].to(device, non_blocking=True) for name, tensor in self.draws.items()}
        latents = self.latents.unflatten(0, (len(self.labels), -1))[part].flatten(0, 1)
        return latents.to(device, non_blocking=True), self.labels[part].to(device, non_blocking=True), draws


class StepNumbers(NamedTuple):
    """What the host learns about a step's gradients, the same on all ranks."""

    loss: float
    losses: list[float]  # its terms, means over the batch of all ranks
    grad_norm: float  # before clipping
    asked_to_stop: int  # the largest signal that one of the ranks got, or 0


def accumulate(engine: GradientEngine, inputs: TrainingInputs, settings: StepSettings) -> Tensor:
    """Add up the gradients of one batch, in parts; return this rank's share of the terms of the loss, (terms,).

    The sum of all ranks' shares is the mean over the batch.

    Args:
        engine: collects the gradients.
        inputs: this rank's samples.
        settings: of the run.
    """
    world, family, weights = engine.world, settings.family, settings.weights_on(engine.world.device)
    torch.manual_seed(derive_seed(settings.seed, Stream.DROPOUT, inputs.number, world.rank))
    parts = len(inputs.labels) // settings.micro_batch_size
    terms = torch.zeros(len(weights), device=world.device)
    for index in range(parts):
        part = slice(index * settings.micro_batch_size, (index + 1) * settings.micro_batch_size)
        latents, labels, draws = inputs.part(part, world.device)
        with engine.part(is_last=index == parts - 1):
            with autocast(settings.precision, world.device):
                losses = family.losses(engine.forward, settings.model, latents, labels, draws)
            engine.backward(weigh(losses, weights) / parts)
        terms += losses.detach() / (parts * world.size)
    return terms


@torch.no_grad()
def agree(engine: Engine, terms: Tensor, settings: StepSettings, asked_to_stop: int = 0) -> StepNumbers:
    """Clip the gradients by their norm over all ranks, and return the numbers that `Guard` and the log need.

    One sum over all ranks, and the only time in a step when the host reads from the device and so waits for it.

    Args:
        engine: with the gradients of a batch.
        terms: this rank's share of the terms of the loss.
        settings: of the run.
        asked_to_stop: the signal that asked this rank to stop, or 0.
    """
    world, count = engine.world, len(terms)
    sums = torch.zeros(count + 1 + world.size, dtype=torch.float64, device=world.device)
    sums[:count] = terms
    sums[count] = engine.norm_share()
    sums[count + 1 + world.rank] = asked_to_stop
    sum_over_ranks(sums)
    losses, norm = sums[:count].float(), sums[count].sqrt().float()
    engine.clip(norm)
    loss = weigh(losses, settings.weights_on(world.device))
    found = torch.cat([losses, torch.stack([loss, norm, sums[count + 1 :].amax().float()])])
    *each, total, grad_norm, signal = read_numbers(found)
    return StepNumbers(total, each, grad_norm, int(signal))


def read_numbers(values: Tensor) -> list[float]:
    """Return the values (n,) of a tensor on the device; waits until the device has finished its queued work."""
    numbers: list[float] = values.tolist()
    return numbers


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of the forward pass; the weights, norms, rotary angles, times and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def draw_training_inputs(batch: Batch, number: int, settings: StepSettings, rank: int = 0) -> TrainingInputs:
    """Return the inputs of a step.

    Each sample's draws are a function of (seed, number of the batch, its place in the batch of all ranks).

    Args:
        batch: the samples of one rank; moments of (B n) images, a sample's n = images_per_sample side by side.
        number: of the batch, from 1.
        settings: of the run.
        rank: that the samples belong to; all ranks have the same number.
    """
    model, family = settings.model, settings.family
    size, images = len(batch.labels), model.images_per_sample
    if len(batch.moments) != size * images:
        raise ValueError(
            f"a batch of {size} samples holds {len(batch.moments)} images, but model.images_per_sample={images} needs "
            f"{size * images}"
        )
    noises, dropped, draws = [], [], []
    for place in range(rank * size, (rank + 1) * size):
        generator = make_generator(settings.seed, Stream.TRAINING_DRAW, number, place)
        noises.append(torch.randn(images, *model.latent_shape, generator=generator))
        dropped.append(torch.rand((), generator=generator) < settings.label_dropout)
        draws.append(family.draw(model, generator))
    latents = sample_posterior(batch.moments.float(), torch.cat(noises), settings.latent_scale)
    labels = batch.labels.masked_fill(torch.stack(dropped), model.num_classes)
    stacked = {name: torch.stack([each[name] for each in draws]) for name in draws[0]}
    return TrainingInputs(number, batch, latents, labels, stacked)


def drawn_bytes(settings: StepSettings) -> int:
    """Return the memory that one sample's draws take on top of its row, in bytes."""
    channels, *sides = settings.model.latent_shape
    shape = (settings.model.images_per_sample, 2 * channels, *sides)
    nothing = torch.zeros(1, dtype=torch.int64)
    inputs = draw_training_inputs(Batch(torch.zeros(shape), nothing, nothing), 1, settings)
    return sum(tensor.nbytes for tensor in (inputs.latents, inputs.labels, *inputs.draws.values()))
