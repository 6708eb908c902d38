"""What Transformers are built of: norm, gated MLP, rotary embedding, attention, time embedding.

They know tensors, not labels. Read next: fused.py, attention.py, flowar/model.py.
Shapes: B batch, N tokens, D width, H heads, d = D / H.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.models.attention import Pattern, attend, drop_out
from flowar.models.fused import NORM_EPS, gated_gelu, rotate, rotate_queries_keys, scaled_norm

TIME_FEATURES = 256  # width of the sinusoidal time features, as released
TIME_STEPS = 1000  # the released code embeds whole thousandths of the time
MAX_PERIOD = 10_000  # of the sinusoids in time
ALIGNED = 64  # of which a GPU's matrix products should be multiples wide


class Linear(nn.Linear):
    """A linear layer over all tokens as one matrix product, which torch does by itself only if there is a bias."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., out) of (..., in)."""
        output: Tensor = F.linear(tokens.flatten(0, -2), self.weight, self.bias).unflatten(0, tokens.shape[:-1])
        return output


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis, modulated where it has no weight of its own; eps as released."""

    least: Tensor

    def __init__(self, width: int, *, weight: bool) -> None:
        super().__init__(width, eps=NORM_EPS, elementwise_affine=weight)
        self.register_buffer("least", torch.tensor(NORM_EPS), persistent=False)

    def forward(self, tokens: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return the normed tokens (B, N, D) times the weight, or times scale plus shift."""
        return scaled_norm(tokens, self.weight if scale is None else scale, shift, self.least)


class GatedMLP(nn.Module):
    """fc_out(GELU(gate(x)) * value(x)) with exact GELU; the authors call it SwiGLU."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * 4 * 2 / 3)
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        return self.padded(tokens, -self.gate.out_features % ALIGNED if tokens.is_cuda else 0)

    def padded(self, tokens: Tensor, more: int) -> Tensor:
        """Return the same, computed with `more` hidden values of zero: a GPU is slow at odd widths, such as 2,730."""
        dropout = self.dropout if self.training else 0.0
        if more:
            gate, value = (
                F.linear(tokens, F.pad(layer.weight, (0, 0, 0, more)), F.pad(layer.bias, (0, more)))
                for layer in (self.gate, self.value)
            )
            hidden = drop_out(gated_gelu(gate, value), dropout)
            return drop_out(F.linear(hidden, F.pad(self.output.weight, (0, more)), self.output.bias), dropout)
        hidden = drop_out(gated_gelu(self.gate(tokens), self.value(tokens)), dropout)
        return drop_out(self.output(hidden), dropout)


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions over the segments it is given, and an optional cache."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = "sdpa"
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        tokens: Tensor,
        turns: Tensor,
        pattern: Pattern,
        cache: tuple[Tensor, Tensor] | None = None,
        begin: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the attended tokens (B, N, D), and the keys and values: (B, H, N, d) each, or the cache if given.

        Args:
            tokens: (B, N, D).
            turns: of the rotary embedding, (N, d / 2, 2).
            pattern: who attends to whom.
            cache: keys and values (B, H, begin + N or more, d) of which the first `begin` are there; these are added.
            begin: how many tokens came before.
        """
        query, key, value = rotate_queries_keys(self.qkv(tokens).unflatten(-1, (3, self.heads, -1)), turns)
        present = (key, value) if cache is None else cache
        if cache is not None:
            end = begin + tokens.shape[1]
            cache[0][:, :, begin:end], cache[1][:, :, begin:end] = key, value
            key, value = cache[0][:, :, :end], cache[1][:, :, :end]
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, value, pattern, dropout=dropout, kernel=self.kernel)
        return drop_out(self.output(attended.transpose(1, 2).contiguous().flatten(-2)), dropout), present


class CrossAttention(nn.Module):
    """Attention from the flow tokens to the semantics at the same positions, rotary on both; as released for -L, -H."""

    def __init__(self, width: int, heads: int, *, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = "sdpa"
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(context_width, 2 * width, bias=False)
        self.output = nn.Linear(width, width)

    def project(self, context: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, N, d) of a context (B, N, D)."""
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return rotate(key, turns), value.transpose(1, 2).contiguous()

    def forward(self, tokens: Tensor, keys_values: tuple[Tensor, Tensor], turns: Tensor, pattern: Pattern) -> Tensor:
        """Return the attended tokens (B, N, E), from what `project` made of the context."""
        query = rotate(self.query(tokens).unflatten(-1, (self.heads, -1)), turns)  # (B, H, N, d)
        attended = attend(query, *keys_values, pattern, dropout=0.0, kernel=self.kernel)
        output: Tensor = self.output(attended.transpose(1, 2).contiguous().flatten(-2))
        return output


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float32 stays float32; the meta device has no autocast to switch off."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class TimeEmbedding(nn.Module):
    """Sinusoid of the time in whole thousandths, cosine first, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TIME_FEATURES, width)
        self.output = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Return the embedding (..., width) of `time` (...) in [0, 1], computed in float32 under autocast too."""
        with without_autocast(time.device):
            steps = (TIME_STEPS * time.float()).floor()
            half = TIME_FEATURES // 2
            exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
            angles = steps[..., None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
            features = torch.cat([angles.cos(), angles.sin()], dim=-1)
            embedding: Tensor = self.output(F.silu(self.hidden(features)))
            return embedding


def set_attention(model: nn.Module, kernel: str) -> None:
    """Choose what computes attention in all of a model: "sdpa" (torch) or "flash" (the flash-attn package)."""
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.kernel = kernel
