"""`flowar plan`: memory, time and days of a training run, before you rent anything. Simulated, and labelled so.

The computation is traced on meta tensors, the communication follows from the engines, and the rates come from data
sheets, scaled by the share that one H100 reached. Read next: planning/steps.py.
"""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowar.base.files import GIB
from flowar.config.training import PlanConfig
from flowar.latents.schema import read_passport
from flowar.planning.engines import collectives_of, sizes_of
from flowar.planning.machines import Machine, find_machine
from flowar.planning.runs import DAY_S, Troubles, expect
from flowar.planning.search import halved, search, way_of, ways_to_fit, with_engine
from flowar.planning.steps import SPARE_SHARE, PlannedStep, fits, images_per_s, largest_micro, time_step, utilization

IMAGENET_IMAGES = 1_281_167  # in its training set
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
BEST = 8  # rows of a search that are shown
PAYING = 1.5  # twice the GPUs must be at least this many times as fast
ROWS = (
    "weights", "gradients", "optimizer", "averages", "gathered", "activations", "total", "micro batch",
    "collectives", "GB sent", "sending, s", "GPU, s", "host, s", "step, s", "images/s", "MFU", "days",
)  # fmt: skip


def count_images(config: PlanConfig) -> tuple[int, str]:
    """Return how many images the run is trained on, and where the number comes from.

    Raises:
        UserError: if data.path exists, but is not a finished dataset.
    """
    path = config.data.path
    if config.num_images is not None:
        return config.num_images, "num_images"
    if path is not None and Path(path).exists():
        return read_passport(path).num_images, f"data.path={path}"
    why = "no data.path is given" if path is None else f"data.path={path} does not exist"
    return IMAGENET_IMAGES, f"ImageNet's, as {why}; num_images=... sets another number"


def machine_of(config: PlanConfig) -> Machine:
    """Return the machine that the settings name."""
    return find_machine(
        config.gpu,
        config.gpus_per_node,
        config.rail_gb_per_s,
        memory_gib=config.memory_gib,
        peak_tflops=config.peak_tflops,
        memory_gb_per_s=config.memory_gb_per_s,
    )


def column_of(setting: PlannedStep, machine: Machine, wanted_micro: int | None, num_steps: int) -> dict[str, str]:
    """Return the cells of one engine."""
    micro = wanted_micro or largest_micro(setting, machine)
    setting = dataclasses.replace(setting, micro=micro or 1)
    memory = setting.memory
    cells = {name: f"{value / GIB:.2f}" for name, value in vars(memory).items()}
    cells |= {"total": f"{memory.total / GIB:.1f}", "micro batch": f"{setting.micro}"}
    if not fits(setting, machine):
        return cells | {"micro batch": f"{setting.micro}: too big"}
    step = time_step(setting, machine)
    sent = collectives_of(setting.layout, sizes_of(setting.model), setting.parts)
    return cells | {
        "collectives": f"{len(sent):,}",
        "GB sent": f"{sum(each.size * (2 if each.kind == 'all_reduce' else 1) for each in sent) / 1e9:.1f}",
        "sending, s": f"{step.sent_s:.3f}",
        "GPU, s": f"{step.device_s:.3f}",
        "host, s": f"{step.launch_s:.3f}",
        "step, s": f"{step.total:.3f}",
        "images/s": f"{images_per_s(setting, step):,.0f}",
        "MFU": f"{utilization(setting, step, machine):.1%}",
        "days": f"{num_steps * step.total / DAY_S:.1f}",
    }


