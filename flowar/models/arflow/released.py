"""The authors' checkpoints: their names, and how they become ours. The only place where the released names appear."""

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.config.models import CUSTOM_VARIANT, MODEL_VARIANTS, ARFlowConfig
from flowar.models.arflow.model import ARFlow, position_table
from flowar.models.state_dicts import name_some, report_keys

# Our name -> the released one, replaced in this order in every parameter name.
RELEASED_PARTS = (
    ("patch_embedding.", "x_embedder.proj."),
    ("time_embedding.hidden.", "t_embedder.mlp.0."),
    ("time_embedding.output.", "t_embedder.mlp.2."),
    ("class_embedding.", "y_embedder.embedding_table."),
    ("output_modulation.", "final_layer.adaLN_modulation.1."),
    ("output_projection.", "final_layer.linear."),
    (".modulation.", ".adaLN_modulation.1."),
    (".attention.query.", ".attn.q_proj."),
    (".attention.key.", ".attn.k_proj."),
    (".attention.value.", ".attn.v_proj."),
    (".attention.swish_gate.", ".attn.g_proj."),
    (".attention.decay_gate.", ".attn.gt_proj."),
    (".attention.output.", ".attn.out_proj."),
    (".mlp.hidden.", ".mlp.fc1."),
    (".mlp.output.", ".mlp.fc2."),
)
POSITIONS = "pos_embed"  # fixed, so that it is checked and dropped
POSITION_SLACK = 1e-4  # error of float32 sines and cosines
NOT_RELEASED = "the checkpoint is not a released ARFlow"


def _unwrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the weights in a checkpoint of the authors' trainer, the average where there is one; or what is given."""
    for wrapper in ("ema", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            inner: dict[str, Any] = state_dict[wrapper]
            return inner
    return state_dict


def is_released(state_dict: dict[str, Any]) -> bool:
    """Return whether a state dict or checkpoint has names that only the authors' ARFlow has."""
    return any(isinstance(name, str) and ".attn.gt_proj." in name for name in _unwrap(state_dict))


def convert(state_dict: dict[str, Any], ar_heads: int | None = None) -> tuple[ARFlowConfig, dict[str, Tensor]]:
    """Return shape and weights of the authors' ARFlow; the shape is read from the tensors.

    Args:
        state_dict: a released state dict, or a checkpoint of the authors' trainer with "ema" (preferred) or "model".
        ar_heads: of FlowAR's checkpoints; an ARFlow's heads are read from its decay gates, so leave it out.

    Raises:
        UserError: if keys are missing or unknown (named), tensors are no finite numbers, or shapes contradict.
    """
    if ar_heads is not None:
        raise UserError(f"ar_heads={ar_heads} is a setting of FlowAR, but this is an ARFlow; leave ar_heads out")
    state_dict = _unwrap(state_dict)
    for name, value in state_dict.items():
        if problem := _problem_of(name, value):
            raise UserError(f"{NOT_RELEASED}: {str(name)[:80]} {problem}")
    config = _read_config(state_dict)
    with torch.device("meta"):
        released_names = {released_parameter(ours): ours for ours in ARFlow(config).state_dict()}
    missing = sorted(released_names.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - released_names.keys() - {POSITIONS})
    if missing or unknown:
        raise UserError(f"{NOT_RELEASED}: {report_keys(missing, unknown)}")
    table = position_table(config.latent_size // config.patch_size, config.width)
    if not torch.allclose(state_dict[POSITIONS][0].float().cpu(), table, rtol=0, atol=POSITION_SLACK):
        raise UserError(f"{NOT_RELEASED}: {POSITIONS} is not the fixed sine-cosine table, which this model computes")
    return config, {ours: state_dict[theirs] for theirs, ours in released_names.items()}


def released_parameter(ours: str) -> str:
    """Return the released name of one of our parameters."""
    for own, theirs in RELEASED_PARTS:
        ours = ours.replace(own, theirs)
    return ours


def _problem_of(name: object, value: object) -> str | None:
    """Return what is wrong with an entry of a state dict, which has to be a tensor of finite numbers with a name."""
    if not isinstance(name, str):
        return "is not the name of a tensor"
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, but a tensor is needed"
    if value.is_meta or value.layout is not torch.strided:
        return "is a tensor without plain numbers"
    if not value.is_floating_point():
        return f"holds {value.dtype}, but floating-point numbers are needed"
    if not value.isfinite().all():
        return "holds numbers that are not finite: the file is damaged"
    return None


def _read_config(state_dict: dict[str, Tensor]) -> ARFlowConfig:
    """Return the shape of a released checkpoint, read off its tensors; a row of MODEL_VARIANTS where it is one."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state_dict:
            raise UserError(f"{NOT_RELEASED}: missing {name}; its keys are {name_some(sorted(state_dict))}")
        found = state_dict[name].shape
        if len(found) != dimensions or 0 in found:
            raise UserError(f"{NOT_RELEASED}: {name} is {tuple(found)}, but {dimensions} dimensions above 0 are needed")
        return found

    numbers = {m[1] for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name))}
    if numbers != {str(number) for number in range(max(1, len(numbers)))}:
        found = name_some(sorted(numbers)) or "missing"
        raise UserError(f"{NOT_RELEASED}: the numbers of blocks are {found}, but must run from 0 without a gap")
    width, latent_channels, patch_size, patch_width = shape("x_embedder.proj.weight", 4)
    if patch_size != patch_width:
        raise UserError(f"{NOT_RELEASED}: patches are {patch_size} x {patch_width}, but square ones are needed")
    _, tokens, position_width = shape(POSITIONS, 3)
    side = math.isqrt(tokens)
    if side * side != tokens or position_width != width:
        raise UserError(
            f"{NOT_RELEASED}: {POSITIONS} is {tokens} tokens of {position_width} channels, but a square number of "
            f"tokens of {width} channels, as x_embedder.proj.weight has, is needed"
        )
    config = ARFlowConfig(
        variant=CUSTOM_VARIANT,
        latent_channels=latent_channels,
        latent_size=side * patch_size,
        patch_size=patch_size,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        depth=len(numbers),
        width=width,
        heads=shape("blocks.0.attn.gt_proj.weight", 2)[0],
        guided_channels=min(latent_channels, 3),
    )
    for known in MODEL_VARIANTS.values():
        if dataclasses.replace(config, variant=known.variant) == known:
            return known
    return config
