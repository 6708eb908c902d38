"""FlowAR as the authors compute it, plainly, from the paper and their release: what the rest of this folder must equal.

Nothing here is arranged to be quick. The AR Transformer attends through a dense mask; the flow Transformer is called
scale by scale; rotary tables are computed in every attention; each solver step computes everything; the unconditional
half runs at every scale and step. `flowar bench` measures the model beside it, and a test compares both. Parameters
have the released names, so that `convert_released` turns its state dict into a model.

Shapes: B batch, N tokens of one scale, L of all K scales, D width of the AR Transformer, E of the flow Transformer.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.config.drawing import DrawConfig
from flowar.config.models import FlowARConfig
from flowar.models.family import Model
from flowar.models.flowar.scales import next_input, pack, training_inputs, unpatchify
from flowar.models.solvers import make_time_grid


def _norm(width: int, weight: bool = False) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=weight)


class PlainRotary(nn.Module):
    """2-D rotary embedding of one grid of tokens after the other."""

    freqs: Tensor

    def __init__(self, head_width: int, last_side: int) -> None:
        super().__init__()
        self.last_side = last_side
        self.register_buffer("freqs", 10_000 ** -(torch.arange(head_width // 4) / (head_width // 4)))

    def forward(self, heads: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Return queries or keys (B, H, N, d) turned by their places in grids of these sides."""
        tables = []
        for side in sides:
            turns = torch.arange(side, device=heads.device)[:, None] / side * self.last_side * self.freqs  # (side, d/4)
            rows, columns = turns[:, None].expand(-1, side, -1), turns[None].expand(side, -1, -1)
            tables.append(torch.cat([rows, columns], dim=-1).flatten(0, 1))
        angles = torch.cat(tables).repeat_interleave(2, dim=-1)  # (N, d)
        turned = torch.stack([-heads[..., 1::2], heads[..., ::2]], dim=-1).flatten(-2)
        return (heads * angles.cos() + turned * angles.sin()).to(heads.dtype)


class PlainAttention(nn.Module):
    """Self-attention, with an additive mask and a cache of keys and values where given."""

    def __init__(self, width: int, heads: int, last_side: int, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        self.rope = PlainRotary(width // heads, last_side)

    def forward(
        self, x: Tensor, sides: tuple[int, ...], mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        """Return the attended tokens; `cache`, a list of keys and values, is appended to in place."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
        q, k = self.rope(q, sides), self.rope(k, sides)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output: Tensor = F.dropout(self.proj(attended.transpose(1, 2).flatten(2)), dropout)
        return output


class PlainCrossAttention(nn.Module):
    """Attention from flow tokens to the semantics at the same places."""

    def __init__(self, width: int, heads: int, last_side: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(context_width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.rope = PlainRotary(width // heads, last_side)

    def forward(self, x: Tensor, context: Tensor, sides: tuple[int, ...]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.rope(q, sides), self.rope(k, sides), v)
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


class PlainMLP(nn.Module):
    """Gated MLP with exact GELU."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * 4 * 2 / 3)
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.fc2, self.dropout = nn.Linear(hidden, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x))))
        return output


class PlainBlock(nn.Module):
    """A block of the AR Transformer (condition: the class), or one of the flow Transformer's attn_mlp (per token)."""

    def __init__(self, attention: PlainAttention, mlp: PlainMLP, ada_lin: nn.Module) -> None:
        super().__init__()
        width = attention.proj.in_features
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn, self.mlp, self.ada_lin = attention, mlp, ada_lin

    def forward(self, x: Tensor, condition: Tensor, *where: Any) -> Tensor:
        gate1, gate2, gain1, gain2, shift1, shift2 = self.ada_lin(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + gain1) + shift1, *where)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + gain2) + shift2)
        return out


def _ar_block(config: FlowARConfig) -> PlainBlock:
    width, dropout = config.ar_width, config.dropout
    attention = PlainAttention(width, config.ar_heads, config.scales[-1], bias=True, dropout=dropout)
    return PlainBlock(attention, PlainMLP(width, dropout), nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)))


