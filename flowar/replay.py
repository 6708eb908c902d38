"""`flowar replay`: repeat a step that training skipped, on one process, with the code of training.

Read next: training/guard.py for what is kept of a skipped step, training/step.py.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowar.base.devices import pick_device
from flowar.base.distributed import World
from flowar.base.run_folder import CONFIG_FILE, weight_key
from flowar.config.load import load_described
from flowar.config.training import ReplayConfig, TrainConfig
from flowar.latents.batches import Batch
from flowar.latents.schema import LatentScale
from flowar.models.build import create_model
from flowar.models.family import Model
from flowar.models.folders import load_state
from flowar.training.guard import WEIGHTS_FOLDER, BlockMaxima, load_bundle
from flowar.training.optim import freeze_parts
from flowar.training.setup import split_batch
from flowar.training.step import StepSettings, accumulate, draw_training_inputs


class OneProcess:
    """A model whose gradients are computed by this process alone; no optimizer."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.world = World(0, 1, device, None)
        self.forward = model

    def part(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one part: nothing special."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part of the batch."""
        loss.backward()


def main(config: ReplayConfig, dry_run: bool = False) -> None:
    """Repeat a skipped step on one process, and print the numbers of then and now side by side."""
    folder = Path(config.bundle)
    bundle = load_bundle(folder)
    recipe = load_described(TrainConfig, folder / CONFIG_FILE)
    print(f"step {bundle['step']} of {recipe.run_dir}: {bundle['problem']}; {len(bundle['labels'])} samples")
    if dry_run:
        return
    model = create_model(recipe.model).train()
    freeze_parts(model, recipe.optim.frozen)
    load_state({weight_key(name): p.detach() for name, p in model.named_parameters()}, folder / WEIGHTS_FOLDER)
    device = pick_device(config.device)
    batch = Batch(bundle["moments"], bundle["labels"], bundle["samples"])
    micro = split_batch(len(batch.labels), config.micro_batch_size or recipe.micro_batch_size, 1)
    settings = StepSettings.of(recipe, micro, read_scale(bundle))
    losses, grad_norm, maxima = replay_step(model.to(device), batch, bundle["number"], settings, device)
    console = Console()
    table = Table("what", "then", "now", title="repeated on one process")
    terms = settings.family.loss_terms(settings.model)
    for name, then, now in zip(terms, bundle["losses"], losses, strict=True):
        table.add_row(f"loss: {name.replace('_', ' ')}", f"{then:.6g}", f"{now:.6g}")
    table.add_row("gradient norm", f"{bundle['grad_norm']:.6g}", f"{grad_norm:.6g}")
    console.print(table)
    blocks = Table("block", "activation then", "now", "gradient then", "now", title="largest magnitudes")
    for name, now in maxima.activations.items():
        then = bundle["activations"].get(name, float("nan"))
        gradients = (bundle["gradients"].get(name, 0.0), maxima.gradients.get(name, 0.0))
        blocks.add_row(name, f"{then:.4g}", f"{now:.4g}", *(f"{value:.4g}" for value in gradients))
    console.print(blocks)
    bad = [
        int(sample)
        for sample, moments in zip(bundle["samples"], bundle["moments"], strict=True)
        if not torch.isfinite(moments).all()
    ]
    if bad:
        print(f"samples with values that are not finite: {bad}")


def read_scale(bundle: dict[str, Any]) -> LatentScale | float:
    """Return what scaled the latents of a kept step to unit std; version 0.1 had one number."""
    if "latent_multiplier" in bundle:
        return float(bundle["latent_multiplier"])
    scale = bundle["latent_scale"]
    if not isinstance(scale, list):
        return float(scale)
    multiplier, shift = (tuple(value) if isinstance(value, list) else float(value) for value in scale)
    return LatentScale(multiplier, shift)


def replay_step(
    model: Model, batch: Batch, number: int, settings: StepSettings, device: torch.device
) -> tuple[list[float], float, BlockMaxima]:
    """Return the terms of the loss, gradient norm and maxima of a kept step, repeated on one process.

    Dropout masks are those of a single-process run.
    """
    with BlockMaxima(model) as maxima:
        losses = accumulate(OneProcess(model, device), draw_training_inputs(batch, number, settings), settings)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return losses.tolist(), norm.item(), maxima
