"""`flowar plan`: memory, communication and time of a training run, before anything is rented.

Bytes of weights, gradients, optimizer and averages are those of the real sharding code, run on tensors without memory
in a process group without processes. Activations are what autograd keeps of one sample, counted on fake tensors. Rates
are assumed, and said so. Read next: parallel.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowar.base.devices import PEAK_TFLOPS, table_tflops
from flowar.base.errors import UserError
from flowar.base.files import GIB
from flowar.config.training import ParallelConfig, PlanConfig
from flowar.latents.schema import read_passport
from flowar.models.build import family_of
from flowar.models.costs import count_training_flops
from flowar.models.family import weigh
from flowar.training.averages import average_names
from flowar.training.engine import prepare_blocks
from flowar.training.setup import split_batch
from flowar.training.torch_engine import make_mesh, shard_model
from flowar.training.zero_engine import BUCKET_SIZE as ZERO_BUCKET

FLOAT32 = 4  # bytes
SPARE_SHARE = 0.1  # of a GPU's memory: allocator, NCCL, cuBLAS
IMAGENET_IMAGES = 1_281_167  # of its training set
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


ROWS = (
    "weights", "gradients", "optimizer", "averages", "gathered", "copies", "a sample", "largest micro batch",
    "sent in a step", "step, seconds", "run, days",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int  # whole weights and gradients of what is being computed

    @property
    def fixed(self) -> int:
        """What doesn't depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.gathered


def count_weights(config: PlanConfig) -> tuple[int, int]:
    """Return the number of weights, and that of the largest block."""
    family = family_of(config.model)
    with torch.device("meta"):
        model = family.create(config.model)
    return count(model), max(count(block) for block in family.blocks(model))


def count(module: torch.nn.Module) -> int:
    """Return the number of weights of a module, on this rank where they are shared out."""
    return sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters())


def shard_size(config: PlanConfig, num_ranks: int) -> int:
    """Return how many weights rank 0 has under FSDP2: the real sharding, with a process group that has no processes."""
    if dist.is_initialized():
        raise UserError("`flowar plan` imagines its processes; start it once, without a launcher")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        mesh = make_mesh("cpu", num_ranks, config.parallel.replicas)
        family = family_of(config.model)
        with torch.device("meta"):
            model = family.create(config.model)
        shard_model(model, family.blocks(model), mesh, config.parallel)
        return count(model)
    finally:
        dist.destroy_process_group()


