"""Hybrid attention of ARFlow: softmax inside an image, gated linear attention to the images before it.

Each image sees a memory of the earlier ones, one matrix (d, d) per head: no cost grows with their number. The memory is
passed in and returned. `sequence_memories` (training) and `step_memory` (sampling) give the same numbers.
Shapes: B sequences, S images of each, N tokens of an image, H heads, d channels of a head. Read next: model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.config.models import ReadDecayName
from flowar.models.layers import without_autocast

GATE_DIVISOR = 16  # of the log gates, as released: gates start near 1


def attend_across_images(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, memory: Tensor | None, read_decay: ReadDecayName
) -> tuple[Tensor, Tensor]:
    """Return what each token sees of its own image and of the earlier ones, (B, S, H, N, d), and the new memory.

    ARFlow, hybrid attention as released: o_s = softmax(q_s k_s^T) v_s + (rho_s q_s) R_s with keys scaled by d^(-1/2),
    and R_(s+1) = Gamma_s R_s + k_s^T v_s. R_s holds the images before s alone; inside one all tokens see each other.
    rho is `read_factors`, Gamma the geometric mean of an image's gates.

    Args:
        query, key, value: (B, S, H, N, d), normed, not scaled.
        log_gate: (B, S, H, N), at most 0, float32.
        memory: R_0, (B, H, d, d) from keys to values, float32; None: no image came before.
        read_decay: as `read_factors`.
    """
    key = key * query.shape[-1] ** -0.5
    flat_query, flat_key, flat_value = (part.flatten(0, 1) for part in (query, key, value))
    inside = F.scaled_dot_product_attention(flat_query, flat_key, flat_value, scale=1.0)  # (B S, H, N, d)
    inside = inside.unflatten(0, query.shape[:2])

    with without_autocast(query.device):  # sums over many images are float32, even if attention inside is not
        query, key, value = (part.to(log_gate.dtype) for part in (query, key, value))
        read_query = read_factors(log_gate, read_decay)[..., None] * query
        added = key.mT @ value  # (B, S, H, d, d)
        log_decay = log_gate.mean(dim=-1)  # (B, S, H)
        if query.shape[1] == 1:
            before, after = step_memory(added[:, 0], log_decay[:, 0], memory)
            return (inside if before is None else inside + read_query @ before[:, None]), after
        memories = sequence_memories(added, log_decay, memory)
        return inside + read_query @ memories[:, :-1], memories[:, -1]


def read_factors(log_gate: Tensor, read_decay: ReadDecayName) -> Tensor:
    """Return by what factor each token's reading of the memory is weakened, (B, S, H, N), from its log gates.

    "running" multiplies the gates of all tokens up to it in raster order, anew in each image, as released; the last
    tokens of an image can then hardly read. "own" takes a token's own gate alone.
    """
    return (log_gate.cumsum(dim=-1) if read_decay == "running" else log_gate).exp()


def step_memory(added: Tensor, log_decay: Tensor, memory: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return the memory that one image reads, and the one after it, (B, H, d, d): the recurrent form.

    Args:
        added: k^T v of the image, (B, H, d, d).
        log_decay: log Gamma of the image, (B, H).
        memory: of the images before it, or None.
    """
    if memory is None:
        return None, added
    return memory, torch.addcmul(added, log_decay.exp()[..., None, None], memory)


def sequence_memories(added: Tensor, log_decay: Tensor, memory: Tensor | None) -> Tensor:
    """Return the memory before each image of a sequence and after the last, (B, S + 1, H, d, d): the chunked form.

    R_s is the sum of k_j^T v_j over j < s, each times the decays of the images between j and s: one matrix product.

    Args:
        added: k^T v of each image, (B, S, H, d, d).
        log_decay: log Gamma of each image, (B, S, H).
        memory: of the images before the first, (B, H, d, d), or None.
    """
    images = added.shape[1]
    elapsed = F.pad(log_decay.cumsum(dim=1), (0, 0, 1, 0)).transpose(1, 2)  # (B, H, S + 1): log of all decays before s
    between = elapsed[:, :, :, None] - elapsed[:, :, None, 1:]  # (B, H, S + 1, S): of the decays after j, before s
    is_future = torch.ones(images + 1, images, dtype=torch.bool, device=added.device).triu()
    weights = between.masked_fill(is_future, float("-inf")).exp()
    memories = torch.einsum("bhsj,bjhkv->bshkv", weights, added)
    if memory is not None:
        memories = memories + elapsed.exp().transpose(1, 2)[..., None, None] * memory[:, None]
    return memories
