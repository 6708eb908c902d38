"""`flowar replay`: a step that training skipped, again on one process. Read next: guard.py for what is kept of it."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flowar.checkpoint import load_state
from flowar.config import ReplayConfig, TrainConfig, load_config
from flowar.data import Batch
from flowar.distributed import pick_device
from flowar.flow import scale_losses, weigh
from flowar.guard import WEIGHTS_FOLDER, load_bundle
from flowar.model import FlowAR
from flowar.run_folder import CONFIG_FILE
from flowar.seeding import derive_seed
from flowar.step import DROPOUT_STREAM, Probe, autocast, draw


def main(config: ReplayConfig, dry_run: bool = False) -> None:
    """Repeat a skipped step on one process and print what happened then beside what happens now."""
    folder = Path(config.bundle)
    bundle = load_bundle(folder)
    training = load_config(TrainConfig, folder / CONFIG_FILE)
    print(f"step {bundle['step']} of {training.run_dir}: {bundle['problem']}; {len(bundle['labels'])} samples")
    if dry_run:
        return
    model = FlowAR(training.model).train()
    load_state({f"model.{name}": p.detach() for name, p in model.named_parameters()}, folder / WEIGHTS_FOLDER)
    model.to(pick_device(config.device))
    micro = config.micro_batch_size or training.micro_batch_size or len(bundle["labels"])
    batch = Batch(bundle["moments"], bundle["labels"], bundle["samples"])
    losses, grad_norm, probe = replay_step(model, training, batch, bundle, micro)
    console = Console()
    table = Table("what", "then", "now", title="repeated on one process")
    for side, then, now in zip(training.model.scales, bundle["losses"], losses, strict=True):
        table.add_row(f"loss at scale {side}", f"{then:.6g}", f"{now:.6g}")
    table.add_row("gradient norm", f"{bundle['grad_norm']:.6g}", f"{grad_norm:.6g}")
    console.print(table)
    blocks = Table("block", "activation then", "now", "gradient then", "now", title="largest magnitudes")
    for name, now in probe.activations.items():
        then = bundle["activations"].get(name, float("nan"))
        gradients = (bundle["gradients"].get(name, 0.0), probe.gradients.get(name, 0.0))
        blocks.add_row(name, f"{then:.4g}", f"{now:.4g}", *(f"{value:.4g}" for value in gradients))
    console.print(blocks)
    bad = [
        int(sample)
        for sample, moments in zip(bundle["samples"], bundle["moments"], strict=True)
        if not torch.isfinite(moments).all()
    ]
    if bad:
        print(f"samples with values that are not finite: {bad}")


def replay_step(
    model: FlowAR, config: TrainConfig, batch: Batch, bundle: dict[str, object], micro_batch_size: int
) -> tuple[list[float], float, Probe]:
    """Return losses per scale, gradient norm and probe of a kept step, done again on one process, in parts.

    Dropout masks are those of one process.
    """
    device = next(model.parameters()).device
    size = len(batch.labels)
    drawn = draw(batch, range(size), bundle["number"], config, bundle["latent_multiplier"])
    torch.manual_seed(derive_seed(config.seed, DROPOUT_STREAM, bundle["number"], 0))
    total = torch.zeros(len(config.model.scales), device=device)
    with Probe(model) as probe:
        for start in range(0, size, micro_batch_size):
            latents, labels, at, noise = (tensor[start : start + micro_batch_size].to(device) for tensor in drawn)
            with autocast(config, device):
                losses = scale_losses(
                    model,
                    latents,
                    labels,
                    scales=config.model.scales,
                    patch_size=config.model.patch_size,
                    time=at,
                    noise=noise,
                )
            share = len(labels) / size
            (weigh(losses, config.model.scales) * share).backward()
            total += losses.detach() * share
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return total.tolist(), norm.item(), probe


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("replay")