def memory_of(engine: str, config: PlanConfig, num_ranks: int) -> Memory:
    """Return the bytes on one GPU that don't depend on the batch."""
    total, block = count_weights(config)
    part = shard_size(config, num_ranks) if engine == "fsdp" else -(-total // num_ranks)
    averages = len(average_names(config.ema))
    weights, gradients, optimizer = {
        "ddp": (total, total, 2 * total),
        "fsdp": (part, part, 2 * part),
        "zero1": (total + part, total, 2 * part),  # the flat float32 copy of its part that DeepSpeed keeps
        "zero2": (total + part, part, 2 * part),
        "zero3": (2 * part, part, 2 * part),
    }[engine]
    gathered = gathered_numbers(engine, config.parallel, total, block)
    followed = averages * (part if engine == "fsdp" else -(-total // num_ranks))
    return Memory(*(FLOAT32 * numbers for numbers in (weights, gradients, optimizer, followed, gathered)))


def gathered_numbers(engine: str, parallel: ParallelConfig, total: int, block: int) -> int:
    """Return how many float32 numbers, or as much as them, a GPU holds of others' weights and gradients at a time."""
    if engine == "ddp":
        return 0
    if engine in ("zero1", "zero2"):
        return 2 * min(ZERO_BUCKET, total)  # one is filled while the other one is sent
    if engine == "zero3":
        return 3 * block  # this block, the next one, this one's gradients
    weights = (2 + parallel.fsdp_prefetch) * block if parallel.fsdp_reshard else total
    gradients = total if parallel.fsdp_sync_once else block
    return (weights // 2 if parallel.fsdp_bf16 else weights) + gradients


def activation_bytes(config: PlanConfig) -> tuple[int, int]:
    """Return what autograd keeps for the backward pass, weights aside: of each sample, and whatever the batch.

    The latter are the bfloat16 copies of the weights that autocast makes.
    """
    one, two = (kept_bytes(config, size) for size in (1, 2))
    return two - one, one - (two - one)


def kept_bytes(config: PlanConfig, batch_size: int) -> int:
    """Return what autograd keeps of a forward pass, weights aside, as precision and recomputation say."""
    shape, family = config.model, family_of(config.model)
    draws = family.draw(shape, torch.Generator())
    kept: dict[int, int] = {}
    with FakeTensorMode():
        model = family.create(shape)  # without dropout: on a CPU attention with it keeps much more
        prepare_blocks(family.blocks(model), config.parallel)
        own = {id(p.untyped_storage()) for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in own:
                kept[id(storage)] = storage.nbytes()
            holders.append(tensor)  # or its storage's id could be given to another one
            return tensor

        holders: list[torch.Tensor] = []
        latents = torch.empty(batch_size * shape.images_per_sample, *shape.latent_shape)
        labels = torch.zeros(batch_size, dtype=torch.int64)
        empty = {name: torch.empty(batch_size, *tensor.shape) for name, tensor in draws.items()}
        enabled = config.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            losses = family.losses(model, shape, latents, labels, empty)
            weigh(losses, family.loss_terms(shape).values())
    return sum(kept.values())


def sent_bytes(engine: str, config: PlanConfig, num_ranks: int, parts: int) -> int:
    """Return the bytes that one GPU sends in a step: a gather, a scatter, half an all-reduce send (N - 1) / N."""
    total, _ = count_weights(config)
    # ZeRO 1 and 2 all-reduce buckets that belong to several ranks, and gather the weights once.
    passes: float = {"ddp": 2, "fsdp": 0, "zero1": 3, "zero2": 1 + 2 * parts, "zero3": 3 * parts}[engine]
    if engine == "fsdp":
        gathers = parts * (2 if config.parallel.fsdp_reshard else 1) * (0.5 if config.parallel.fsdp_bf16 else 1)
        passes = gathers + (1 if config.parallel.fsdp_sync_once else parts)
    return int(FLOAT32 * total * passes * (num_ranks - 1) / num_ranks)


def count_images(config: PlanConfig) -> tuple[int, str]:
    """Return how many images the run is trained on, and where the number is from.

    Raises:
        UserError: if data.path is there, but no finished dataset.
    """
    path = config.data.path
    if config.num_images is not None:
        return config.num_images, "num_images"
    if path is not None and Path(path).exists():
        return read_passport(path).num_images, f"data.path={path}"
    why = "no data.path is given" if path is None else f"data.path={path} is not here"
    return IMAGENET_IMAGES, f"ImageNet's, as {why}; num_images=... sets another number"


def main(config: PlanConfig, dry_run: bool = False) -> None:
    """Print the tables."""
    if dry_run:
        return
    num_ranks = config.nodes * config.gpus_per_node
    peak = config.peak_tflops
    if peak is None:
        peak = table_tflops(config.gpu, config.precision)
    elif peak <= 0:
        raise UserError(f"peak_tflops={peak:g} must be above 0")
    if peak is None:
        raise UserError(
            f"gpu={config.gpu} is not in the table: {', '.join(name for name, _ in PEAK_TFLOPS)}; give one of these, "
            "or this one's numbers from its data sheet, for example peak_tflops=71 memory_gib=24 (dense TFLOP/s in "
            f"{config.precision})"
        )
    num_images, source = count_images(config)
    split_batch(config.batch_size, config.micro_batch_size, num_ranks)
    total, _ = count_weights(config)
    activations, copies = activation_bytes(config)
    share = config.batch_size // num_ranks
    flops = count_training_flops(config.model) * (4 / 3 if config.parallel.checkpoint_every_blocks == 1 else 1)
    compute_s = flops * config.model.images_per_sample * share / (peak * 1e12 * config.assumed_mfu)
    steps = config.count_steps(num_images)
    console = Console()
    machines = f"{config.nodes} x {config.gpus_per_node} {config.gpu}"
    rows: dict[str, list[str]] = {}
    best = None
    for engine in ENGINES:
        memory = memory_of(engine, config, num_ranks)
        room = config.memory_gib * GIB * (1 - SPARE_SHARE) - memory.fixed - copies
        micro = max((n for n in range(1, share + 1) if share % n == 0 and n * activations <= room), default=0)
        cells = {name: f"{value / GIB:.2f}" for name, value in (vars(memory) | {"copies": copies}).items()}
        cells |= {"a sample": f"{activations / GIB:.3f}", "largest micro batch": f"{micro}" if micro else "none"}
        step_s = compute_s
        if micro:
            sent = sent_bytes(engine, config, num_ranks, share // micro)
            if num_ranks > 1:
                step_s = max(compute_s, sent / (config.assumed_gb_per_s * 1e9))
            cells |= {"sent in a step": f"{sent / GIB:.1f}", "step, seconds": f"{step_s:.2f}"}
            cells |= {"run, days": f"{steps * step_s / 86400:.1f}"}
        for name in ROWS:
            rows.setdefault(name, []).append(cells.get(name, "-"))
        if not micro:
            continue
        if best is None or step_s < best[1]:
            best = (engine, step_s)
    table = Table(
        "GiB per GPU", *ENGINES,
        title=f"{config.model.variant}, {total / 1e6:,.0f} M weights, on {machines}",
    )  # fmt: skip
    for name, row in rows.items():
        table.add_row(name, *row)
    console.print(table)
    print(f"Trained on {num_images:,} images ({source}), {config.epochs:g} epochs of them.")
    print(
        "Counted: weights, gradients, optimizer, averages (float32; fsdp by torch's own sharding), bfloat16 copies of "
        f"weights, and what autograd keeps of a sample ({config.precision}). Assumed: {config.assumed_mfu:.0%} of "
        f"{peak:g} TFLOP/s, {config.assumed_gb_per_s:g} GB/s between GPUs hidden behind the computation, "
        f"{SPARE_SHARE:.0%} of the memory spare. No GPU was measured."
    )
    if best is None:
        print("No engine fits: set parallel.checkpoint_every_blocks=1, or use more or larger GPUs.")
    else:
        print(f"Suggested: {best[0]} (the first of the quickest), {steps:,} steps of {best[1]:.2f} s.")
