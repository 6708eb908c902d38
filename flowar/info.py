"""`flowar info`: parameters by part, token counts and FLOPs of a model, counted on tensors without memory."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from flowar.config import InfoConfig, ModelConfig
from flowar.flow import training_loss
from flowar.generate import is_guided_at, make_time_grid, sample_latents, scale_guidance
from flowar.model import FlowAR
from flowar.scales import num_tokens
from flowar.solvers import evaluation_times


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


@lru_cache
def count_generating_flops(config: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """Return the FLOPs of the AR Transformer for one image, and of one evaluation of the flow Transformer by scale."""
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sample_latents(model, label, time_grid=torch.tensor([1.0]))  # no step
    ar, flow = counter.get_total_flops(), []
    for index, side in enumerate(config.scales):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            tokens, semantics = (torch.empty(1, side * side, width) for width in (config.token_width, config.ar_width))
            model.flow(tokens, torch.empty(1, 1), semantics, range(index, index + 1))
        flow.append(counter.get_total_flops())
    return ar, tuple(flow)


def count_sampling_flops(
    config: ModelConfig,
    *,
    time_grid: torch.Tensor | Sequence[torch.Tensor],
    guidance: float,
    guidance_interval: tuple[float, float],
    guidance_schedule: str = "linear",
    solver: str = "euler",
) -> int:
    """Return the FLOPs of generating the latents of one image, without the VAE; arguments as `sample_latents`.

    With guidance everything runs twice.
    """
    grids = [time_grid] * len(config.scales) if isinstance(time_grid, torch.Tensor) else list(time_grid)
    times = [evaluation_times(solver, grid) for grid in grids]
    ar, flow = count_generating_flops(config)
    total = ar
    if guidance > 1 and any(is_guided_at(time, guidance_interval) for own in times for time in own):
        total *= 2
    for index, own in enumerate(times):
        weight = guidance if guidance_schedule == "constant" else scale_guidance(guidance, index, len(grids))
        for time in own:
            total += flow[index] * (2 if weight > 1 and is_guided_at(time, guidance_interval) else 1)
    return total


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
