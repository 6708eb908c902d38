"""What the rest of the program asks of ARFlow: see ../family.py. Read next: linear_attention, model, loss, generate."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowar.config.drawing import DrawConfig
from flowar.config.models import ARFlowConfig
from flowar.config.training import OptimConfig
from flowar.models.arflow.generate import guidance_acts, released_time_grid, sample_latents
from flowar.models.arflow.loss import sample_times, training_loss, velocity_error
from flowar.models.arflow.model import ARFlow
from flowar.models.arflow.released import convert, is_released
from flowar.models.cards import model_card
from flowar.models.family import check_shape
from flowar.models.solvers import evaluation_times, make_time_grid

__all__ = [
    "blocks", "convert", "create", "draw", "follows_from", "generate", "is_decayed", "is_released", "loss_terms",
    "losses", "noise_shape", "part_of", "position_grids", "released_time_grid", "sample_latents", "sampling_flops",
    "token_rows", "training_loss",
]  # fmt: skip

PART_NAMES = {  # of `flowar info`, by the first part of a parameter's name
    "blocks": "blocks",
    "class_embedding": "label table",
    "patch_embedding": "patches",
    "time_embedding": "time",
    "output_modulation": "output",
    "output_projection": "output",
}


class HubARFlow(
    ARFlow,
    PyTorchModelHubMixin,
    library_name="flowar",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2501.16085",
    tags=["image-generation", "flow-matching", "autoregressive"],
):
    """ARFlow with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub."""

    def __init__(self, config: ARFlowConfig) -> None:
        super().__init__(config)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Return the README.md that huggingface_hub saves and pushes."""
        return ModelCard(model_card(self.config))


def create(config: ARFlowConfig) -> HubARFlow:
    """Return an ARFlow with fresh weights, in evaluation mode."""
    return HubARFlow(config).eval()


def blocks(model: ARFlow) -> list[nn.Module]:
    """Return the blocks of the Transformer."""
    return list(model.blocks)


def part_of(name: str) -> str:
    """Return to which part of the model a parameter belongs."""
    return PART_NAMES[name.partition(".")[0]]


def follows_from(name: str) -> Literal["classes", "positions", "latents"] | None:
    """Return what of the data a parameter's shape follows from; positions are computed."""
    if name == "class_embedding.weight":
        return "classes"
    return "latents" if name.startswith(("patch_embedding.", "output_projection.")) else None


def position_grids(config: ARFlowConfig) -> tuple[int, ...]:
    """Return no grids: no positions are learned."""
    return ()


def token_rows(config: ARFlowConfig) -> list[tuple[str, int, str]]:
    """Return the tokens of an image, and what they attend to."""
    tokens = config.tokens_per_image
    return [("one image", tokens, f"{tokens} of the image, and the memory of earlier ones")]


def is_decayed(name: str, parameter: nn.Parameter, optim: OptimConfig) -> bool:
    """Return whether weight decay acts: on all but vectors, the label table included, as the authors do."""
    return parameter.ndim > 1


def loss_terms(config: ARFlowConfig) -> dict[str, float]:
    """Return the one term of the loss."""
    return {"velocity": 1.0}


def draw(config: ARFlowConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return one sequence's times (S,), sorted, and noise (S, C, h, w)."""
    images = config.images_per_sample
    time = sample_times(1, images, generator)[0]
    return {"time": time, "noise": torch.randn(images, *config.latent_shape, generator=generator)}


def losses(
    forward: Callable[..., Any], config: ARFlowConfig, latents: Tensor, labels: Tensor, draws: dict[str, Tensor]
) -> Tensor:
    """Return the mean squared velocity error, (1,) float32, of latents (B S, C, h, w), a sequence's side by side."""
    batch, images = draws["time"].shape
    check_shape("latents", latents, (batch * images, *config.latent_shape))
    sequences = latents.unflatten(0, (batch, images))
    return velocity_error(forward, sequences, labels, time=draws["time"], noise=draws["noise"])[None]


def noise_shape(config: ARFlowConfig) -> tuple[int, ...]:
    """Return (C, h, w)."""
    return config.latent_shape


def generate(
    model: ARFlow,
    labels: Tensor,
    noise: Tensor,
    how: DrawConfig,
    step_noise: Callable[[tuple[int, ...]], Tensor],
) -> list[Tensor]:
    """Return the latents (B, C, h, w), the only stage. A guidance schedule over scales means nothing here."""
    latents = sample_latents(
        model,
        labels,
        time_grid=_time_grid(how),
        guidance=how.guidance,
        guidance_interval=how.guidance_interval,
        solver=how.solver,
        noise=noise,
        draw_noise=step_noise,
    )
    return [latents]


def sampling_flops(config: ARFlowConfig, how: DrawConfig) -> int:
    """Return the FLOPs of generating the latents of one image. Where guidance acts at all, everything runs twice."""
    times = evaluation_times(how.solver, _time_grid(how))
    halves = 2 if how.guidance > 1 and guidance_acts(times, how.guidance_interval) else 1
    first, later = count_step_flops(config)
    return halves * (first + (len(times) - 1) * later)


@lru_cache
def count_step_flops(config: ARFlowConfig) -> tuple[int, int]:
    """Return the FLOPs of the first evaluation of an image, which has no memory to read, and of each later one."""
    with torch.device("meta"):
        model = ARFlow(config).eval()
        noisy, time = torch.empty(1, 1, *config.latent_shape), torch.empty(1, 1)
        label = torch.zeros(1, dtype=torch.int64)
    counts, state = [], None
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _, state = model(noisy, time, label, state)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def _time_grid(how: DrawConfig) -> Tensor:
    """Return the grid of the one stage, which is also the last: its steps are last_scale_steps where they are given."""
    steps = how.num_steps if how.last_scale_steps is None else how.last_scale_steps
    return make_time_grid(how.time_grid, steps, how.shift, released_time_grid)
