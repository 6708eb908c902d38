"""The network of ARFlow (arXiv:2501.16085): noisy images of one class, each at its own time -> their velocities.

The released network's time runs from 0 at the noise to 1 at the data, and its velocity points to the data.
`ARFlow.forward` turns both, so that everywhere else time is 0 at the data and velocity is d noisy / d time; no other
file mentions it. Read next: loss.py, generate.py.
Shapes: B sequences, S images of each, N tokens of an image, D width, H heads, d = D / H.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.config.models import ARFlowConfig
from flowar.models.arflow.linear_attention import GATE_DIVISOR, attend_across_images
from flowar.models.family import Model, check_shape
from flowar.models.fused import NORM_EPS
from flowar.models.layers import MAX_PERIOD, TIME_FEATURES, Linear, without_autocast

TABLE_STD = 0.02  # of the label table and the time embedding, as released
MLP_RATIO = 4  # hidden channels of the MLP over its width


class State(NamedTuple):
    """What a model remembers of the images so far. Its size does not depend on how many there were."""

    memories: tuple[Tensor, ...]  # of each block: (B, H, d, d), float32
    num_classes: int  # of the model that made it


class ContinuousTimeEmbedding(nn.Module):
    """Sinusoid of a time in [0, 1], unscaled, cosine first, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TIME_FEATURES, width)
        self.output = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Return the embedding (..., D) of times (...), computed in float32 under autocast too."""
        with without_autocast(time.device):
            half = TIME_FEATURES // 2
            exponents = torch.arange(half, dtype=self.hidden.weight.dtype, device=time.device) / half
            angles = time[..., None].to(exponents.dtype) * torch.exp(-math.log(MAX_PERIOD) * exponents)
            embedding: Tensor = self.output(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], dim=-1))))
            return embedding


class HybridAttention(nn.Module):
    """Softmax attention inside an image plus gated linear attention to the images before it, behind a swish gate."""

    def __init__(self, config: ARFlowConfig) -> None:
        super().__init__()
        self.heads, self.read_decay = config.heads, config.read_decay
        self.query, self.key, self.value, self.swish_gate, self.output = (
            Linear(config.width, config.width, bias=False) for _ in range(5)
        )
        self.decay_gate = Linear(config.width, config.heads, bias=False)

    def forward(self, tokens: Tensor, condition: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the attended tokens (B, S, N, D), and the memory after the last image, (B, H, d, d).

        Args:
            tokens: modulated, (B, S, N, D).
            condition: time and class of each image, not normed, (B, S, D); only the decay gate sees it.
            memory: of the images before, (B, H, d, d); None at the start.
        """
        query, key, value = (self._split(layer(tokens)) for layer in (self.query, self.key, self.value))
        gate = self.decay_gate(tokens + condition[:, :, None]).transpose(2, 3)  # (B, S, H, N)
        with without_autocast(tokens.device):
            log_gate = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / GATE_DIVISOR
        attended, memory = attend_across_images(query, key, value, log_gate, memory, self.read_decay)
        with without_autocast(tokens.device):
            attended = F.rms_norm(attended, attended.shape[-1:], eps=NORM_EPS)  # of each head, without a weight
        joined = attended.transpose(2, 3).flatten(-2)  # (B, S, N, D)
        output: Tensor = self.output(F.silu(self.swish_gate(tokens)) * joined)
        return output, memory

    def _split(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, S, N, D) by head, (B, S, H, N, d), normed over all D channels, as released."""
        normed = F.rms_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)
        heads: Tensor = normed.unflatten(-1, (self.heads, -1)).transpose(2, 3)
        return heads


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, MLP_RATIO * width)
        self.output = nn.Linear(MLP_RATIO * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.output(F.gelu(self.hidden(tokens), approximate="tanh"))
        return output


class ARFlowBlock(nn.Module):
    """Hybrid attention and an MLP, each modulated and gated by time and class (adaLN-zero)."""

    def __init__(self, config: ARFlowConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.attention = HybridAttention(config)
        self.mlp = MLP(config.width)

    def forward(self, tokens: Tensor, condition: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, S, N, D) and the memory (B, H, d, d); arguments as `HybridAttention.forward`."""
        modulation = self.modulation(F.silu(condition))[:, :, None]  # (B, S, 1, 6 D)
        shift, gain, gate, mlp_shift, mlp_gain, mlp_gate = modulation.chunk(6, dim=-1)
        attended, memory = self.attention(modulate(tokens, shift, gain), condition, memory)
        tokens = tokens + gate * attended
        return tokens + mlp_gate * self.mlp(modulate(tokens, mlp_shift, mlp_gain)), memory


