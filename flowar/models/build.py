"""Models from names and configs: the one place that knows which families there are. Read next: folders.py."""

import dataclasses
from typing import Any

import torch

from flowar.base.errors import UserError
from flowar.config.load import load_values
from flowar.config.models import ModelConfig, variant_config
from flowar.models.family import Family, Model
from flowar.models.flowar import family as flowar_family
from flowar.models.state_dicts import load_strictly

FAMILIES: dict[str, Family[Any, Any]] = {"flowar": flowar_family}


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


def config_from_dict(settings: Any, source: str = "the model's config") -> ModelConfig:
    """Return the model's shape from `settings`, checked like a config file; without "family" it is a FlowAR's.

    Args:
        settings: what a config.json holds; its texts are taken literally, whoever wrote them.
        source: what is called wrong in errors.

    Raises:
        UserError: if it is not a JSON object, or a setting is unknown or wrong.
    """
    if not isinstance(settings, dict):
        raise UserError(
            f"{source} holds a {type(settings).__name__}, but settings of a model are needed, for example "
            '{"variant": "flowar-l"}; write it again with `flowar export` or `flowar convert`'
        )
    try:
        return load_values(ModelConfig, settings)  # type: ignore[type-abstract]  # it makes a family's
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def convert_released(state_dict: dict[str, Any], ar_heads: int | None = None) -> Model:
    """Return a model with the authors' weights, in evaluation mode; its shape is read from the tensors.

    Args:
        state_dict: a released state dict, or a checkpoint of the authors' trainer with "model_ema" (preferred) or
            "model" in it.
        ar_heads: heads of the AR Transformer; read from its rotary frequencies if None.

    Raises:
        UserError: if keys are missing or unknown (named), or the heads can't be told.
    """
    config, weights = flowar_family.convert(state_dict, ar_heads)
    model = create_model(config)
    load_strictly(model, weights, "the checkpoint")
    return model
