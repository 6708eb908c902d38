"""`flowar info`: parameters by part, token counts and FLOPs of a model, counted on tensors without memory."""

import dataclasses

from rich.console import Console
from rich.table import Table

from flowar.config.drawing import InfoConfig
from flowar.models.build import family_of
from flowar.models.costs import count_parameters, count_training_flops


def main(config: InfoConfig, dry_run: bool = False) -> None:
    """Print the tables."""
    if dry_run:
        return
    model, family, console = config.model, family_of(config.model), Console()
    parameters = Table("part", "parameters", title=f"{model.variant}: parameters")
    for name, count in count_parameters(model).items():
        parameters.add_row(name, f"{count / 1e6:,.1f} M")
    console.print(parameters)

    rows = family.token_rows(model)
    tokens = Table("part", "tokens", "attends to", title=f"{sum(count for _, count, _ in rows)} tokens")
    for name, count, attends_to in rows:
        tokens.add_row(name, f"{count}", attends_to)
    console.print(tokens)

    flops = Table("what", "GFLOPs per image", title="FLOPs of matrix products and attention, without the VAE")
    flops.add_row("training, forward and backward", f"{count_training_flops(model) / 1e9:,.1f}")
    unguided = family.sampling_flops(model, dataclasses.replace(config, guidance=1.0))
    flops.add_row(f"sampling, num_steps {config.num_steps}, guidance 1", f"{unguided / 1e9:,.1f}")
    low, high = config.guidance_interval
    guided = family.sampling_flops(model, config)
    flops.add_row(
        f"sampling, num_steps {config.num_steps}, guidance {config.guidance:g} for {low:g} <= t <= {high:g}",
        f"{guided / 1e9:,.1f}",
    )
    console.print(flops)
