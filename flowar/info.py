"""`flowar info`: parameters by part, token counts and FLOPs of a model, counted on tensors without memory."""

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from flowar.config import InfoConfig, ModelConfig
from flowar.flow import training_loss
from flowar.generate import find_guided_times, make_time_grid, sample_latents
from flowar.model import FlowAR
from flowar.scales import num_tokens


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the model, and in total."""
    with torch.device("meta"):
        model = FlowAR(config)
    parts = {
        "AR: label table": model.ar.class_embedding,
        "AR: blocks": torch.nn.ModuleList([model.ar.lower_blocks, model.ar.upper_blocks]),
        "flow: blocks": model.flow.blocks,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for name, part in (("AR", model.ar), ("flow", model.flow)):
        own = sum(p.numel() for p in part.parameters())
        counts[f"{name}: rest"] = own - sum(count for key, count in counts.items() if key.startswith(f"{name}:"))
    return {**dict(sorted(counts.items())), "total": sum(counts.values())}


def count_training_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one image's forward and backward pass (matrix products and attention; multiply-add is 2)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = FlowAR(config).eval()
        latents = torch.empty(1, *config.latent_shape)
        training_loss(model, latents, torch.zeros(1, dtype=torch.int64)).backward()
    return counter.get_total_flops()


def count_sampling_flops(
    config: ModelConfig, *, time_grid: torch.Tensor, guidance: float, guidance_interval: tuple[float, float]
) -> int:
    """Return the FLOPs of generating the latents of one image, without the VAE.

    All steps with guidance cost the same, and so do all steps without it: one of each kind is counted.
    """
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)

    def count(*grid: float, guidance: float = 1.0) -> int:
        with FlopCounterMode(display=False) as counter:
            sample_latents(model, label, time_grid=torch.tensor(grid, dtype=torch.float64), guidance=guidance)
        return counter.get_total_flops()

    num_guided = len(find_guided_times(time_grid, guidance_interval)) if guidance > 1 else 0
    num_free = len(time_grid) - 1 - num_guided
    no_step = count(1.0)
    free_step = count(1.0, 0.0) - no_step
    if not num_guided:
        return no_step + num_free * free_step
    one_guided = count(1.0, 0.0, guidance=guidance)
    guided_step = count(1.0, 0.5, 0.0, guidance=guidance) - one_guided
    return one_guided + (num_guided - 1) * guided_step + num_free * free_step


def main(config: InfoConfig, dry_run: bool = False) -> None:
    """Print the tables."""
    model = config.model
    if dry_run:
        return
    console = Console()
    parameters = Table("part", "parameters", title=f"{model.variant}: parameters")
    for name, count in count_parameters(model).items():
        parameters.add_row(name, f"{count / 1e6:,.1f} M")
    console.print(parameters)

    tokens = Table(
        "scale", "tokens", "attends to", title=f"{num_tokens(model.scales)} tokens of {model.token_width} channels"
    )
    seen = 0
    for side in model.scales:
        seen += side * side
        tokens.add_row(f"{side} x {side}", f"{side * side}", f"{seen} (AR), {side * side} (flow)")
    console.print(tokens)

    time_grid = make_time_grid(config.time_grid, config.num_steps)
    sampling = {"time_grid": time_grid, "guidance_interval": config.guidance_interval}
    flops = Table("what", "GFLOPs per image", title="FLOPs of matrix products and attention, without the VAE")
    flops.add_row("training, forward and backward", f"{count_training_flops(model) / 1e9:,.1f}")
    unguided = count_sampling_flops(model, guidance=1.0, **sampling)
    guided = count_sampling_flops(model, guidance=config.guidance, **sampling)
    steps = len(time_grid) - 1
    flops.add_row(f"sampling, {steps} steps, guidance 1", f"{unguided / 1e9:,.1f}")
    low, high = config.guidance_interval
    flops.add_row(
        f"sampling, {steps} steps, guidance {config.guidance:g} for {low:g} <= t <= {high:g}", f"{guided / 1e9:,.1f}"
    )
    console.print(flops)


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("info")
