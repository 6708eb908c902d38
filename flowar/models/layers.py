"""What Transformers are built of: norm, gated MLP, rotary embedding, attention, time embedding.

They know tensors, not labels. Read next: attention.py, flowar/model.py.
Shapes: B batch, N tokens, D width, H heads, d = D / H.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.models.attention import Segment, attend

NORM_EPS = 1e-6  # the released code's RMSNorm
TIME_FEATURES = 256  # width of the sinusoidal time features, as released
TIME_STEPS = 1000  # the released code embeds whole thousandths of the time
MAX_PERIOD = 10_000  # of the sinusoids in time


def rms_norm(width: int, *, weight: bool) -> nn.RMSNorm:
    """Return the RMSNorm of the released code, over the last axis."""
    return nn.RMSNorm(width, eps=NORM_EPS, elementwise_affine=weight)


def modulate(tokens: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return `tokens` (1 + gain) + shift: adaLN, or Spatial-adaLN where gain and shift differ by token."""
    return tokens * (1 + gain) + shift


class GatedMLP(nn.Module):
    """fc_out(GELU(gate(x)) * value(x)) with exact GELU; the authors call it SwiGLU."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * 4 * 2 / 3)
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.gate(tokens)) * self.value(tokens))
        output: Tensor = self.dropout(self.output(hidden))
        return output


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Return queries or keys `heads` (B, N, H, d) turned by `angles` (N, d / 2), neighbouring channels as pairs.

    The arithmetic is float32 at least, whatever the dtype of `heads`; the result has the dtype of `heads`.
    """
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]  # (N, 1, d / 2)
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions over the segments it is given, and an optional cache of past keys."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = "sdpa"
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.output = nn.Linear(width, width)

    def forward(
        self, tokens: Tensor, angles: Tensor, segments: list[Segment], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the attended tokens (B, N, D), and all keys and values so far, (B, past + N, H, d) each."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        query, key, value = qkv.unbind(2)
        query, key = rotate(query, angles), rotate(key, angles)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, value, segments, dropout=dropout, kernel=self.kernel)
        output = self.output(attended.flatten(-2))
        return F.dropout(output, self.dropout, self.training), (key, value)


class CrossAttention(nn.Module):
    """Attention from the flow tokens to the semantics at the same positions, rotary on both; as released for -L, -H."""

    def __init__(self, width: int, heads: int, *, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = "sdpa"
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor, angles: Tensor, segments: list[Segment]) -> Tensor:
        query = self.query(tokens).unflatten(-1, (self.heads, -1))  # (B, N, H, d)
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query, key = rotate(query, angles), rotate(key, angles)
        attended = attend(query, key, value, segments, dropout=0.0, kernel=self.kernel)
        output: Tensor = self.output(attended.flatten(-2))
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
