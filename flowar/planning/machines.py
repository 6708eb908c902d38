"""Models of GPUs and networks, and the time of operations and collectives on them. Read next: engines.py, steps.py.

Each operation has a roofline: the longer of its arithmetic and its traffic, each at a share of the data sheet's rate.
The shares were fitted once, to FlowAR-L on one H100 (benchmarks/planning.py); other GPUs are assumed to reach the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flowar.base.devices import table_tflops
from flowar.base.errors import UserError
from flowar.base.files import GIB
from flowar.planning.operations import Operation

# The four fitted constants: the shares of data-sheet rates that matrix products and eager operations reach.
MATMUL_SHARES = {"bf16": 0.71, "fp16": 0.71, "tf32": 0.42, "fp32": 0.77}
EAGER_SHARE = 0.54

# Not fitted.
LARGE_COPY_SHARE = 0.9  # compiled kernels and matrix products: what a large copy reaches on an H100, 3.0 TB/s
LEAST_S = 3e-6  # of any kernel: its start and end
EAGER_LAUNCH_S, COMPILED_LAUNCH_S = 8e-6, 4e-6  # on the host, for each; typical of a server's CPU
QUEUE = 1024  # launches that the host can be ahead of the GPU
LINK_SHARE = 0.8  # of NVLink's rate that NCCL reaches: about 360 of 450 GB/s in nccl-tests on 8 H100
PROTOCOL_SHARE = 120 / 128  # NCCL's LL128 sends 120 bytes of data in 128
# NCCL's own table for LL128 (nccl, src/graph/tuning.cc), microseconds: start, one hop inside a node, one between nodes.
RING_US, TREE_US = (14.0, 1.9, 4.0), (14.0, 1.25, 8.5)

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]

# Memory in GiB, its GB/s, and GB/s each way to the other GPUs of a node, from NVIDIA's data sheets; rates of matrix
# products are in flowar/base/devices.py. The first row whose name is part of the GPU's name counts.
GPUS = (
    ("H200", 140, 4800, 450), ("H100 PCIe", 79, 2000, 64), ("H100", 79, 3350, 450), ("A100 40GB", 39, 1555, 300),
    ("A100", 79, 2039, 300), ("L40S", 44, 864, 32), ("A40", 44, 696, 32), ("V100", 31, 900, 150),
    # Cards with 24 GB. GeForce cards send over PCIe, through the host's memory, so 32 is more than they reach.
    ("A10", 22, 600, 32), ("RTX 4090", 23, 1008, 32), ("RTX 3090", 23, 936, 32),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """One kind of GPU, its node and its network."""

    gpu: str
    memory: int  # bytes of a GPU that a process can have
    matmul: dict[str, float]  # FLOP/s at most, by precision
    bytes_per_s: float  # of its memory
    link: float  # bytes/s that one GPU sends to others of its node
    rail: float  # bytes/s that one GPU's network card sends
    gpus_per_node: int


def find_machine(
    gpu: str,
    gpus_per_node: int,
    rail_gb_per_s: float,
    *,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    memory_gb_per_s: float | None = None,
) -> Machine:
    """Return a machine from the table; given values override it.

    Args:
        gpu: its name, or one that contains a name of the table.
        gpus_per_node: number of GPUs in a node, each with a network card.
        rail_gb_per_s: of a network card.
        memory_gib: of a GPU.
        peak_tflops: dense TFLOP/s in the training's precision.
        memory_gb_per_s: of its memory.

    Raises:
        UserError: if the GPU isn't in the table and not all numbers are given.
    """
    found = next((row for row in GPUS if row[0] in gpu), None)
    if found is None and None in (memory_gib, peak_tflops, memory_gb_per_s):
        raise UserError(
            f"gpu={gpu} is not in the table: {', '.join(row[0] for row in GPUS)}; give one of these, or the numbers "
            "from the GPU's data sheet, for example peak_tflops=71 (dense, in the training's precision) "
            "memory_gib=24 memory_gb_per_s=768"
        )
    _, table_gib, table_rate, link = found or (gpu, 0, 0, 32)
    rates = {name: 1e12 * (peak_tflops or table_tflops(gpu, name) or 0) for name in MATMUL_SHARES}
    memory = int((memory_gib or table_gib) * GIB)
    rate = 1e9 * (memory_gb_per_s or table_rate)
    return Machine(gpu, memory, rates, rate, 1e9 * link * LINK_SHARE, 1e9 * rail_gb_per_s, gpus_per_node)


def operation_seconds(operation: Operation, machine: Machine, precision: str) -> float:
    """Return how long the GPU works on an operation.

    Args:
        operation: what it does.
        machine: to run on.
        precision: of the run: with tf32, products of float32 are TF32, but attention is float32.
    """
    kind = "bf16" if operation.is_half else "tf32" if precision == "tf32" and operation.kind == "matmul" else "fp32"
    at_full_rate = operation.is_fused or operation.kind != "other"
    moving = operation.moved / (machine.bytes_per_s * (LARGE_COPY_SHARE if at_full_rate else EAGER_SHARE))
    return max(operation.flops / (machine.matmul[kind] * MATMUL_SHARES[kind]), moving) + LEAST_S


def launch_seconds(operation: Operation) -> float:
    """Return how long the host takes to launch an operation."""
    return COMPILED_LAUNCH_S if operation.is_fused else EAGER_LAUNCH_S


@dataclass(frozen=True)
class Busy:
    """How long operations take."""

    total_s: float  # host and GPU, which overlap up to the length of the queue
    device_s: float  # of the GPU alone
    launch_s: float  # of the host alone


def busy(operations: Sequence[Operation], machine: Machine, precision: str) -> Busy:
    """Return how long operations take one after the other, with the host ahead of the GPU by at most its queue."""
    total = device = launch = 0.0
    for begin in range(0, len(operations), QUEUE):
        some = operations[begin : begin + QUEUE]
        on_device = sum(operation_seconds(each, machine, precision) for each in some)
        on_host = sum(map(launch_seconds, some))
        device, launch, total = device + on_device, launch + on_host, total + max(on_device, on_host)
    return Busy(total, device, launch)


def collective_seconds(kind: Kind, size: int, ranks: int, per_node: int, machine: Machine, rails: int) -> float:
    """Return how long a collective takes: latency, and bytes over the slowest link of NCCL's rings.

    A node has one ring per network card, each with its share of the bytes, so a card passes 1 / rails of what a GPU's
    links pass.

    Args:
        kind: what it does.
        size: bytes of the whole tensor that is reduced or gathered.
        ranks: number that take part.
        per_node: how many of them are in one node.
        machine: GPUs and network.
        rails: network cards of a node that only these ranks use.
    """
    if ranks == 1:
        return 0.0
    nodes, passes = math.ceil(ranks / per_node), 2 if kind == "all_reduce" else 1
    places = ([machine.link] if per_node > 1 else []) + ([machine.rail * rails] if nodes > 1 else [])
    sent = passes * size * (ranks - 1) / ranks
    start, inside, between = RING_US
    latency = start + passes * ((ranks - nodes) * inside + (nodes - 1) * between)
    if kind == "all_reduce":
        start, inside, between = TREE_US
        latency = min(latency, start + 2 * ((per_node - 1) * inside + math.log2(nodes) * between))
    return latency * 1e-6 + sent / (min(places) * PROTOCOL_SHARE)
