"""A second family of models, for tests only: a linear velocity on whole latents. The surface is all that it meets."""

import sys
from dataclasses import dataclass

import torch
from torch import nn

from flowar.config.models import MODEL_CONFIGS, ModelConfig
from flowar.models.build import FAMILIES
from flowar.models.solvers import make_time_grid, solve


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ModelConfig):
    """Shape of one linear model."""

    family: str = "linear"
    variant: str = "custom"
    side: int = 8
    depth: int = 2

    @property
    def latent_size(self) -> int:
        return self.side


class Linear(nn.Module):
    """Latents, time and class -> velocity."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.latent_channels * config.side**2
        self.classes = nn.Embedding(config.num_classes + 1, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))

    def forward(self, noisy, time, labels):
        tokens = noisy.flatten(1) + time[:, None] * self.classes(labels)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.view_as(noisy)


def create(config):
    return Linear(config).eval()


def blocks(model):
    return list(model.layers)


def part_of(name):
    return name.split(".")[0]


def follows_from(name):
    return None


def position_grids(config):
    return ()


def token_rows(config):
    return [("latents", 1, "itself")]


def is_decayed(name, parameter, optim):
    return parameter.ndim > 1


def loss_terms(config):
    return {"velocity": 1.0}


def draw(config, generator):
    return {
        "time": torch.rand((), generator=generator),
        "noise": torch.randn(config.latent_shape, generator=generator),
    }


def losses(forward, config, latents, labels, draws):
    time = draws["time"][:, None, None, None]
    predicted = forward((1 - time) * latents + time * draws["noise"], draws["time"], labels)
    return (predicted.float() - (draws["noise"] - latents)).square().mean()[None]


def noise_shape(config):
    return config.latent_shape


@torch.no_grad()
def generate(model, labels, noise, how, step_noise):
    def velocity(state, time):
        return model(state, torch.full((len(state),), time, device=state.device), labels)

    return [solve(how.solver, velocity, noise, make_time_grid(how.time_grid, how.num_steps, how.shift))]


def sampling_flops(config, how):
    return 2 * how.num_steps * config.depth * (config.latent_channels * config.side**2) ** 2


def is_released(state_dict):
    return False


def convert(state_dict, ar_heads):
    raise ValueError("nobody has released one")


MODEL_CONFIGS["linear"] = LinearConfig
FAMILIES["linear"] = sys.modules[__name__]