class ARFlow(Model):
    """ARFlow (arXiv:2501.16085): one network for training, on sequences, and for sampling, one noisy image a call."""

    config: ARFlowConfig
    positions: Tensor

    def __init__(self, config: ARFlowConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(config.latent_channels, width, patch, stride=patch)
        self.time_embedding = ContinuousTimeEmbedding(width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(ARFlowBlock(config) for _ in range(config.depth))
        self.output_modulation = nn.Linear(width, 2 * width)
        # Velocity, and as much again that the released code computes and drops: it was to be a variance.
        self.output_projection = nn.Linear(width, 2 * config.latent_channels * patch**2)
        self.register_buffer("positions", position_table(config.side, width, config.position_span), persistent=False)
        self.reset_parameters()

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the velocity d noisy / d time of each image, (B, S, C, h, w), and the state after the last image.

        An image sees itself and the earlier images of its sequence: those of this call, and those in `state`. One call
        with S images gives the same as S calls with one.

        Args:
            noisy: images of one class on the path between data and noise, (B, S, C, h, w), the noisiest first.
            time: (B, S) in [0, 1]; 0 is data, 1 is noise.
            labels: (B,) int64, one for each sequence; num_classes is "no class".
            state: what a call with the same sequences returned; None at their start.

        Raises:
            ValueError: if a shape does not fit, or the state is of another batch size, shape or number of classes.
        """
        config = self.config
        batch, images = noisy.shape[:2]
        check_shape("noisy", noisy, (batch, images, *config.latent_shape))
        check_shape("time", time, (batch, images))
        check_shape("labels", labels, (batch,))
        memories: tuple[Tensor | None, ...] = (None,) * config.depth
        if state is not None:
            self.check_state(state, batch)
            memories = state.memories

        tokens = self.patch_embedding(noisy.flatten(0, 1)).flatten(2).mT.unflatten(0, (batch, images))  # (B, S, N, D)
        tokens = tokens.to(noisy.dtype) + self.positions  # under autocast the residual stream stays float32
        condition = self.time_embedding(1 - time) + self.class_embedding(labels)[:, None]  # (B, S, D)
        new_memories = []
        for block, memory in zip(self.blocks, memories, strict=True):
            tokens, new_memory = block(tokens, condition, memory)
            new_memories.append(new_memory)
        shift, gain = self.output_modulation(F.silu(condition))[:, :, None].chunk(2, dim=-1)
        patches = self.output_projection(modulate(tokens, shift, gain))
        velocity = join_patches(patches, config.patch_size)[:, :, : config.latent_channels]
        return -velocity, State(tuple(new_memories), config.num_classes)

    def check_state(self, state: State, batch_size: int) -> None:
        """Raise a ValueError if a state is not of a batch of this size and of a model of this shape."""
        config = self.config
        if state.num_classes != config.num_classes:
            raise ValueError(
                f"the state is of a model with num_classes={state.num_classes}, but this one has {config.num_classes}; "
                "start with state=None"
            )
        head_width = config.width // config.heads
        needed = (batch_size, config.heads, head_width, head_width)
        shapes = [tuple(memory.shape) for memory in state.memories]
        if shapes != [needed] * config.depth:
            found = next((shape for shape in shapes if shape != needed), needed)
            raise ValueError(
                f"the state holds {len(shapes)} memories of shape {found}, but {config.depth} of shape {needed} are "
                "needed; start every batch with state=None"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights as the released code does, with adaLN-zero.

        Xavier for every Linear and the patches, N(0, 0.02^2) for the label table and the time embedding, zero for the
        modulations and the output.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))  # a view
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]  # it has one
        for table in (self.class_embedding, self.time_embedding.hidden, self.time_embedding.output):
            nn.init.normal_(table.weight, std=TABLE_STD)
        modulations = [module.modulation for module in self.modules() if isinstance(module, ARFlowBlock)]
        for layer in (*modulations, self.output_modulation, self.output_projection):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def modulate(tokens: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    """Return layer_norm(tokens) (1 + gain) + shift, for tokens (B, S, N, D) and modulations (B, S, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS), 1 + gain)


def position_table(side: int, width: int, span: int | None = None) -> Tensor:
    """Return the fixed 2-D sine-cosine positions of side x side tokens, (N, D), float32.

    The first half of the channels is of the column, the second of the row; in each half sines come first. Token i
    stands at i / side * span; as released, span is side.
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    positions = torch.arange(side, dtype=torch.float64)
    if span is not None:
        positions = positions / side * span
    angles = positions[:, None] * frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D / 2)
    columns, rows = features[None].expand(side, -1, -1), features[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def join_patches(patches: Tensor, patch_size: int) -> Tensor:
    """Return latents (B, S, C, h, w) of patches (B, S, N, p p C), row by row; channels vary fastest inside a patch."""
    side = math.isqrt(patches.shape[2])
    grid = patches.unflatten(2, (side, side)).unflatten(-1, (patch_size, patch_size, -1))  # (B, S, n, n, p, p, C)
    latents: Tensor = grid.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    return latents
