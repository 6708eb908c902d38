"""What the rest of the program asks of FlowAR: see ../family.py. Read next: scales, model, loss, generate."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowar.config.drawing import DrawConfig
from flowar.config.models import FlowARConfig
from flowar.config.training import OptimConfig
from flowar.models.cards import model_card
from flowar.models.flowar.generate import Guidance, make_time_grids, sample_latents, sample_token_maps
from flowar.models.flowar.loss import sample_time, scale_losses, scale_weights, training_loss
from flowar.models.flowar.model import FlowAR
from flowar.models.flowar.released import convert, is_released
from flowar.models.flowar.scales import num_tokens
from flowar.models.solvers import evaluation_times
from flowar.models.solvers import two_part_time_grid as released_time_grid

__all__ = [
    "blocks", "convert", "create", "draw", "follows_from", "generate", "is_decayed", "is_released", "loss_terms",
    "losses", "noise_shape", "part_of", "position_grids", "released_time_grid", "sample_latents", "sampling_flops",
    "token_rows", "training_loss",
]  # fmt: skip

PARTS = (  # of `flowar info`: the first whose prefix a parameter's name has
    ("ar.class_embedding.", "AR: label table"),
    ("ar.lower_blocks.", "AR: blocks"),
    ("ar.upper_blocks.", "AR: blocks"),
    ("ar.", "AR: rest"),
    ("flow.blocks.", "flow: blocks"),
    ("flow.", "flow: rest"),
)


class HubFlowAR(
    FlowAR,
    PyTorchModelHubMixin,
    library_name="flowar",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2412.15205",
    tags=["image-generation", "flow-matching", "autoregressive"],
):
    """FlowAR with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__(config)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Return the README.md that huggingface_hub saves and pushes."""
        return ModelCard(model_card(self.config))


def create(config: FlowARConfig) -> HubFlowAR:
    """Return a FlowAR with fresh weights, in evaluation mode."""
    return HubFlowAR(config).eval()


def blocks(model: FlowAR) -> list[nn.Module]:
    """Return the blocks of both Transformers."""
    return [*model.ar.lower_blocks, *model.ar.upper_blocks, *model.flow.blocks]


def part_of(name: str) -> str:
    """Return to which part of the model a parameter belongs."""
    return next(part for prefix, part in PARTS if name.startswith(prefix))


def follows_from(name: str) -> Literal["classes", "positions", "latents"] | None:
    """Return what of the data a parameter's shape follows from."""
    if name == "ar.class_embedding.weight":
        return "classes"
    if name in ("ar.lower_position", "ar.upper_position", "ar.output_position"):
        return "positions"
    is_projection = name.startswith(("ar.input_projection.", "flow.input_projection.", "flow.output_projection."))
    return "latents" if is_projection else None


def position_grids(config: FlowARConfig) -> tuple[int, ...]:
    """Return the sides of all scales."""
    return config.scales


def token_rows(config: FlowARConfig) -> list[tuple[str, int, str]]:
    """Return each scale, its tokens, and how many these attend to."""
    rows, seen = [], 0
    for side in config.scales:
        seen += side * side
        rows.append((f"{side} x {side}", side * side, f"{seen} (AR), {side * side} (flow)"))
    return rows


def is_decayed(name: str, parameter: nn.Parameter, optim: OptimConfig) -> bool:
    """Return whether weight decay acts: on matrices and tables, not on biases and norm weights, as the authors do."""
    return parameter.ndim > 1 and (optim.decay_flow or not name.startswith("flow."))


def loss_terms(config: FlowARConfig) -> dict[str, float]:
    """Return a term for each scale, weighted by its share of the finest scale's tokens."""
    weights = scale_weights(config.scales)
    return {f"scale_{side}": weight for side, weight in zip(config.scales, weights, strict=True)}


def draw(config: FlowARConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return one sample's time (K,) and noise (L, C p p)."""
    time = sample_time(1, len(config.scales), generator)[0]
    return {"time": time, "noise": torch.randn(noise_shape(config), generator=generator)}


def losses(
    forward: Callable[..., Any], config: FlowARConfig, latents: Tensor, labels: Tensor, draws: dict[str, Tensor]
) -> Tensor:
    """Return the mean squared velocity error of each scale, (K,) float32."""
    return scale_losses(forward, config, latents, labels, time=draws["time"], noise=draws["noise"])


def noise_shape(config: FlowARConfig) -> tuple[int, ...]:
    """Return (L, C p p): the tokens of all scales."""
    return (num_tokens(config.scales), config.token_width)


def generate(
    model: FlowAR,
    labels: Tensor,
    noise: Tensor,
    how: DrawConfig,
    step_noise: Callable[[tuple[int, ...]], Tensor],
) -> list[Tensor]:
    """Return the map of every scale, (B, C, side p, side p) coarse to fine; the last are the latents."""
    return sample_token_maps(
        model,
        labels,
        noise=noise,
        time_grids=make_time_grids(how, len(model.config.scales)),
        guidance=_guidance(how),
        solver=how.solver,
        draw_noise=step_noise,
    )


def sampling_flops(config: FlowARConfig, how: DrawConfig) -> int:
    """Return the FLOPs of generating the latents of one image alone. Where guidance acts everything runs twice."""
    grids, guidance = make_time_grids(how, len(config.scales)), _guidance(how)
    flops = count_generating_flops(config)
    acts = guidance.acts_in(how.solver, grids)
    times = [evaluation_times(how.solver, grid) for grid in grids]
    total = (2 if acts else 1) * flops.ar + len({time for of_scale in times for time in of_scale}) * flops.time
    for index, of_scale in enumerate(times):
        is_guided = acts and guidance.at_scale(index, len(grids)) > 1
        total += (2 if is_guided else 1) * flops.semantics[index]
        for time in of_scale:
            total += flops.step[index] * (2 if is_guided and guidance.acts_at(time) else 1)
    return total


class GeneratingFlops(NamedTuple):
    """FLOPs of the parts of generating one image's latents."""

    ar: int  # of the AR Transformer
    time: int  # of what the flow Transformer makes of one time
    semantics: tuple[int, ...]  # of what it makes of the semantics of a scale, once
    step: tuple[int, ...]  # of one of its evaluations, by scale


@lru_cache
def count_generating_flops(config: FlowARConfig) -> GeneratingFlops:
    """Return the FLOPs of the parts of generating one image's latents."""
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)

    def count(work: Callable[[], Any]) -> tuple[Any, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = work()
        return result, counter.get_total_flops()

    _, everything = count(lambda: sample_latents(model, label, time_grid=torch.tensor([1.0])))  # no step
    (modulations,), time = count(lambda: model.flow.modulations([0.0]))
    semantics, step = [], []
    for index, side in enumerate(config.scales):
        span = range(index, index + 1)
        with torch.device("meta"):
            tokens, given = (torch.empty(1, side * side, width) for width in (config.token_width, config.ar_width))
        prepared, flops = count(partial(model.flow.prepare, given, span))
        semantics.append(flops)
        step.append(count(partial(model.flow.step, tokens, modulations, prepared, span))[1])
    return GeneratingFlops(everything - sum(semantics), time, tuple(semantics), tuple(step))


def _guidance(how: DrawConfig) -> Guidance:
    return Guidance(how.guidance, how.guidance_interval, how.guidance_schedule)