def _flow_block(config: FlowARConfig) -> nn.Module:
    if config.flow_block == "attn_cross_mlp":
        return PlainCrossBlock(config)
    width = config.flow_width
    attention = PlainAttention(width, config.flow_heads, config.scales[-1], bias=False)
    return PlainBlock(attention, PlainMLP(width), nn.Linear(width, 6 * width))


class PlainCrossBlock(nn.Module):
    """A block of the flow Transformer's attn_cross_mlp: attention modulated per sample by the time alone."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width, heads, last = config.flow_width, config.flow_heads, config.scales[-1]
        self.norm1, self.norm2_1, self.norm2_2 = _norm(width), _norm(width, True), _norm(config.ar_width, True)
        self.norm3 = _norm(width)
        self.attn = PlainAttention(width, heads, last, bias=False)
        self.crossattn = PlainCrossAttention(width, heads, last, config.ar_width)
        self.mlp = PlainMLP(width)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, semantics: Tensor, sides: tuple[int, ...]) -> Tensor:
        gate, gain, shift = self.ada_lin_attn(F.silu(time)).chunk(3, dim=-1)
        x = x + gate * self.attn(self.norm1(x) * (1 + gain) + shift, sides)
        x = x + self.crossattn(self.norm2_1(x), self.norm2_2(semantics), sides)
        gate, gain, shift = self.ada_lin_mlp(F.silu(condition + time)).chunk(3, dim=-1)
        out: Tensor = x + gate * self.mlp(self.norm3(x) * (1 + gain) + shift)
        return out


class PlainFlow(nn.Module):
    """Noisy tokens of one scale, their time and semantics -> velocity."""

    time_embed: Any
    final_layer: Any

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        self.is_cross = config.flow_block == "attn_cross_mlp"
        self.input_proj, self.cond_embed = nn.Linear(config.token_width, width), nn.Linear(config.ar_width, width)
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embed = nn.ModuleDict({"mlp": mlp})
        self.res_blocks = nn.ModuleList(_flow_block(config) for _ in range(config.flow_depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict(
            {"norm": _norm(width), "adaLN_modulation": modulation, "linear": nn.Linear(width, config.token_width)}
        )

    def forward(self, x: Tensor, time: Tensor, semantics: Tensor, side: int) -> Tensor:
        """Return the velocity (B, N, C p p) of tokens (B, N, C p p) at `time` (B,), given semantics (B, N, D)."""
        exponents = torch.arange(128, dtype=torch.float32, device=x.device) / 128
        steps = torch.floor(1000 * time)[:, None] * torch.exp(-math.log(10_000) * exponents)
        embedded = self.time_embed["mlp"](torch.cat([steps.cos(), steps.sin()], dim=-1))[:, None]  # (B, 1, E)
        condition = self.cond_embed(semantics)
        x = self.input_proj(x)
        for block in self.res_blocks:
            if self.is_cross:
                x = block(x, embedded, condition, semantics, (side,))
            else:
                x = block(x, F.silu(embedded + condition), (side,))
        shift, gain = self.final_layer["adaLN_modulation"](condition + embedded).chunk(2, dim=-1)
        velocity: Tensor = self.final_layer["linear"](self.final_layer["norm"](x) * (1 + gain) + shift)
        return velocity


class PlainFlowAR(Model):
    """Both Transformers, with the released names; fresh weights are torch's own."""

    config: FlowARConfig
    mask: Tensor

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        self.config = config
        width, scales = config.ar_width, config.scales
        numbers = torch.cat([torch.full((side * side,), index) for index, side in enumerate(scales)])
        mask = torch.zeros(len(numbers), len(numbers)).masked_fill_(numbers[:, None] < numbers, -torch.inf)
        self.register_buffer("mask", mask[None, None])
        self.class_emb, self.z_proj = nn.Embedding(config.num_classes + 1, width), nn.Linear(config.token_width, width)
        self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned = (
            nn.Parameter(0.02 * torch.randn(1, len(numbers), width)) for _ in range(3)
        )
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(_ar_block(config) for _ in range(config.ar_depth // 2)) for _ in range(2)
        )
        self.z_proj_ln, self.encoder_norm, self.decoder_norm = (_norm(width, True) for _ in range(3))
        self.decoder_embed = nn.Linear(width, width)
        self.flownet = PlainFlow(config)

    def semantics(self, inputs: Tensor, labels: Tensor, span: range, caches: list[list[Tensor]] | None) -> Tensor:
        """Return the semantics (B, N, D) of the scales `span`: all of them, or the next one, with caches by block."""
        sides = self.config.scales[span.start : span.stop]
        first = sum(side * side for side in self.config.scales[: span.start])
        here = slice(first, first + sum(side * side for side in sides))
        classes = self.class_emb(labels)[:, None]
        x = self.z_proj(inputs)
        x = torch.cat([classes.to(x.dtype), x], dim=1) if span.start == 0 else x
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, here])
        mask = self.mask if caches is None else None
        for index, block in enumerate([*self.encoder_blocks, *self.decoder_blocks]):
            if index == len(self.encoder_blocks):
                x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, here]
            x = block(x, classes, sides, mask, None if caches is None else caches[index])
        output: Tensor = self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, here]
        return output

    def forward(self, inputs: Tensor, labels: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the velocity of all scales (B, L, C p p); arguments as of the model that this is the baseline of."""
        scales = self.config.scales
        parts = [side * side for side in scales]
        semantics = self.semantics(inputs, labels, range(len(scales)), None)
        pieces = zip(noisy.split(parts, 1), time.T, semantics.split(parts, 1), scales, strict=True)
        return torch.cat([self.flownet(*piece) for piece in pieces], dim=1)


def create(config: FlowARConfig) -> PlainFlowAR:
    """Return a baseline with fresh weights, in evaluation mode."""
    return PlainFlowAR(config).eval()


def losses(
    forward: Callable[..., Any], config: FlowARConfig, latents: Tensor, labels: Tensor, draws: dict[str, Tensor]
) -> Tensor:
    """Return the mean squared velocity error of each scale, (K,)."""
    scales, patch_size = config.scales, config.patch_size
    parts = [side * side for side in scales]
    tokens, noise = pack(latents, scales, patch_size), draws["noise"]
    times = draws["time"].repeat_interleave(torch.tensor(parts, device=latents.device), dim=1, output_size=sum(parts))
    noisy = (1 - times[..., None]) * tokens + times[..., None] * noise
    velocity = forward(training_inputs(latents, scales, patch_size), labels, noisy, draws["time"])
    errors = (velocity.float() - (noise - tokens)).square()
    return torch.stack([part.mean() for part in errors.split(parts, dim=1)])


@torch.no_grad()
def generate(
    model: PlainFlowAR,
    labels: Tensor,
    noise: Tensor,
    how: DrawConfig,
    step_noise: Callable[[tuple[int, ...]], Tensor],
) -> list[Tensor]:
    """Return the map of every scale, by Euler's method in float64; the last are the latents."""
    config, (low, high) = model.config, how.guidance_interval
    times = make_time_grid(how.time_grid, how.num_steps, how.shift).tolist()
    halves = 2 if how.guidance > 1 else 1
    if halves == 2:
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    caches: list[list[Tensor]] = [[] for _ in range(config.ar_depth)]
    token_maps: list[Tensor] = []
    inputs = noise.new_zeros(len(labels), 0, config.token_width)
    for index, (side, start) in enumerate(
        zip(config.scales, noise.split([s * s for s in config.scales], 1), strict=True)
    ):
        if token_maps:
            inputs = next_input(token_maps[-1], side, config.scales, config.patch_size).repeat(halves, 1, 1)
        semantics = model.semantics(inputs, labels, range(index, index + 1), caches)
        weight = 1 + (how.guidance - 1) * index / max(1, len(config.scales) - 1)
        state = start.double()
        for time, end in pairwise(times):
            at = torch.full((len(labels),), time, dtype=torch.float32, device=state.device)
            velocity = model.flownet(state.float().repeat(halves, 1, 1), at, semantics, side).double()
            conditional, unconditional = velocity.chunk(halves) if halves == 2 else (velocity, velocity)
            is_guided = low - 1e-6 <= time <= high + 1e-6
            velocity = unconditional + weight * (conditional - unconditional) if is_guided else conditional
            state = state + (end - time) * velocity
        token_maps.append(unpatchify(state.float(), side, config.patch_size))
    return token_maps
