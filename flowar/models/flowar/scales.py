"""Token-map arithmetic: offsets, patches, the scale pyramid and who attends to whom; pure functions, no parameters.

Read next: layers.py. Shapes: B batch, C latent channels, p patch side, N tokens of one scale, L tokens of all scales.
"""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.models.attention import Segment

ROTARY_PERIOD = 10_000  # longest, in positions


def num_tokens(scales: tuple[int, ...]) -> int:
    """Return L, the number of tokens of all scales together: 341 for (1, 2, 4, 8, 16)."""
    return sum(side * side for side in scales)


def token_offsets(scales: tuple[int, ...]) -> tuple[int, ...]:
    """Return where each scale starts in the packed tokens, and their end: (0, 1, 5, 21, 85, 341)."""
    return (0, *accumulate(side * side for side in scales))


def token_range(scales: tuple[int, ...], span: range) -> slice:
    """Return where the tokens of the consecutive scales `span` (indices, coarse to fine) lie in the packed tokens."""
    offsets = token_offsets(scales)
    return slice(offsets[span.start], offsets[span.stop])


def patchify(token_map: Tensor, patch_size: int) -> Tensor:
    """Return the tokens (B, N, C p p) of a map (B, C, side p, side p), each flattened in the order (C, p, p)."""
    patches = token_map.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # (B, C, side, p, side, p)
    tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpatchify(tokens: Tensor, side: int, patch_size: int) -> Tensor:
    """Return the map (B, C, side p, side p) of one scale's tokens (B, N, C p p); the inverse of `patchify`."""
    patches = tokens.unflatten(1, (side, side)).unflatten(3, (-1, patch_size, patch_size))  # (B, side, side, C, p, p)
    token_map: Tensor = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return token_map


def downsample(latents: Tensor, side: int) -> Tensor:
    """Return `latents` (B, C, h, w) averaged over areas to (B, C, side, side)."""
    return F.interpolate(latents, size=(side, side), mode="area")


def pack(latents: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Return all scales of `latents` (B, C, h, w) as tokens (B, L, C p p), coarse to fine: the flow's data."""
    return torch.cat([patchify(downsample(latents, side * patch_size), patch_size) for side in scales], dim=1)


def next_input(token_map: Tensor, side: int, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Return the AR Transformer's input tokens (B, side^2, C p p) for the scale `side` that follows `token_map`.

    FlowAR (arXiv:2412.15205), scale-wise autoregression, as released: the coarser map goes up to full size (bicubic),
    then down to the next scale (area).
    """
    full = scales[-1] * patch_size
    upsampled = F.interpolate(token_map, size=(full, full), mode="bicubic", align_corners=False)
    return patchify(downsample(upsampled, side * patch_size), patch_size)


def training_inputs(latents: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Return the AR Transformer's inputs for the scales after the first, (B, L - 1, C p p), from the true coarser maps.

    The first scale has no input here: its token is the class.
    """
    inputs = [
        next_input(downsample(latents, coarser * patch_size), side, scales, patch_size)
        for coarser, side in pairwise(scales)
    ]
    return torch.cat(inputs, dim=1) if inputs else latents.new_zeros(len(latents), 0, latents.shape[1] * patch_size**2)


def causal_segments(scales: tuple[int, ...], span: range) -> list[Segment]:
    """Return the scale-causal attention of the scales `span`: each sees itself and all coarser scales.

    Queries are counted from the start of `span`, keys from the first scale (the cached ones come first).
    """
    offsets = token_offsets(scales)
    first = offsets[span.start]
    return [(slice(offsets[k] - first, offsets[k + 1] - first), slice(0, offsets[k + 1])) for k in span]


def local_segments(scales: tuple[int, ...], span: range) -> list[Segment]:
    """Return the attention inside each scale of `span`, queries and keys counted from the start of `span`."""
    offsets = token_offsets(scales)
    first = offsets[span.start]
    own = [slice(offsets[k] - first, offsets[k + 1] - first) for k in span]
    return list(zip(own, own, strict=True))


def small_mask(segments: list[Segment]) -> Tensor | None:
    """Return who sees whom in all segments but the last, (queries, keys), True where seen; None for one segment."""
    if len(segments) == 1:
        return None
    *others, _ = segments
    mask = torch.zeros(others[-1][0].stop, max(keys.stop for _, keys in others), dtype=torch.bool)
    for queries, keys in others:
        mask[queries, keys] = True
    return mask


def rotary_angles(scales: tuple[int, ...], head_width: int, span: int | None = None) -> Tensor:
    """Return the rotation angles (L, d / 2) of every token of every scale, float32.

    Position i of a grid of `side` stands at i / side * span, so that all scales span the same square; as released, span
    is scales[-1]. The first half of the pairs turns with the row, the second with the column.
    """
    quarter = head_width // 4
    frequencies = ROTARY_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    per_scale = []
    for side in scales:
        positions = torch.arange(side, dtype=torch.float64) / side * (span or scales[-1])
        angles = positions[:, None] * frequencies  # (side, d / 4)
        rows = angles[:, None].expand(side, side, quarter)
        columns = angles[None, :].expand(side, side, quarter)
        per_scale.append(torch.cat([rows, columns], dim=-1).flatten(0, 1))
    return torch.cat(per_scale).float()


def rotary_turns(scales: tuple[int, ...], head_width: int, span: int | None = None) -> Tensor:
    """Return cosine and sine of `rotary_angles`, (L, d / 2, 2) float32."""
    angles = rotary_angles(scales, head_width, span).double()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()
