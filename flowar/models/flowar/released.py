"""The authors' checkpoints: their names, and how they become ours. The only place where the released names appear."""

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from flowar.base.errors import UserError
from flowar.config.models import CUSTOM_VARIANT, MODEL_VARIANTS, FlowARConfig
from flowar.models.flowar.model import FlowAR
from flowar.models.flowar.scales import num_tokens
from flowar.models.state_dicts import name_some, report_keys

# Our name -> the released one, replaced in this order in every parameter name.
RELEASED_NAMES = (
    ("ar.class_embedding.", "class_emb."),
    ("ar.lower_position", "encoder_pos_embed_learned"),
    ("ar.upper_position", "decoder_pos_embed_learned"),
    ("ar.output_position", "diffusion_pos_embed_learned"),
    ("ar.input_projection.", "z_proj."),
    ("ar.input_norm.", "z_proj_ln."),
    ("ar.middle_norm.", "encoder_norm."),
    ("ar.middle_projection.", "decoder_embed."),
    ("ar.output_norm.", "decoder_norm."),
    ("ar.lower_blocks.", "encoder_blocks."),
    ("ar.upper_blocks.", "decoder_blocks."),
    ("flow.input_projection.", "flownet.input_proj."),
    ("flow.time_embedding.hidden.", "flownet.time_embed.mlp.0."),
    ("flow.time_embedding.output.", "flownet.time_embed.mlp.2."),
    ("flow.condition_projection.", "flownet.cond_embed."),
    ("flow.output_modulation.", "flownet.final_layer.adaLN_modulation.1."),
    ("flow.output_projection.", "flownet.final_layer.linear."),
    ("flow.blocks.", "flownet.res_blocks."),
    (".attention_modulation.", ".ada_lin_attn."),
    (".mlp_modulation.", ".ada_lin_mlp."),
    (".query_norm.", ".norm2_1."),
    (".semantics_norm.", ".norm2_2."),
    (".cross_attention.query.", ".crossattn.q."),
    (".cross_attention.key_value.", ".crossattn.kv."),
    (".cross_attention.output.", ".crossattn.proj."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.output.", ".attn.proj."),
    (".mlp.gate.", ".mlp.fc1_g."),
    (".mlp.value.", ".mlp.fc1_x."),
    (".mlp.output.", ".mlp.fc2."),
)

RELEASED_DERIVED = re.compile(r"mask|.*\.rope\.freqs")  # follow from the shape, so they are dropped

MARK = re.compile(r"(flownet|encoder_blocks|decoder_blocks|class_emb|z_proj)\.|encoder_pos_embed_learned$")  # FlowAR's

RELEASED_FLOW_HEAD_WIDTH = 64
RELEASED_SCALES = (1, 2, 4, 8, 16)


def is_released(state_dict: dict[str, Any]) -> bool:
    """Return whether a state dict or checkpoint has names that only the authors' FlowAR has."""
    return any(isinstance(name, str) and MARK.match(name) for name in _unwrap(state_dict))


def convert(state_dict: dict[str, Any], ar_heads: int | None = None) -> tuple[FlowARConfig, dict[str, Tensor]]:
    """Return shape and weights of the authors' FlowAR; the shape is read from the tensors.

    Args:
        state_dict: a released state dict, or a checkpoint of the authors' trainer with "model_ema" (preferred) or
            "model" in it.
        ar_heads: heads of the AR Transformer; read from its rotary frequencies if None.

    Raises:
        UserError: if keys are missing or unknown (named), or the heads can't be told.
    """
    state_dict = _unwrap(state_dict)
    _check_tensors(state_dict)
    config = _released_config(state_dict, ar_heads)
    with torch.device("meta"):
        released_names = {released_name(ours): ours for ours in FlowAR(config).state_dict()}
    missing = sorted(released_names.keys() - state_dict.keys())
    unknown = sorted(name for name in state_dict.keys() - released_names.keys() if not RELEASED_DERIVED.fullmatch(name))
    if missing or unknown:
        raise UserError(f"the checkpoint is not a released FlowAR: {report_keys(missing, unknown)}")
    weights = {
        ours: state_dict[theirs].squeeze(0) if theirs.endswith("_pos_embed_learned") else state_dict[theirs]
        for theirs, ours in released_names.items()
    }  # their position tables are (1, L, D)
    return config, weights


def _unwrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the weights in a checkpoint of the authors' trainer, the average where there is one; or what is given."""
    for wrapper in ("model_ema", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            inner: dict[str, Any] = state_dict[wrapper]
            return inner
    return state_dict


def _check_tensors(state_dict: dict[Any, Any]) -> None:
    """Raise a UserError if something in a state dict is not a tensor with a name and finite numbers."""
    for name, value in state_dict.items():
        lack = None
        if not isinstance(name, str):
            lack = "is not the name of a tensor"
        elif not isinstance(value, Tensor):
            lack = f"is a {type(value).__name__}, but a tensor is needed"
        elif value.is_meta or value.layout is not torch.strided:
            lack = "is a tensor without plain numbers"
        elif not RELEASED_DERIVED.fullmatch(name) and not value.is_floating_point():
            lack = f"holds {value.dtype}, but floating point numbers are needed"
        elif value.is_floating_point() and "mask" not in name and not value.isfinite().all():
            lack = "holds numbers that are not finite: the file is damaged"
        if lack:
            raise UserError(f"the checkpoint is not a released FlowAR: {str(name)[:80]} {lack}")


def released_name(ours: str) -> str:
    """Return the released name of one of our parameters."""
    name = ours if ours.startswith("flow.") else ours.replace(".modulation.", ".ada_lin.1.")
    name = name.replace(".modulation.", ".ada_lin.")
    for own, theirs in RELEASED_NAMES:
        name = name.replace(own, theirs)
    return name


def _released_config(state_dict: dict[str, Tensor], ar_heads: int | None) -> FlowARConfig:
    """Return the shape of a released checkpoint, read off its tensors."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state_dict:
            raise UserError(
                f"the checkpoint is not a released FlowAR: missing {name}; its keys are {name_some(sorted(state_dict))}"
            )
        found = state_dict[name].shape
        if len(found) != dimensions or 0 in found:
            raise UserError(
                f"the checkpoint is not a released FlowAR: {name} is {tuple(found)}, but {dimensions} dimensions above "
                "0 are needed"
            )
        return found

    def depth(prefix: str) -> int:
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        found = {m[1] for name in state_dict if (m := pattern.match(name))}
        needed = {str(number) for number in range(max(1, len(found)))}
        if found != needed:  # also where a number is too large to be tried
            there = name_some(sorted(found)) or "missing"
            raise UserError(
                f"the checkpoint is not a released FlowAR: the numbers of {prefix} are {there}, but must run from 0 "
                "without a gap"
            )
        return len(found)

    tokens = shape("encoder_pos_embed_learned", 3)[1]
    if tokens != num_tokens(RELEASED_SCALES):
        raise UserError(
            f"encoder_pos_embed_learned holds {tokens} tokens, but the released models have "
            f"{num_tokens(RELEASED_SCALES)} (scales {RELEASED_SCALES})"
        )
    rows, ar_width = shape("class_emb.weight", 2)
    flow_width, latent_channels = shape("flownet.input_proj.weight", 2)
    if ar_heads is None:
        frequencies = "encoder_blocks.0.attn.rope.freqs"
        if frequencies not in state_dict:
            raise UserError(
                f"the checkpoint has no {frequencies} to tell the AR Transformer's heads by; give ar_heads=... "
                "(12 for -S and -B, 16 for -L and -H)"
            )
        ar_heads = ar_width // (4 * shape(frequencies, 1)[0])  # a quarter of a head's width
    config = FlowARConfig(
        variant=CUSTOM_VARIANT,
        scales=RELEASED_SCALES,
        latent_channels=latent_channels,
        num_classes=rows - 1,
        ar_depth=2 * max(depth("encoder_blocks"), depth("decoder_blocks")),
        ar_width=ar_width,
        ar_heads=ar_heads,
        flow_depth=depth("flownet.res_blocks"),
        flow_width=flow_width,
        flow_heads=flow_width // RELEASED_FLOW_HEAD_WIDTH,
        flow_block="attn_cross_mlp" if any(".crossattn." in name for name in state_dict) else "attn_mlp",
    )
    for known in MODEL_VARIANTS.values():
        if dataclasses.replace(config, variant=known.variant) == known:
            return known
    return config
