"""Adapter: autoencoders of the latent diffusion code, as plain state dicts -> diffusers' AutoencoderKL.

MAR's kl16.ckpt, VA-VAE's vavae-imagenet256-f16d32-dinov2.pt, LDM's kl-f8 and their like share one layout, names such as
encoder.down.0.block.0.norm1.weight; so the shape can be read from the weights. Read next: vae.py.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flowar.base.errors import UserError

NORM_GROUPS = 32  # of all of them
LDM_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# Names in such a state dict -> diffusers' names, replaced in this order; of the decoder's levels also their numbers.
NAMES = (
    (r"\.(down|up)\.(\d)\.block\.(\d)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d)\.attn\.(\d)\.", r".\1_blocks.\2.attentions.\3."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(\.attentions\.\d)\.proj_out\.", r"\1.to_out.0."),
)


def ldm_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of diffusers' AutoencoderKL that has the shape of these weights.

    Raises:
        KeyError: if a weight is missing that tells a part of the shape.
    """
    levels = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.down\.(\d+)\.block", name)))
    blocks = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.down\.0\.block\.(\d+)", name)))
    widths = tuple(weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels))
    attends = {half: [f"{half}.attn.0.norm.weight" in weights for half in map(half.format, range(levels))]
               for half in ("encoder.down.{}", "decoder.up.{}")}  # fmt: skip
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "norm_num_groups": NORM_GROUPS,
        "act_fn": "silu",
        "down_block_types": tuple(("Attn" * is_on) + "DownEncoderBlock2D" for is_on in attends["encoder.down.{}"]),
        # diffusers counts the decoder's levels from the coarsest, and has its attention in the block before
        "up_block_types": tuple(("Attn" * is_on) + "UpDecoderBlock2D" for is_on in attends["decoder.up.{}"][::-1]),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }


def ldm_autoencoder(state_dict: Mapping[str, Tensor], shape: Mapping[str, Any] | None = None) -> nn.Module:
    """Return diffusers' AutoencoderKL with the weights of a state dict in LDM's layout; every key has to fit.

    Args:
        state_dict: what isn't the autoencoder's (a loss, a projection to another network's features) is left out.
        shape: settings of AutoencoderKL; None: as the weights say, with a scaling factor of 1.

    Raises:
        UserError: if it is no such state dict.
        RuntimeError: if a weight is missing or has another shape, as torch names it.
    """
    from diffusers import AutoencoderKL

    weights = {name: tensor for name, tensor in state_dict.items() if name.startswith(LDM_PARTS)}
    try:
        shape = shape or ldm_shape(weights) | {"scaling_factor": 1.0}
    except (KeyError, ValueError) as error:
        raise UserError(f"it has no autoencoder in the layout of latent diffusion models ({error})") from error
    coarsest = len(shape["block_out_channels"]) - 1
    renamed = {}
    for theirs, tensor in weights.items():
        name = theirs
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up_blocks\.(\d)\.", lambda found: f".up_blocks.{coarsest - int(found[1])}.", name)
        is_linear = re.search(r"\.to_(q|k|v|out\.0)\.weight", name)  # theirs are 1 x 1 convolutions
        renamed[name] = tensor[:, :, 0, 0] if is_linear else tensor
    autoencoder: nn.Module = AutoencoderKL(**shape)
    autoencoder.load_state_dict(renamed)
    return autoencoder
