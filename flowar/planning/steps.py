"""How long a training step takes, and whether it fits. Read next: trace.py, machines.py, engines.py."""

from collections import defaultdict
from dataclasses import dataclass, replace

from flowar.config.models import ModelConfig
from flowar.config.training import ParallelConfig, RecipeConfig
from flowar.models.costs import count_training_flops
from flowar.planning.engines import Layout, Memory, collectives_of, memory_of, seconds_of, sizes_of, trained_share
from flowar.planning.machines import LARGE_COPY_SHARE, Machine, busy, collective_seconds
from flowar.planning.trace import StepTrace, trace_step
from flowar.training.averages import average_names
from flowar.training.setup import split_batch

SPARE_SHARE = 0.1  # of a GPU's memory: CUDA itself, NCCL, cuBLAS, fragmentation of the allocator
SLOWED_SHARE = 0.1  # share of a GPU taken by a collective that runs beside the computation; assumed, not measured
COLLECTIVE_LAUNCH_S = 1e-4  # on the host for each collective, with FSDP2's hooks; assumed
BOOKKEEPING_S = 14e-6  # on the host for each weight between two steps: benchmarks/host.py, 8.3 ms for FlowAR-H
READ_S = 1e-4  # the host waits for losses and norm, then the GPU waits for the host
SMALL = 256  # bytes of losses and norm
SENDING_ONCE = ("ddp", "zero1")  # reduce the gradients of all parts in the last one's backward pass
# Bytes moved for each number on this GPU: norm, clipping, AdamW; and for each averaged number.
UPDATE_BYTES, AVERAGE_BYTES = 4 + 8 + 28, 12


@dataclass(frozen=True)
class PlannedStep:
    """A simulated training step of a model, spread over GPUs."""

    model: ModelConfig
    precision: str
    batch_size: int
    micro: int
    averages: int
    layout: Layout
    trained: float = 1.0  # share of the numbers that are not frozen

    @staticmethod
    def of(config: RecipeConfig, ranks: int, gpus_per_node: int) -> "PlannedStep":
        """Return the step of a run on `ranks` ranks, with the micro batch that the run would take."""
        micro = split_batch(config.batch_size, config.micro_batch_size, ranks)
        layout = Layout(config.parallel, ranks, min(ranks, gpus_per_node))
        averages = len(average_names(config.ema))
        trained = trained_share(config.model, config.optim.frozen)
        return PlannedStep(config.model, config.precision, config.batch_size, micro, averages, layout, trained)

    @property
    def parallel(self) -> ParallelConfig:
        """Engine, recomputation, compilation."""
        return self.layout.parallel

    @property
    def parts(self) -> int:
        """Micro batches of a step on one GPU."""
        return self.batch_size // (self.layout.ranks * self.micro)

    @property
    def trace(self) -> StepTrace:
        """The operations of one part; takes some seconds the first time."""
        return trace_step(self.model, self.precision, self.parallel.checkpoint_every_blocks, self.parallel.compile)

    @property
    def memory(self) -> Memory:
        """The memory that it takes on each GPU."""
        peak = self.trace.peak(self.micro)
        if self.layout.engine == "fsdp" and self.parallel.fsdp_bf16:  # blocks are gathered in bf16, not cast and kept
            peak -= min(max(0, self.trace.peak(0)), 2 * sum(sizes_of(self.model).blocks))
        return memory_of(self.layout, sizes_of(self.model), self.averages, self.parts, max(0, peak), self.trained)


def fits(setting: PlannedStep, machine: Machine, spare: float = SPARE_SHARE) -> bool:
    """Return whether a step fits on a GPU, with this share of its memory to spare."""
    return setting.memory.total <= machine.memory * (1 - spare)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on each GPU."""

    forward_s: float  # of all parts, including communication that isn't hidden
    backward_s: float
    update_s: float  # from the last gradient to the next forward pass
    device_s: float  # what the GPU computes in forward and backward passes
    launch_s: float  # what the host needs to launch these passes
    sent_s: float  # all communication, most of it hidden by the computation

    @property
    def total(self) -> float:
        """The whole step."""
        return self.forward_s + self.backward_s + self.update_s


def time_step(setting: PlannedStep, machine: Machine) -> StepTime:
    """Return how long a step takes.

    Computation and communication overlap, so each pass takes as long as the longer of the two (for engines that send
    once: of the last part's). The first gather of a forward pass and the last reduction of a backward pass overlap with
    nothing.
    """
    layout, sizes = setting.layout, sizes_of(setting.model)
    sent: dict[str, list[float]] = defaultdict(list)
    for collective in collectives_of(layout, sizes, setting.parts):
        sent[collective.when].append(seconds_of(collective, layout, machine))
    part = setting.trace.at(setting.micro)
    passes, device, launch = {}, 0.0, 0.0
    for name, operations in (("forward", part.forward), ("backward", part.backward)):
        work, messages = busy(operations, machine, setting.precision), sent[name]
        on_host = setting.parts * work.launch_s + len(messages) * COLLECTIVE_LAUNCH_S
        computing = max(setting.parts * work.total_s, on_host)
        beside = computing / setting.parts if name == "backward" and layout.engine in SENDING_ONCE else computing
        slowed = beside + SLOWED_SHARE * min(beside, sum(messages))
        alone = (messages[0] if name == "forward" else messages[-1]) if messages else 0.0
        passes[name] = computing - beside + max(slowed, sum(messages)) + alone
        device, launch = device + setting.parts * work.device_s, launch + on_host
    update = update_seconds(setting, machine) + sum(sent["update"])
    return StepTime(passes["forward"], passes["backward"], update, device, launch, sum(map(sum, sent.values())))


def update_seconds(setting: PlannedStep, machine: Machine) -> float:
    """Return how long clipping, AdamW and averages take, and the one sum over all ranks before them."""
    layout, sizes = setting.layout, sizes_of(setting.model)
    is_shared = layout.engine not in ("single", "ddp")
    own = sizes.total // (layout.ranks // layout.replicas) if is_shared else sizes.total
    followed = own if layout.engine == "fsdp" else sizes.total // layout.ranks
    moved = UPDATE_BYTES * own + AVERAGE_BYTES * setting.averages * followed
    agreeing = collective_seconds("all_reduce", SMALL, layout.ranks, layout.per_node, machine, layout.per_node)
    return agreeing + READ_S + max(moved / (machine.bytes_per_s * LARGE_COPY_SHARE), BOOKKEEPING_S * len(sizes.tensors))


def images_per_s(setting: PlannedStep, step: StepTime) -> float:
    """Return how many images all GPUs together train on in a second."""
    return setting.batch_size * setting.model.images_per_sample / step.total


def utilization(setting: PlannedStep, step: StepTime, machine: Machine) -> float:
    """Return the MFU: useful FLOPs over what the GPUs could do."""
    rate = images_per_s(setting, step) * count_training_flops(setting.model)
    return rate / (setting.layout.ranks * machine.matmul[setting.precision])


def largest_micro(setting: PlannedStep, machine: Machine) -> int:
    """Return the largest micro batch that fits and divides a rank's share of the batch; 0 if none fits."""
    share = setting.batch_size // setting.layout.ranks
    sizes = (n for n in range(share, 0, -1) if share % n == 0)
    return next((n for n in sizes if fits(replace(setting, micro=n), machine)), 0)
