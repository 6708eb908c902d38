"""Attention over segments: one primitive, computed by torch or by flash-attn. Read next: layers.py.

Shapes: B batch, N tokens, H heads, d channels of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.base.errors import UserError

Segment = tuple[slice, slice]  # (queries, keys): these queries attend to exactly these keys, without a mask


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], *, dropout: float, kernel: str
) -> Tensor:
    """Return attention (B, N, H, d) where the queries of each segment see exactly its keys, by one unmasked call each.

    Args:
        query, key, value: (B, N or more, H, d).
        segments: slices of queries, together all of them in order, each with its slice of keys.
        dropout: probability on the attention weights; 0 outside training.
        kernel: "sdpa" (torch) or "flash" (the flash-attn package, CUDA, bfloat16 or float16).

    Raises:
        UserError: "flash" where flash-attn is not installed, or on float32 tensors.
    """
    if kernel == "flash":
        flash_attn_func = import_flash_attention()
        if query.dtype == torch.float32:
            raise UserError("attention=flash needs bfloat16 or float16, got float32; set precision=bf16")
        parts = [flash_attn_func(query[:, q], key[:, k], value[:, k], dropout_p=dropout) for q, k in segments]
        return torch.cat(parts, dim=1)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, N, d)
    parts = [
        F.scaled_dot_product_attention(query[:, :, q], key[:, :, k], value[:, :, k], dropout_p=dropout)
        for q, k in segments
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def import_flash_attention() -> Callable[..., Any]:
    """Return flash-attn's attention function; it is imported here only, and only when asked for."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UserError(
            f"attention=flash needs the flash-attn package, which does not import ({error}); install it with "
            "`pip install --no-build-isolation 'flowar[cuda]'`, or set attention=sdpa"
        ) from error
    attention: Callable[..., Any] = flash_attn_func
    return attention
