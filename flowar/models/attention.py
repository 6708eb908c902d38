"""Attention over segments: one primitive, computed by torch or by flash-attn. Read next: layers.py.

Shapes: B batch, N tokens, H heads, d channels of a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.base.errors import UserError

Segment = tuple[slice, slice]  # (queries, keys): these queries attend to exactly these keys, without a mask


class Pattern(NamedTuple):
    """Who attends to whom: segments, and how torch computes them in two calls."""

    segments: list[Segment]  # together all queries in order; empty where each sees all keys
    mask: Tensor | None  # (queries, keys) of all segments but the last, True where seen; None where each sees all keys


EACH_SEES_ALL = Pattern([], None)


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, dropout: float, kernel: str) -> Tensor:
    """Return attention (B, H, N, d) where the queries of each segment see exactly its keys.

    The last segment, which has most tokens, is one call without a mask. The others are together one small call with a
    mask ("sdpa"), or one call each ("flash", which takes no mask).

    Args:
        query, key, value: (B, H, N or more, d).
        pattern: of these queries and keys.
        dropout: probability on the attention weights; 0 outside training.
        kernel: "sdpa" (torch) or "flash" (the flash-attn package, CUDA, bfloat16 or float16).

    Raises:
        UserError: "flash" where flash-attn is not installed, or on float32 tensors.
    """
    if kernel == "flash":
        flash_attn_func = import_flash_attention()
        if query.dtype == torch.float32:
            raise UserError("attention=flash needs bfloat16 or float16, got float32; set precision=bf16")
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, N, H, d)
        segments = pattern.segments or [(slice(None), slice(None))]
        parts = [flash_attn_func(query[:, q], key[:, k], value[:, k], dropout_p=dropout) for q, k in segments]
        return torch.cat(parts, dim=1).transpose(1, 2)
    if pattern.mask is None:
        return _attend_once(query, key, value, None, dropout)
    keys = pattern.segments[-1][1]
    num_queries, num_keys = pattern.mask.shape
    queries = _split(query, slice(0, num_queries), slice(num_queries, query.shape[2]))
    both_keys = _split(key, slice(0, num_keys), keys)
    values = _split(value, slice(0, num_keys), keys)
    parts = [
        _attend_once(*tensors, dropout)
        for tensors in zip(queries, both_keys, values, (pattern.mask, None), strict=True)
    ]
    by_token = torch.cat([part.transpose(1, 2) for part in parts], dim=1)  # (B, N, H, d), as the projection reads it
    return by_token.transpose(1, 2)


def _attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return attention (B, H, N, d). With dropout, torch has no kernel but CUDA's that never writes the weights."""
    if dropout == 0 or query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    if mask is None:
        bias, beta = query.new_empty(()), 0
    else:
        bias, beta = torch.where(mask, query.new_zeros(()), -torch.inf), 1
    batch, heads = query.shape[:2]
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    logits = torch.baddbmm(bias, query, key.mT, beta=beta, alpha=query.shape[-1] ** -0.5)
    output: Tensor = torch.bmm(drop_out(logits.softmax(-1), dropout), value).unflatten(0, (batch, heads))
    return output


def drop_out(values: Tensor, probability: float) -> Tensor:
    """Return F.dropout(values), the same bits; on a CPU that keeps 4 bytes a value for the gradient, this one."""
    if probability == 0:
        return values
    dropped: Tensor = torch.native_dropout(values, probability, True)[0]
    return dropped


def _split(heads: Tensor, first: slice, second: slice) -> tuple[Tensor, Tensor]:
    """Return two slices of the tokens of (B, H, N, d); the gradients of disjoint ones take no sum."""
    if second.start == first.stop:
        left, right = heads.split([first.stop, second.stop - second.start], dim=2)
        return left, right
    return heads[:, :, first], heads[:, :, second]


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
