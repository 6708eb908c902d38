"""What each engine keeps on a GPU, and what it sends in a step. Read next: torch_engine.py, zero_engine.py, steps.py.

Tests compare both with the engines themselves: bytes with a real rank, collectives with those of 64 simulated ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from flowar.config.models import ModelConfig
from flowar.config.training import ParallelConfig
from flowar.models.build import family_of
from flowar.planning.machines import Kind, Machine, collective_seconds
from flowar.training.engine import engine_name
from flowar.training.optim import freeze_parts
from flowar.training.torch_engine import has_norm_weight
from flowar.training.zero_engine import BUCKET_SIZE as ZERO_BUCKET

FLOAT32 = 4  # bytes
FIRST_DDP_BUCKET, DDP_BUCKET = 2**20, 25 * 2**20  # bytes: torch's defaults
ZERO_SMALL = 100_000  # numbers: smaller tensors are never sharded (DeepSpeed's stage3_param_persistence_threshold)

When = Literal["forward", "backward", "update"]


@dataclass(frozen=True)
class Sizes:
    """How many parameters a model has, and where."""

    tensors: tuple[tuple[int, ...], ...]  # shapes of all weights
    blocks: tuple[int, ...]  # numbers of each block
    norms: tuple[int, ...]  # numbers of each block's norms
    modules: tuple[int, ...]  # numbers of each module that has its own weights

    @property
    def total(self) -> int:
        """All numbers of the model."""
        return sum(map(math.prod, self.tensors))

    def part(self, ranks: int) -> int:
        """Return how many numbers the first of `ranks` ranks has under FSDP2, which splits each weight by rows."""
        return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in self.tensors)


@lru_cache
def sizes_of(config: ModelConfig) -> Sizes:
    """Return the sizes of a model."""
    family = family_of(config)
    with torch.device("meta"):
        model = family.create(config)
    blocks = family.blocks(model)
    return Sizes(
        tuple(tuple(p.shape) for p in model.parameters()),
        tuple(_numbers(block) for block in blocks),
        tuple(sum(_numbers(m) for m in block.modules() if has_norm_weight(m)) for block in blocks),
        tuple(n for m in model.modules() if (n := sum(p.numel() for p in m.parameters(recurse=False)))),
    )


@lru_cache
def trained_share(config: ModelConfig, frozen: tuple[str, ...]) -> float:
    """Return which share of a model's numbers is trained, if parameters of these patterns are frozen.

    Raises:
        UserError: as `freeze_parts`.
    """
    with torch.device("meta"):
        model = family_of(config).create(config)
    freeze_parts(model, frozen)
    trained: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / _numbers(model)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs."""

    parallel: ParallelConfig
    ranks: int
    gpus_per_node: int

    @property
    def engine(self) -> str:
        """single, ddp, fsdp, zero1, zero2 or zero3."""
        name = engine_name(self.parallel.engine, self.ranks)
        return f"zero{self.parallel.zero_stage}" if name == "deepspeed" else name

    @property
    def replicas(self) -> int:
        """Number of groups of ranks that each hold all weights together."""
        return self.parallel.replicas if self.engine == "fsdp" else 1

    @property
    def per_node(self) -> int:
        """Ranks in a node."""
        return min(self.ranks, self.gpus_per_node)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int  # whole weights and gradients of what is being computed, or buckets
    activations: int = 0  # and everything else that is alive at the peak

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())


