"""Models from names and configs: the one place that knows which families there are. Read next: folders.py."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.config.load import did_you_mean
from flowar.config.models import ModelConfig, config_from_dict, variant_config
from flowar.models.arflow import family as arflow_family
from flowar.models.family import Family, Model
from flowar.models.flowar import family as flowar_family
from flowar.models.state_dicts import load_strictly

FAMILIES: dict[str, Family[Any, Any]] = {"flowar": flowar_family, "arflow": arflow_family}


def family_of(config: ModelConfig) -> Family[Any, Any]:
    """Return the module that answers for the family of a model."""
    return FAMILIES[config.family]


def create_model(name_or_config: str | ModelConfig, **overrides: object) -> Model:
    """Return a freshly initialised model in evaluation mode.

    Args:
        name_or_config: a row of `flowar.config.models.MODEL_VARIANTS`, for example "flowar-l", or a config.
        overrides: settings of the config to change, for example num_classes=10.

    Raises:
        UserError: if the name or an override is unknown (names the nearest one) or settings don't fit together.
    """
    config = variant_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if overrides:
        config = config_from_dict(dataclasses.asdict(config) | overrides)
    model: Model = family_of(config).create(config)
    return model


def compile_blocks(model: Model) -> None:
    """Have torch compile each block of a model, when it is first called and for the shapes that it then sees."""
    for block in family_of(model.config).blocks(model):
        block.forward = torch.compile(block.forward)


def training_loss(
    model: Model, latents: Tensor, labels: Tensor, time: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """Return the training loss of a model of any family, a float32 scalar.

    Labels are used as they are: replace some by `num_classes` first to train for guidance. K is the number of scales, L
    the tokens of all scales, S the images of a sequence.

    Args:
        model: from `create_model`, `load_model` or `convert_released`.
        latents: about unit std; FlowAR (B, C, h, w); ARFlow (B, S, C, h, w), S images of one class.
        labels: (B,) int64.
        time: in [0, 1], 1 is noise; FlowAR (B, K); ARFlow (B, S), falling along a sequence. Drawn if None.
        noise: standard normal; FlowAR (B, L, C p p); ARFlow (B, S, C, h, w). Drawn if None.

    Raises:
        ValueError: if a shape does not fit the model.
    """
    return family_of(model.config).training_loss(model, latents, labels, time, noise)


def sample_latents(model: Model, labels: Tensor, **settings: Any) -> Tensor:
    """Return generated latents (B, C, h, w), about unit std: the VAE's `decode` divides by the multiplier.

    Args:
        model: of any family, in evaluation mode.
        labels: (B,) int64 classes, on the model's device; num_classes draws from all classes.
        settings: time_grid, and if wanted guidance, guidance_interval, solver, noise, draw_noise, generator, and what
            only one family has: they are those of `sample_latents` in flowar/models/FAMILY/generate.py.

    Raises:
        ValueError: if guidance is below 1, or a shape does not fit the model.
        TypeError: if a setting is unknown to the model's family.
    """
    return family_of(model.config).sample_latents(model, labels, **settings)


def released_time_grid(num_steps: int, family: str = ModelConfig.family) -> Tensor:
    """Return the times of a family's released sampler from 1 to 0, float64.

    FlowAR: uniform for 50 steps, otherwise denser near the data, and one step less for an odd number. ARFlow: even from
    1 to 0.04, then one step to 0; the network is evaluated num_steps times.

    Raises:
        ValueError: if there are fewer than 2 steps.
        UserError: if there is no such family.
    """
    if family not in FAMILIES:
        raise UserError(f"family={family} is unknown{did_you_mean(family, FAMILIES)}")
    return FAMILIES[family].released_time_grid(num_steps)


def convert_released(state_dict: dict[str, Any], ar_heads: int | None = None) -> Model:
    """Return a model with the authors' weights, in evaluation mode; family and shape are read from the tensors.

    Args:
        state_dict: a released state dict, or a checkpoint of the authors' trainer with "model_ema" or "ema" (preferred)
            or "model" in it.
        ar_heads: heads of FlowAR's AR Transformer; read from its rotary frequencies if None.

    Raises:
        UserError: if it is of no known family, keys are missing or unknown (named), or the heads can't be told.
    """
    family = next((each for each in FAMILIES.values() if each.is_released(state_dict)), None)
    try:
        config, weights = (family or flowar_family).convert(state_dict, ar_heads)
    except UserError as error:
        also = "" if family else "; nor is it a released ARFlow, whose keys are blocks.0.attn.gt_proj.weight and others"
        raise UserError(f"{error}{also}") from error
    model = create_model(config)
    load_strictly(model, weights, "the checkpoint")
    return model
