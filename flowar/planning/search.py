"""Try every way to train a model on given machines, the fastest first. Read next: steps.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from flowar.base.files import GIB
from flowar.config.training import ParallelConfig
from flowar.planning.engines import Layout
from flowar.planning.machines import Machine
from flowar.planning.steps import PlannedStep, StepTime, fits, largest_micro, time_step

WAYS_TO_COMPUTE = ((0, True), (0, False), (1, True), (1, False))  # recomputed blocks, every n-th; compiled
MICROS = 3  # micro batches that are tried for each way, the largest that fit


class Found(NamedTuple):
    """One way to train, and its time."""

    setting: PlannedStep
    step: StepTime


def ways_to_share(ranks: int, nodes: int, precision: str) -> Iterator[dict[str, object]]:
    """Yield the settings of `parallel` that let ranks share the work."""
    if ranks == 1:
        yield {"engine": "single"}
        return
    yield {"engine": "ddp"}
    for replicas in sorted({1, nodes}):
        for halves in (False, True) if precision == "bf16" else (False,):
            for reshard in (True, False):
                yield {"engine": "fsdp", "replicas": replicas, "fsdp_bf16": halves, "fsdp_reshard": reshard}
    for stage in (1, 2, 3):
        yield {"engine": "deepspeed", "zero_stage": stage}


def search(setting: PlannedStep, machine: Machine, nodes: int) -> tuple[list[Found], list[str]]:
    """Return the ways that fit, the fastest first, and for each way that doesn't fit, the memory it would need.

    Args:
        setting: model, batch, precision and ranks; the search varies the rest.
        machine: to train on.
        nodes: number of nodes.
    """
    found, refused = [], []
    layout, share = setting.layout, setting.batch_size // setting.layout.ranks
    for shared in ways_to_share(layout.ranks, nodes, setting.precision):
        ways = []
        for every, compiled in WAYS_TO_COMPUTE:
            if compiled and shared.get("fsdp_bf16"):
                continue  # norms are gathered separately, and their hooks break the blocks' graphs
            parallel = ParallelConfig(**shared, checkpoint_every_blocks=every, compile=compiled)  # type: ignore[arg-type]
            ways.append(replace(setting, micro=1, layout=replace(layout, parallel=parallel)))
        fitting = [
            replace(way, micro=micro)
            for way in ways
            if (largest := largest_micro(way, machine))
            for micro in [n for n in range(largest, 0, -1) if share % n == 0][:MICROS]
        ]
        found += [Found(way, time_step(way, machine)) for way in fitting]
        if not fitting:
            least = min(ways, key=lambda way: way.memory.total)
            refused.append(f"{way_of(least)} needs {least.memory.total / GIB:.0f} GiB")
    return sorted(found, key=lambda each: each.step.total), refused


def way_of(setting: PlannedStep) -> str:
    """Return how a model is spread and recomputed, as settings for `flowar train`."""
    default, parallel = ParallelConfig(), setting.parallel
    names = [name for name in vars(default) if getattr(parallel, name) != getattr(default, name)]
    words = [f"{name}={str(getattr(parallel, name)).lower()}" for name in names]
    return " ".join([*words, f"micro_batch_size={setting.micro}"])


def with_engine(parallel: ParallelConfig, name: str) -> ParallelConfig:
    """Return the settings with the engine of a column of the table."""
    if name.startswith("zero"):
        return replace(parallel, engine="deepspeed", zero_stage=int(name[-1]))
    return replace(parallel, engine=name)  # type: ignore[arg-type]


def halved(setting: PlannedStep, machine: Machine) -> PlannedStep | None:
    """Return the same run on half as many nodes, or None if that doesn't fit."""
    layout, parallel = setting.layout, setting.parallel
    if layout.ranks % (2 * layout.gpus_per_node):
        return None
    replicas = parallel.replicas if parallel.replicas % 2 else parallel.replicas // 2
    if layout.ranks // 2 % replicas:
        return None
    spread = Layout(replace(parallel, replicas=replicas), layout.ranks // 2, layout.gpus_per_node)
    half = replace(setting, layout=spread)
    half = replace(half, micro=largest_micro(half, machine) or 1)
    return half if fits(half, machine) else None


def ways_to_fit(setting: PlannedStep, machine: Machine) -> list[str]:
    """Return settings that would make a step fit that doesn't, the gentlest first."""
    found = []
    if micro := largest_micro(setting, machine):
        found.append(f"micro_batch_size={micro}")
    every = replace(setting.parallel, checkpoint_every_blocks=1)
    recomputing = replace(setting, layout=replace(setting.layout, parallel=every))
    if fits(recomputing, machine):
        found.append("parallel.checkpoint_every_blocks=1")
    if setting.layout.ranks > 1 and setting.layout.engine != "fsdp":
        parallel = with_engine(setting.parallel, "fsdp")
        spread = replace(setting, layout=replace(setting.layout, parallel=parallel))
        if micro := largest_micro(spread, machine):
            found.append(f"parallel.engine=fsdp micro_batch_size={min(micro, setting.micro)}")
    return found or ["more GPUs, or larger ones"]
