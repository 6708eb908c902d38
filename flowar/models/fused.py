"""What lies between a block's matrix products, with gradients written by hand: few passes over memory, little kept.

Each is a function of tensors with the same result as its formula; autograd of the formula would read and write each
activation two to three times as often, and keep what is cheaper computed again. Read next: layers.py.
Shapes: B batch, N tokens, D width, H heads, d = D / H.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

NORM_EPS = 1e-6  # the released code's RMSNorm


def scaled_norm(tokens: Tensor, scale: Tensor, shift: Tensor | None, eps: Tensor) -> Tensor:
    """Return rms_norm(tokens) scale + shift: an RMSNorm with its weight, or adaLN, whose scale is 1 + gain.

    Args:
        tokens: (B, N, D).
        scale: (D,), or (B or 1, N or 1, D).
        shift: of the same shape; None for no shift.
        eps: NORM_EPS as a tensor (), added to the mean square.
    """
    output: Tensor = _ScaledNorm.apply(tokens, scale, shift, eps)
    return output


def gated_sum(tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Return tokens + gate update.

    Args:
        tokens: (B, N, D).
        gate: (B or 1, N or 1, D).
        update: (B, N, D).
    """
    output: Tensor = _GatedSum.apply(tokens, gate, update)
    return output


def gated_gelu(gate: Tensor, value: Tensor) -> Tensor:
    """Return GELU(gate) value, with the exact GELU; all of one shape."""
    if not torch.is_grad_enabled():
        return F.gelu(gate).mul_(value)  # nothing is kept
    output: Tensor = _GatedGELU.apply(gate, value)
    return output


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Return queries or keys (B, N, H, d) as (B, H, N, d), neighbouring channels as pairs turned by `turns`.

    Those are cosine and sine, (N, d / 2, 2). The arithmetic is at least float32 for any dtype of `heads`; the
    result has the dtype of `heads`.
    """
    output: Tensor = _Rotation.apply(heads, turns)
    return output


def rotate_queries_keys(qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, H, N, d) of a packed (B, N, 3, H, d); the first two turned as by `rotate`."""
    query, key, value = _PackedRotation.apply(qkv, turns)
    return query, key, value


class _ScaledNorm(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scale: Tensor, shift: Tensor | None, eps: Tensor) -> Tensor:
        normalized, inverse = _normalize(tokens, eps)
        ctx.save_for_backward(normalized, inverse, scale)
        ctx.shift = None if shift is None else (shift.shape, shift.dtype)
        return normalized * scale if shift is None else torch.addcmul(shift, normalized, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        normalized, inverse, scale = ctx.saved_tensors
        product = grad * normalized
        grad_scale = product.sum_to_size(scale.shape).to(scale.dtype)
        scale = scale.to(product.dtype)  # bfloat16 under autocast
        grad_shift = None if ctx.shift is None else grad.sum_to_size(ctx.shift[0]).to(ctx.shift[1])
        if scale.shape[-2:-1] in ((), (1,)):  # the same for all tokens
            inner = (product @ scale.unsqueeze(-1) if scale.ndim == 1 else product @ scale.mT) / scale.shape[-1]
        else:
            inner = (product * scale).mean(-1, keepdim=True)
        grad_tokens = torch.addcmul(grad * scale, normalized, inner, value=-1) * inverse
        return grad_tokens, grad_scale, grad_shift, None


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(gate, update)
        return torch.addcmul(tokens, gate, update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, update = ctx.saved_tensors
        grad_gate = (grad * update).sum_to_size(gate.shape)
        return grad, grad_gate.to(gate.dtype), (grad * gate).to(update.dtype)


class _GatedGELU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        activated = F.gelu(gate)
        ctx.save_for_backward(gate, value, activated)
        return activated * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value, activated = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad * value, gate), grad * activated


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return _turn(heads.transpose(1, 2), turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _turn_back(grad, *ctx.saved_tensors).transpose(1, 2), None


class _PackedRotation(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns)
        query, key = _turn(qkv[:, :, :2].permute(2, 0, 3, 1, 4), turns).unbind(0)
        return query, key, qkv[:, :, 2].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors  # once: where blocks are recomputed each reading computes again
        turned = [_turn_back(grad, turns) for grad in (grad_query, grad_key)]
        return torch.stack([grad.transpose(1, 2) for grad in (*turned, grad_value)], dim=2), None


def _normalize(tokens: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return rms_norm(tokens) and what the tokens were multiplied by, (B, N, 1)."""
    if tokens.is_cuda:  # one kernel
        normalized, inverse = torch.ops.aten._fused_rms_norm(tokens, tokens.shape[-1:], None, NORM_EPS)
        return normalized, inverse
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps, norm, norm, value=1 / tokens.shape[-1]).rsqrt_()  # of the mean square + eps
    return tokens * inverse, inverse


def _turn(heads: Tensor, turns: Tensor) -> Tensor:
    """Return pairs of channels of `heads` (..., N, d) turned, in that order in memory."""
    pairs = _pairs(heads)
    if torch.compiler.is_compiling():  # the compiler makes no code for complex numbers, and needs none
        cosine, sine = turns.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    else:  # one pass over memory
        pairs, factor = torch.view_as_complex(pairs), torch.view_as_complex(turns)
        turned = torch.view_as_real(
            torch.mul(pairs, factor, out=torch.empty(pairs.shape, dtype=pairs.dtype, device=pairs.device))
        )
    result: Tensor = turned.flatten(-2).to(heads.dtype)
    return result


def _turn_back(grad: Tensor, turns: Tensor) -> Tensor:
    """Return the gradient of what `_turn` turned."""
    cosine, sine = turns.unbind(-1)
    return _turn(grad, torch.stack([cosine, -sine], dim=-1))


def _pairs(heads: Tensor) -> Tensor:
    """Return neighbouring channels as pairs (..., d / 2, 2), float32 at least."""
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()  # attention's gradients may be transposed
    heads = heads if heads.dtype == torch.float64 else heads.float()
    pairs: Tensor = heads.unflatten(-1, (-1, 2))
    return pairs
