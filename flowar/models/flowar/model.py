"""FlowAR: an autoregressive Transformer over scales gives semantics, a flow matching one turns them into velocity.

There is no loss, solver, rank or file here. Read next: loss.py. Shapes: B batch, C latent channels, p patch side,
D width of the AR Transformer, E width of the flow Transformer, N tokens of some scales, L of all K scales.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.config.models import FlowARConfig
from flowar.models.attention import EACH_SEES_ALL, Pattern, Segment
from flowar.models.family import Model
from flowar.models.flowar.scales import (
    causal_segments,
    local_segments,
    num_tokens,
    rotary_turns,
    small_mask,
    token_range,
)
from flowar.models.fused import gated_sum
from flowar.models.layers import CrossAttention, GatedMLP, RMSNorm, SelfAttention, TimeEmbedding

INIT_STD = 0.02  # of the label and position tables (the released code); of the time embedding with zero_init

KeyValueCache = list[tuple[Tensor, Tensor]]  # per block: keys and values of all tokens so far, (B, heads, tokens, d)


def split_modulation(modulation: Tensor, number: int) -> tuple[Tensor, ...]:
    """Return gates, scales (1 + gain) and shifts (B, N, E) of `number` norms from one tensor (B, N, 3 number E)."""
    gates, gains, shifts = modulation.chunk(3, dim=-1)
    return (*gates.chunk(number, dim=-1), *(1 + gains).chunk(number, dim=-1), *shifts.chunk(number, dim=-1))


class AutoregressiveBlock(nn.Module):
    """Scale-causal attention and gated MLP, modulated by the class through adaLN."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width, dropout = config.ar_width, config.dropout
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm = RMSNorm(width, weight=False)
        self.attention = SelfAttention(width, config.ar_heads, qkv_bias=True, dropout=dropout)
        self.mlp_norm = RMSNorm(width, weight=False)
        self.mlp = GatedMLP(width, dropout)

    def forward(
        self,
        tokens: Tensor,
        class_embedding: Tensor,
        turns: Tensor,
        pattern: Pattern,
        cache: tuple[Tensor, Tensor] | None,
        begin: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the tokens (B, N, D) after the block, and keys and values; the class went through SiLU.

        The other arguments are those of SelfAttention.
        """
        modulation = self.modulation(class_embedding)[:, None]  # (B, 1, 6 D)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = split_modulation(modulation, 2)
        attended, present = self.attention(self.attention_norm(tokens, scale_1, shift_1), turns, pattern, cache, begin)
        tokens = gated_sum(tokens, gate_1, attended)
        del attended  # the MLP needs the memory
        return gated_sum(tokens, gate_2, self.mlp(self.mlp_norm(tokens, scale_2, shift_2))), present


class AutoregressiveTransformer(nn.Module):
    """Coarser token maps and a class -> one semantics vector per token of the current scales."""

    turns: Tensor
    mask: Tensor | None

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width, half = config.ar_width, config.ar_depth // 2
        tokens = num_tokens(config.scales)
        self.scales = config.scales
        self.input_projection = nn.Linear(config.token_width, width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row is "no class"
        self.lower_position = nn.Parameter(torch.empty(tokens, width))
        self.input_norm = RMSNorm(width, weight=True)
        self.lower_blocks = nn.ModuleList(AutoregressiveBlock(config) for _ in range(half))
        self.middle_norm = RMSNorm(width, weight=True)
        self.middle_projection = nn.Linear(width, width)
        self.upper_position = nn.Parameter(torch.empty(tokens, width))
        self.upper_blocks = nn.ModuleList(AutoregressiveBlock(config) for _ in range(half))
        self.output_norm = RMSNorm(width, weight=True)
        self.output_position = nn.Parameter(torch.empty(tokens, width))
        turns = rotary_turns(config.scales, width // config.ar_heads, config.position_span)
        self.register_buffer("turns", turns, persistent=False)
        mask = small_mask(causal_segments(config.scales, range(len(config.scales))))
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, inputs: Tensor, labels: Tensor, span: range) -> Tensor:
        """Return the input tokens (B, N, D), before positions; the token of the first scale is the class."""
        tokens: Tensor = self.input_projection(inputs)
        if span.start == 0:
            tokens = torch.cat([self.class_embedding(labels)[:, None].to(tokens.dtype), tokens], dim=1)
        return tokens

    def forward(
        self, inputs: Tensor, labels: Tensor, span: range, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Return the semantics (B, N, D) of the scales `span`, and the cache that the next scale needs.

        Args:
            inputs: tokens of the scales of `span`, (B, N, C p p), without the first scale's, which is the class.
            labels: (B,) int64; num_classes is "no class".
            span: indices of consecutive scales; all of them when training, one after the other when generating.
            cache: what the call for the scales before `span` returned; None where `span` starts at 0. It has room for
                all scales, and is filled in place.
        """
        where = token_range(self.scales, span)
        pattern = make_pattern(causal_segments(self.scales, span), self.mask, tokens=len(self.turns))
        turns = self.turns[where]
        class_embedding = F.silu(self.class_embedding(labels))
        blocks = [*self.lower_blocks, *self.upper_blocks]
        past: Sequence[tuple[Tensor, Tensor] | None] = cache or [None] * len(blocks)
        present: KeyValueCache = []

        tokens = self.input_norm(self.embed(inputs, labels, span) + self.lower_position[where])
        for index, block in enumerate(blocks):
            if index == len(self.lower_blocks):
                tokens = self.middle_projection(self.middle_norm(tokens)) + self.upper_position[where]
            tokens, keys_values = block(tokens, class_embedding, turns, pattern, past[index], where.start)
            present.append(keys_values)
        if cache is None and where.stop < len(self.turns):
            present = [(self._with_room(key), self._with_room(value)) for key, value in present]
        return self.output_norm(tokens) + self.output_position[where], present

    def _with_room(self, heads: Tensor) -> Tensor:
        """Return keys or values (B, H, N, d) as the first of a tensor with room for all scales, (B, H, L, d)."""
        whole = heads.new_empty(*heads.shape[:2], len(self.turns), heads.shape[3])
        whole[:, :, : heads.shape[2]] = heads
        return whole


class PreparedBlock(NamedTuple):
    """What a flow block makes of time and semantics alone: the same for all steps of a solver, or for all samples."""

    modulation: Tensor | None  # of the attention, by the time, (B or 1, N or 1, 3 E)
    keys_values: tuple[Tensor, Tensor] | None  # of the cross-attention


class FlowBlock(nn.Module):
    """Attention inside a scale and gated MLP, modulated per token by time + semantics: Spatial-adaLN (`attn_mlp`)."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm = RMSNorm(width, weight=False)
        self.attention = SelfAttention(width, config.flow_heads, qkv_bias=False)
        self.mlp_norm = RMSNorm(width, weight=False)
        self.mlp = GatedMLP(width)

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        time: Tensor,
        semantics: Tensor,
        turns: Tensor,
        pattern: Pattern,
        prepared: PreparedBlock | None = None,
    ) -> Tensor:
        """Return the tokens (B, N, E) after the block; arguments as CrossAttentionFlowBlock."""
        modulation = self.modulation(condition)  # (B, N, 6 E)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = split_modulation(modulation, 2)
        attended = self.attention(self.attention_norm(tokens, scale_1, shift_1), turns, pattern)[0]
        tokens = gated_sum(tokens, gate_1, attended)
        del attended  # the MLP needs the memory
        return gated_sum(tokens, gate_2, self.mlp(self.mlp_norm(tokens, scale_2, shift_2)))

    def modulate(self, time: Tensor) -> None:
        """Return None: this block has no modulation by the time alone."""

    def project(self, semantics: Tensor, turns: Tensor) -> None:
        """Return None: this block attends to no semantics."""


class CrossAttentionFlowBlock(nn.Module):
    """Time-modulated attention, cross-attention to the semantics, Spatial-adaLN MLP (`attn_cross_mlp`)."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        self.attention_modulation = nn.Linear(width, 3 * width)
        self.attention_norm = RMSNorm(width, weight=False)
        self.attention = SelfAttention(width, config.flow_heads, qkv_bias=False)
        self.query_norm = RMSNorm(width, weight=True)
        self.semantics_norm = RMSNorm(config.ar_width, weight=True)
        self.cross_attention = CrossAttention(width, config.flow_heads, context_width=config.ar_width)
        self.mlp_modulation = nn.Linear(width, 3 * width)
        self.mlp_norm = RMSNorm(width, weight=False)
        self.mlp = GatedMLP(width)

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        time: Tensor,
        semantics: Tensor,
        turns: Tensor,
        pattern: Pattern,
        prepared: PreparedBlock | None = None,
    ) -> Tensor:
        """Return the tokens (B, N, E) after the block.

        Args:
            tokens: (B, N, E).
            condition: SiLU(time + semantics), (B, N, E).
            time: SiLU(time), (B, K, E), one per scale.
            semantics: (B, N, D).
            turns: of the rotary embedding, (N, d / 2, 2).
            pattern: who attends to whom.
            prepared: what `modulate` and `project` gave before; they are called if None.
        """
        if prepared is None:
            modulation = spread(self.modulate(time), pattern)
            prepared = PreparedBlock(modulation, self.project(semantics, turns))
        assert prepared.modulation is not None and prepared.keys_values is not None
        gate, scale, shift = split_modulation(prepared.modulation, 1)
        attended = self.attention(self.attention_norm(tokens, scale, shift), turns, pattern)[0]
        tokens = gated_sum(tokens, gate, attended)
        tokens = tokens + self.cross_attention(self.query_norm(tokens), prepared.keys_values, turns, pattern)
        gate, scale, shift = split_modulation(self.mlp_modulation(condition), 1)
        return gated_sum(tokens, gate, self.mlp(self.mlp_norm(tokens, scale, shift)))

    def modulate(self, time: Tensor) -> Tensor:
        """Return the modulation (..., 3 E) of the attention by SiLU(time) (..., E)."""
        modulation: Tensor = self.attention_modulation(time)
        return modulation

    def project(self, semantics: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the cross-attention."""
        return self.cross_attention.project(self.semantics_norm(semantics), turns)


def spread(values: Tensor, pattern: Pattern) -> Tensor:
    """Return one value per token (B, N, E) from one per scale (B, K, E); (B, 1, E) of one scale."""
    if not pattern.segments:  # one scale
        return values
    sizes = [queries.stop - queries.start for queries, _ in pattern.segments]
    parts = values.split(1, dim=1)
    return torch.cat([part.expand(-1, size, -1) for part, size in zip(parts, sizes, strict=True)], dim=1)


class Prepared(NamedTuple):
    """What the flow Transformer makes of the semantics of one scale, once for all steps of a solver."""

    condition: Tensor  # (B, N, E)
    keys_values: list[tuple[Tensor, Tensor] | None]  # of each block

    def first(self, number: int) -> "Prepared":
        """Return that of the first samples of the batch."""
        return Prepared(self.condition[:number], [kv and (kv[0][:number], kv[1][:number]) for kv in self.keys_values])


class Modulations(NamedTuple):
    """What the flow Transformer makes of one time, which all samples share."""

    time: Tensor  # its embedding, (1, 1, E)
    blocks: list[Tensor | None]  # of each block, (1, 1, 3 E)


class FlowMatchingTransformer(nn.Module):
    """Noisy tokens, their time and their semantics -> velocity; scales never see each other here."""

    turns: Tensor
    mask: Tensor | None

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        block = FlowBlock if config.flow_block == "attn_mlp" else CrossAttentionFlowBlock
        self.scales = config.scales
        self.input_projection = nn.Linear(config.token_width, width)
        self.time_embedding = TimeEmbedding(width)
        self.condition_projection = nn.Linear(config.ar_width, width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.flow_depth))
        self.output_norm = RMSNorm(width, weight=False)
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output_projection = nn.Linear(width, config.token_width)
        turns = rotary_turns(config.scales, width // config.flow_heads, config.position_span)
        self.register_buffer("turns", turns, persistent=False)
        mask = small_mask(local_segments(config.scales, range(len(config.scales))))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, noisy: Tensor, time: Tensor, semantics: Tensor, span: range) -> Tensor:
        """Return the velocity (B, N, C p p), d noisy / d time, of the scales `span`.

        Args:
            noisy: tokens on the path between data and noise, (B, N, C p p).
            time: (B, len(span)) in [0, 1], one per sample and scale; 0 is data, 1 is noise.
            semantics: (B, N, D), from the AR Transformer.
            span: indices of the consecutive scales that `noisy` holds.
        """
        time = self.time_embedding(time)  # (B, K, E)
        pattern = make_pattern(local_segments(self.scales, span), self.mask, tokens=len(self.turns))
        condition = F.silu(self.condition_projection(semantics) + spread(time, pattern))
        return self._run_blocks(noisy, condition, F.silu(time), semantics, span, None)

    def prepare(self, semantics: Tensor, span: range) -> Prepared:
        """Return all that depends on the semantics (B, N, D) of one scale alone."""
        turns = self.turns[token_range(self.scales, span)]
        keys_values = [block.project(semantics, turns) for block in self._blocks()]
        return Prepared(self.condition_projection(semantics), keys_values)

    def modulations(self, times: list[float]) -> list[Modulations]:
        """Return all that depends on one of the times alone, for each of them."""
        embedding = self.time_embedding(torch.tensor(times, dtype=torch.float32, device=self.turns.device))
        activated = F.silu(embedding)
        per_block = [block.modulate(activated) for block in self._blocks()]
        return [
            Modulations(embedding[index, None, None], [None if m is None else m[index, None, None] for m in per_block])
            for index in range(len(times))
        ]

    def step(self, noisy: Tensor, time: Modulations, semantics: Prepared, span: range) -> Tensor:
        """Return the velocity (B, N, C p p) of one scale at a time that all samples share, from what was prepared."""
        condition = F.silu(semantics.condition + time.time)
        prepared = [PreparedBlock(*parts) for parts in zip(time.blocks, semantics.keys_values, strict=True)]
        return self._run_blocks(noisy, condition, time.time, semantics.condition, span, prepared)

    def _blocks(self) -> list[FlowBlock | CrossAttentionFlowBlock]:
        return cast(list[FlowBlock | CrossAttentionFlowBlock], list(self.blocks))

    def _run_blocks(
        self,
        noisy: Tensor,
        condition: Tensor,
        time: Tensor,
        semantics: Tensor,
        span: range,
        prepared: list[PreparedBlock] | None,
    ) -> Tensor:
        pattern = make_pattern(local_segments(self.scales, span), self.mask, tokens=len(self.turns))
        turns = self.turns[token_range(self.scales, span)]
        tokens = self.input_projection(noisy).to(noisy.dtype)  # under autocast the residual stream stays float32
        for index, block in enumerate(self.blocks):
            ready = None if prepared is None else prepared[index]
            tokens = block(tokens, condition, time, semantics, turns, pattern, ready)
        shift, gain = self.output_modulation(condition).chunk(2, dim=-1)
        velocity: Tensor = self.output_projection(self.output_norm(tokens, 1 + gain, shift))
        return velocity


def make_pattern(segments: list[Segment], mask: Tensor | None, tokens: int) -> Pattern:
    """Return the pattern of segments; `mask` is of those of all `tokens`, made once and lying on the device."""
    if len(segments) == 1:
        return EACH_SEES_ALL
    if segments[-1][0].stop < tokens or mask is None:  # some of the scales
        mask = small_mask(segments)
    return Pattern(segments, mask)


class FlowAR(Model):
    """FlowAR (arXiv:2412.15205): both Transformers. Training calls it whole, generation its parts, by scale."""

    config: FlowARConfig

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        self.config = config
        self.ar = AutoregressiveTransformer(config)
        self.flow = FlowMatchingTransformer(config)
        self.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the velocity of all scales, (B, L, C p p), as training needs it.

        Args:
            inputs: the AR Transformer's inputs for the scales after the first, (B, L - 1, C p p), `training_inputs`.
            labels: (B,) int64; num_classes is "no class".
            noisy: (B, L, C p p), all scales packed coarse to fine, each at its own `time`.
            time: (B, K) in [0, 1].
        """
        span = range(len(self.config.scales))
        semantics, _ = self.ar(inputs, labels, span)
        velocity: Tensor = self.flow(noisy, time, semantics, span)
        return velocity

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights as the released code does: Xavier for every Linear, N(0, 0.02^2) for the tables.

        The authors meant to zero the last linear and to draw the time embedding from N(0, 0.02^2), but their last
        pass over all modules undoes it, and the published numbers come from that; `zero_init` does what they meant.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        ar = self.ar
        for table in (ar.class_embedding.weight, ar.lower_position, ar.upper_position, ar.output_position):
            nn.init.normal_(table, std=INIT_STD)
        if self.config.zero_init:
            nn.init.zeros_(self.flow.output_projection.weight)
            nn.init.normal_(self.flow.time_embedding.hidden.weight, std=INIT_STD)
            nn.init.normal_(self.flow.time_embedding.output.weight, std=INIT_STD)