def say_run(config: PlanConfig, setting: PlannedStep, machine: Machine, num_steps: int) -> None:
    """Print what to expect of the run with its current settings."""
    memory, layout, room = setting.memory.total / GIB, setting.layout, machine.memory / GIB
    print(f"As set, {way_of(setting)} ({layout.engine}): {memory:.1f} of {room:.0f} GiB on each GPU.")
    if not fits(setting, machine):
        print("That does not fit: set " + ", or ".join(ways_to_fit(setting, machine)) + ".")
        return
    step = time_step(setting, machine)
    writers = 1 if layout.engine == "single" else layout.ranks // layout.replicas
    troubles = Troubles(
        config.nodes, config.node_mtbf_days, config.preemptions_per_day, config.restart_s, config.save_gb_per_s * 1e9
    )
    run = expect(num_steps * step.total, sizes_of(setting.model).total, setting.averages, writers, troubles)
    print(
        f"{num_steps:,} steps of {step.total:.3f} s are {num_steps * step.total / DAY_S:.1f} days; expected "
        f"{run.days:.1f}, {run.goodput:.1%} of it useful work, with {run.failures:.1f} failures and "
        f"{config.preemptions_per_day:g} preemptions a day. It is best to save every {run.save_every_s / 60:.0f} "
        f"minutes, save_every_steps={max(1, round(run.save_every_s / step.total))} (set: {config.save_every_steps}); a "
        f"save stops training for {run.save_s:.1f} s and is on disk after {run.written_s:.0f} s."
    )
    half = halved(setting, machine)
    if half is not None:
        gain = time_step(half, machine).total / step.total
        verdict = "" if gain >= PAYING else f": twice the GPUs don't pay off, use nodes={config.nodes // 2}"
        print(f"{config.nodes} nodes are {gain:.2f} times as fast as {config.nodes // 2}{verdict}.")


def show_search(setting: PlannedStep, machine: Machine, nodes: int, console: Console) -> None:
    """Print the fastest ways to train, and why others don't fit."""
    found, refused = search(setting, machine, nodes)
    table = Table("step, s", "images/s", "MFU", "GiB", "parallel. and micro batch", title="The fastest ways that fit")
    for way in found[:BEST]:
        table.add_row(
            f"{way.step.total:.3f}",
            f"{images_per_s(way.setting, way.step):,.0f}",
            f"{utilization(way.setting, way.step, machine):.1%}",
            f"{way.setting.memory.total / GIB:.0f}",
            way_of(way.setting),
        )
    console.print(table)
    print(f"{len(found)} ways fit." + "".join(f"\nDoesn't fit: {each}." for each in refused))


def main(config: PlanConfig, dry_run: bool = False) -> None:
    """Print the tables."""
    if dry_run:
        return
    machine = machine_of(config)
    num_ranks = config.nodes * config.gpus_per_node
    num_images, source = count_images(config)
    setting = PlannedStep.of(config, num_ranks, config.gpus_per_node)
    num_steps = config.count_steps(num_images)
    micro = None if config.micro_batch_size is None else setting.micro
    columns = {}
    for name in ENGINES if num_ranks > 1 else ("single",):
        layout = dataclasses.replace(setting.layout, parallel=with_engine(setting.parallel, name))
        columns[name] = column_of(dataclasses.replace(setting, layout=layout), machine, micro, num_steps)
    total = sizes_of(config.model).total
    table = Table(
        "GiB per GPU", *columns,
        title=f"{config.model.variant}, {total / 1e6:,.0f} M, on {config.nodes} x {config.gpus_per_node} {config.gpu}",
    )  # fmt: skip
    for row in ROWS:
        table.add_row(row, *(cells.get(row, "-") for cells in columns.values()))
    console = Console()
    console.print(table)
    print(f"Trained on {num_images:,} images ({source}), {config.epochs:g} epochs of them.")
    if config.micro_batch_size is None and (largest := largest_micro(setting, machine)):
        setting = dataclasses.replace(setting, micro=largest)
    say_run(config, setting, machine, num_steps)
    if config.search:
        show_search(setting, machine, config.nodes, console)
    print(
        f"Simulated, precision={config.precision}: GPU and host times follow from the operations of a step and from "
        "data-sheet rates, scaled by what one H100 reached; communication times follow NCCL's own table. Memory agreed "
        f"with that H100 to 3%; {SPARE_SHARE:.0%} is left free. Several GPUs were not measured: benchmarks/README.md."
    )
