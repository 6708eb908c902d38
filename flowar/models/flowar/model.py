"""FlowAR: an autoregressive Transformer over scales gives semantics, a flow matching one turns them into velocity.

Here is no loss, no solver, no rank and no file. Read next: flow.py. Shapes: B batch, C latent channels, p patch side,
D width of the AR Transformer, E width of the flow Transformer, N tokens at hand, L tokens of all K scales.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.config.models import FlowARConfig
from flowar.models.attention import Segment
from flowar.models.family import Model
from flowar.models.flowar.scales import causal_segments, local_segments, num_tokens, rotary_angles, token_range
from flowar.models.layers import (
    CrossAttention,
    GatedMLP,
    SelfAttention,
    TimeEmbedding,
    modulate,
    rms_norm,
)

INIT_STD = 0.02  # of the label and position tables (the released code); of the time embedding with zero_init

KeyValueCache = list[tuple[Tensor, Tensor]]  # per block: keys and values of all tokens so far, (B, tokens, heads, d)


class AutoregressiveBlock(nn.Module):
    """Scale-causal attention and gated MLP, modulated by the class through adaLN."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width, dropout = config.ar_width, config.dropout
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm = rms_norm(width, weight=False)
        self.attention = SelfAttention(width, config.ar_heads, qkv_bias=True, dropout=dropout)
        self.mlp_norm = rms_norm(width, weight=False)
        self.mlp = GatedMLP(width, dropout)

    def forward(
        self,
        tokens: Tensor,
        class_embedding: Tensor,
        angles: Tensor,
        segments: list[Segment],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the tokens (B, N, D) after the block, and its keys and values so far."""
        modulation = self.modulation(F.silu(class_embedding))[:, None]  # (B, 1, 6 D)
        gate_1, gate_2, gain_1, gain_2, shift_1, shift_2 = modulation.chunk(6, dim=-1)
        attended, present = self.attention(
            modulate(self.attention_norm(tokens), gain_1, shift_1), angles, segments, past
        )
        tokens = tokens + gate_1 * attended
        return tokens + gate_2 * self.mlp(modulate(self.mlp_norm(tokens), gain_2, shift_2)), present


class AutoregressiveTransformer(nn.Module):
    """Coarser token maps and a class -> one semantics vector per token of the scales at hand."""

    angles: Tensor

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width, half = config.ar_width, config.ar_depth // 2
        tokens = num_tokens(config.scales)
        self.scales = config.scales
        self.input_projection = nn.Linear(config.token_width, width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row is "no class"
        self.lower_position = nn.Parameter(torch.empty(tokens, width))
        self.input_norm = rms_norm(width, weight=True)
        self.lower_blocks = nn.ModuleList(AutoregressiveBlock(config) for _ in range(half))
        self.middle_norm = rms_norm(width, weight=True)
        self.middle_projection = nn.Linear(width, width)
        self.upper_position = nn.Parameter(torch.empty(tokens, width))
        self.upper_blocks = nn.ModuleList(AutoregressiveBlock(config) for _ in range(half))
        self.output_norm = rms_norm(width, weight=True)
        self.output_position = nn.Parameter(torch.empty(tokens, width))
        self.register_buffer("angles", rotary_angles(config.scales, width // config.ar_heads), persistent=False)

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
            cache: what the call for the scales before `span` returned; None where `span` starts at 0.
        """
        where = token_range(self.scales, span)
        segments = causal_segments(self.scales, span)
        angles = self.angles[where]
        class_embedding = self.class_embedding(labels)
        blocks = [*self.lower_blocks, *self.upper_blocks]
        past: Sequence[tuple[Tensor, Tensor] | None] = cache or [None] * len(blocks)
        present = []

        tokens = self.input_norm(self.embed(inputs, labels, span) + self.lower_position[where])
        for index, block in enumerate(blocks):
            if index == len(self.lower_blocks):
                tokens = self.middle_projection(self.middle_norm(tokens)) + self.upper_position[where]
            tokens, keys_values = block(tokens, class_embedding, angles, segments, past[index])
            present.append(keys_values)
        return self.output_norm(tokens) + self.output_position[where], present


class FlowBlock(nn.Module):
    """Attention inside a scale and gated MLP, modulated per token by time + semantics: Spatial-adaLN (`attn_mlp`)."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm = rms_norm(width, weight=False)
        self.attention = SelfAttention(width, config.flow_heads, qkv_bias=False)
        self.mlp_norm = rms_norm(width, weight=False)
        self.mlp = GatedMLP(width)

    def forward(
        self,
        tokens: Tensor,
        time: Tensor,
        condition: Tensor,
        semantics: Tensor,
        angles: Tensor,
        segments: list[Segment],
    ) -> Tensor:
        modulation = self.modulation(F.silu(time + condition))  # (B, N, 6 E)
        gate_1, gate_2, gain_1, gain_2, shift_1, shift_2 = modulation.chunk(6, dim=-1)
        attended, _ = self.attention(modulate(self.attention_norm(tokens), gain_1, shift_1), angles, segments)
        tokens = tokens + gate_1 * attended
        output: Tensor = tokens + gate_2 * self.mlp(modulate(self.mlp_norm(tokens), gain_2, shift_2))
        return output


class CrossAttentionFlowBlock(nn.Module):
    """Time-modulated attention, cross-attention to the semantics, Spatial-adaLN MLP (`attn_cross_mlp`)."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        self.attention_modulation = nn.Linear(width, 3 * width)
        self.attention_norm = rms_norm(width, weight=False)
        self.attention = SelfAttention(width, config.flow_heads, qkv_bias=False)
        self.query_norm = rms_norm(width, weight=True)
        self.semantics_norm = rms_norm(config.ar_width, weight=True)
        self.cross_attention = CrossAttention(width, config.flow_heads, context_width=config.ar_width)
        self.mlp_modulation = nn.Linear(width, 3 * width)
        self.mlp_norm = rms_norm(width, weight=False)
        self.mlp = GatedMLP(width)

    def forward(
        self,
        tokens: Tensor,
        time: Tensor,
        condition: Tensor,
        semantics: Tensor,
        angles: Tensor,
        segments: list[Segment],
    ) -> Tensor:
        gate, gain, shift = self.attention_modulation(F.silu(time)).chunk(3, dim=-1)  # (B, N, E)
        attended, _ = self.attention(modulate(self.attention_norm(tokens), gain, shift), angles, segments)
        tokens = tokens + gate * attended
        context = self.semantics_norm(semantics)
        tokens = tokens + self.cross_attention(self.query_norm(tokens), context, angles, segments)
        gate, gain, shift = self.mlp_modulation(F.silu(condition + time)).chunk(3, dim=-1)
        output: Tensor = tokens + gate * self.mlp(modulate(self.mlp_norm(tokens), gain, shift))
        return output


class FlowMatchingTransformer(nn.Module):
    """Noisy tokens, their time and their semantics -> velocity; scales never see each other here."""

    angles: Tensor

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        width = config.flow_width
        block = FlowBlock if config.flow_block == "attn_mlp" else CrossAttentionFlowBlock
        self.scales = config.scales
        self.input_projection = nn.Linear(config.token_width, width)
        self.time_embedding = TimeEmbedding(width)
        self.condition_projection = nn.Linear(config.ar_width, width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.flow_depth))
        self.output_norm = rms_norm(width, weight=False)
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output_projection = nn.Linear(width, config.token_width)
        self.register_buffer("angles", rotary_angles(config.scales, width // config.flow_heads), persistent=False)

    def forward(self, noisy: Tensor, time: Tensor, semantics: Tensor, span: range) -> Tensor:
        """Return the velocity (B, N, C p p), d noisy / d time, of the scales `span`.

        Args:
            noisy: tokens on the path between data and noise, (B, N, C p p).
            time: (B, len(span)) in [0, 1], one per sample and scale; 0 is data, 1 is noise.
            semantics: (B, N, D), from the AR Transformer.
            span: indices of the consecutive scales that `noisy` holds.
        """
        segments = local_segments(self.scales, span)
        angles = self.angles[token_range(self.scales, span)]
        tokens = self.input_projection(noisy).to(noisy.dtype)  # under autocast the residual stream stays float32
        per_scale = self.time_embedding(time).split(1, dim=1)  # (B, 1, E) each
        time = torch.cat(
            [own.expand(-1, self.scales[k] ** 2, -1) for own, k in zip(per_scale, span, strict=True)], dim=1
        )  # (B, N, E)
        condition = self.condition_projection(semantics)
        for block in self.blocks:
            tokens = block(tokens, time, condition, semantics, angles, segments)
        shift, gain = self.output_modulation(F.silu(condition + time)).chunk(2, dim=-1)
        velocity: Tensor = self.output_projection(modulate(self.output_norm(tokens), gain, shift))
        return velocity


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
