"""One step: what is drawn for a batch, and the gradients of it. Read next: flow.py for the loss, train.py for the loop.

Everything random follows from (seed, number of the batch, place in the batch), whatever the number of processes;
dropout masks alone belong to the process.
"""

import contextlib

import torch
from torch import Tensor, nn

from flowar.config import TrainConfig
from flowar.data import Batch
from flowar.distributed import sum_over_ranks
from flowar.flow import sample_time, scale_losses, weigh
from flowar.parallel import Engine
from flowar.scales import num_tokens
from flowar.seeding import derive_seed
from flowar.vae import sample_posterior

DRAW_STREAM, DROPOUT_STREAM = 2, 6  # keep these seeds apart from those of the data's order


def accumulate(
    engine: Engine,
    batch: Batch,
    number: int,
    config: TrainConfig,
    *,
    micro_batch_size: int,
    latent_multiplier: float,
    asked: int = 0,
) -> tuple[Tensor, int]:
    """Add up the gradients of one batch, in parts; return the loss of each scale (K,) and the signal to stop, or 0.

    Both are the same on all ranks: the mean of their losses, and the largest signal that one of them got.

    Args:
        engine: whose gradients are filled.
        batch: this rank's samples.
        number: of the batch, from 1; what is drawn for it follows from this.
        config: of the run.
        micro_batch_size: samples at once.
        latent_multiplier: of the shards.
        asked: the signal that asked this rank to stop, or 0.
    """
    world = engine.world
    first = world.rank * len(batch.labels)
    places = range(first, first + len(batch.labels))
    drawn = draw(batch, places, number, config, latent_multiplier)
    torch.manual_seed(derive_seed(config.seed, DROPOUT_STREAM, number, world.rank))
    parts = len(batch.labels) // micro_batch_size
    losses = torch.zeros(len(config.model.scales) + world.size, device=world.device)  # and every rank's signal
    of_scales, signals = losses[: len(config.model.scales)], losses[len(config.model.scales) :]
    for index in range(parts):
        part = slice(index * micro_batch_size, (index + 1) * micro_batch_size)
        latents, labels, at, noise = (tensor[part].to(world.device) for tensor in drawn)
        with engine.part(is_last=index == parts - 1):
            with autocast(config, world.device):
                part_losses = scale_losses(
                    engine.forward,
                    latents,
                    labels,
                    scales=config.model.scales,
                    patch_size=config.model.patch_size,
                    time=at,
                    noise=noise,
                )
            engine.backward(weigh(part_losses, config.model.scales) / parts)
        of_scales += part_losses.detach() / (parts * world.size)
    signals[world.rank] = asked
    sum_over_ranks(losses)
    return of_scales, int(signals.max().item())


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of the forward pass; the weights, norms, rotary angles, times and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()


def draw(
    batch: Batch, places: range, number: int, config: TrainConfig, latent_multiplier: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a step is made of: latents, labels (some dropped), time and noise, on the CPU.

    Each sample's draws are a function of (seed, number of the batch, its place in the batch of all ranks).
    """
    model = config.model
    moments = batch.moments.float()
    noises, dropped, times, flow_noises = [], [], [], []
    for place in places:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, DRAW_STREAM, number, place))
        noises.append(torch.randn(model.latent_shape, generator=generator))
        dropped.append(torch.rand((), generator=generator) < config.label_dropout)
        times.append(sample_time(1, len(model.scales), generator)[0])
        flow_noises.append(torch.randn(num_tokens(model.scales), model.token_width, generator=generator))
    latents = sample_posterior(moments, torch.stack(noises), latent_multiplier)
    labels = batch.labels.masked_fill(torch.stack(dropped), model.num_classes)
    return latents, labels, torch.stack(times), torch.stack(flow_noises)


class Probe:
    """Largest values in and behind every block during one forward and backward pass. A context."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = {
            name: module for name, module in model.named_modules() if "blocks." in name and name.count(".") == 2
        }
        self.activations: dict[str, float] = {}
        self.gradients: dict[str, float] = {}

    def __enter__(self) -> "Probe":
        self._handles = []
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str) -> object:
        def note(module: nn.Module, inputs: object, output: Tensor | tuple) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.activations[name] = max_abs(tensor, self.activations.get(name, 0.0))
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._note_gradient(name, grad))

        return note

    def _note_gradient(self, name: str, grad: Tensor) -> None:
        self.gradients[name] = max_abs(grad, self.gradients.get(name, 0.0))


def max_abs(tensor: Tensor, before: float) -> float:
    """Return the larger of `before` and the largest magnitude in the tensor; nan if there is one."""
    found = tensor.detach().abs().amax().item()
    return before if found <= before else found


def merge_maxima(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return the maxima over several ranks; nan wins."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged.get(name, 0.0) if value <= merged.get(name, 0.0) else value
    return merged