def memory_of(layout: Layout, sizes: Sizes, averages: int, parts: int, peak: int = 0, trained: float = 1.0) -> Memory:
    """Return the bytes on one GPU.

    Args:
        layout: engine and ranks.
        sizes: of the model.
        averages: how many averages the run keeps.
        parts: micro batches of a step.
        peak: of a part's activations.
        trained: share of the numbers that have gradients and an optimizer state; the others are frozen.
    """
    total, engine = sizes.total, layout.engine
    share = -(-total // layout.ranks)
    part = sizes.part(layout.ranks // layout.replicas) if engine == "fsdp" else share
    all_trained, own = math.ceil(trained * total), math.ceil(trained * part)
    weights, gradients, optimizer = {
        "single": (total, all_trained, 2 * all_trained),
        "ddp": (total, all_trained, 2 * all_trained),
        "fsdp": (part, own, 2 * own),
        "zero1": (total + own, all_trained, 2 * own),  # the flat float32 copy of its part that DeepSpeed keeps
        "zero2": (total + own, own, 2 * own),
        "zero3": (part + own, own, 2 * own),
    }[engine]
    if layout.parallel.zero_offload and engine.startswith("zero"):
        weights, optimizer = weights - own, 0
    gathered = gathered_numbers(layout, sizes)
    followed = averages * (part if engine == "fsdp" else share)
    if engine == "single" and parts == 1:  # gradients are allocated as activations are freed
        peak = max(0, peak - FLOAT32 * gradients)
    return Memory(
        FLOAT32 * weights, FLOAT32 * gradients, FLOAT32 * optimizer, FLOAT32 * followed, FLOAT32 * gathered, peak
    )


def gathered_numbers(layout: Layout, sizes: Sizes) -> int:
    """Return how much a GPU holds of other ranks' weights and gradients at a time, counted in float32 numbers."""
    engine, parallel, total, block = layout.engine, layout.parallel, sizes.total, max(sizes.blocks)
    if engine in ("single", "ddp"):
        return 0
    if engine in ("zero1", "zero2"):
        return 2 * min(ZERO_BUCKET, total)  # one bucket is filled while the other is sent
    if engine == "zero3":
        return 3 * block  # this block, the next one, this one's gradients
    weights = (2 + parallel.fsdp_prefetch) * block if parallel.fsdp_reshard else total
    gradients = total if parallel.fsdp_sync_once else block
    return (weights // 2 if parallel.fsdp_bf16 else weights) + gradients


class Collective(NamedTuple):
    """A communication that all ranks of a group do together."""

    kind: Kind
    size: int  # bytes of the whole tensor
    when: When
    of_replicas: bool = False  # among ranks with the same part; else among ranks that share all weights


def collectives_of(layout: Layout, sizes: Sizes, parts: int) -> list[Collective]:
    """Return the collectives of one step, without the small one for losses and norm."""
    if layout.ranks == 1:
        return []
    if layout.engine == "ddp":
        return [Collective("all_reduce", size, "backward") for size in ddp_buckets(sizes)]
    found = _fsdp_step(layout, sizes, parts) if layout.engine == "fsdp" else _zero_step(layout.engine, sizes, parts)
    return list(found)


def ddp_buckets(sizes: Sizes) -> list[int]:
    """Return the bytes of each of DDP's buckets."""
    with torch.device("meta"):
        tensors = [torch.empty(shape) for shape in sizes.tensors[::-1]]
    buckets, _ = dist._compute_bucket_assignment_by_size(tensors, [FIRST_DDP_BUCKET, DDP_BUCKET])
    return [sum(tensors[index].nbytes for index in bucket) for bucket in buckets]


def _fsdp_step(layout: Layout, sizes: Sizes, parts: int) -> Iterator[Collective]:
    parallel, shards = layout.parallel, layout.ranks // layout.replicas
    groups: list[tuple[int, int, bool]] = []  # numbers, bytes per number, whether they are gathered twice
    for block, norms in zip(sizes.blocks, sizes.norms, strict=True):
        if parallel.fsdp_bf16 and norms:
            groups.append((norms, FLOAT32, False))
        own = block - norms if parallel.fsdp_bf16 else block
        groups.append((own, 2 if parallel.fsdp_bf16 else FLOAT32, parallel.fsdp_reshard))
    groups.append((sizes.total - sum(sizes.blocks), FLOAT32, False))
    for part in range(parts):
        for numbers, each, is_twice in groups:
            if shards > 1:
                yield Collective("all_gather", numbers * each, "forward")
                if is_twice:
                    yield Collective("all_gather", numbers * each, "backward")
            if part == parts - 1 or not parallel.fsdp_sync_once:
                if shards > 1:
                    yield Collective("reduce_scatter", numbers * FLOAT32, "backward")
                if layout.replicas > 1:
                    yield Collective("all_reduce", numbers * FLOAT32 // shards, "backward", of_replicas=True)


def _zero_step(engine: str, sizes: Sizes, parts: int) -> Iterator[Collective]:
    buckets = [ZERO_BUCKET] * (sizes.total // ZERO_BUCKET) + [sizes.total % ZERO_BUCKET]
    if engine == "zero3":
        shared = [numbers for numbers in sizes.modules if numbers >= ZERO_SMALL]
        for _ in range(parts):
            yield from (Collective("all_gather", FLOAT32 * numbers, "forward") for numbers in shared)
            yield from (Collective("all_gather", FLOAT32 * numbers, "backward") for numbers in shared)
            yield from (Collective("reduce_scatter", FLOAT32 * numbers, "backward") for numbers in buckets)
        return
    for _ in range(parts if engine == "zero2" else 1):  # a bucket that belongs to several ranks is reduced for all
        yield from (Collective("all_reduce", FLOAT32 * numbers, "backward") for numbers in buckets)
    yield from (Collective("all_gather", FLOAT32 * numbers, "update") for numbers in buckets)


def seconds_of(collective: Collective, layout: Layout, machine: Machine) -> float:
    """Return how long a collective takes.

    Ranks that share all weights are neighbours, so their rings use all network cards of a node. The GPUs of a node
    that have different parts divide these cards among their groups of replicas.
    """
    shards = layout.ranks // layout.replicas
    if not collective.of_replicas:
        inside = min(shards, layout.per_node)
        return collective_seconds(collective.kind, collective.size, shards, inside, machine, inside)
    inside = max(1, layout.per_node // shards)
    return collective_seconds(collective.kind, collective.size, layout.replicas, inside, machine, inside)
