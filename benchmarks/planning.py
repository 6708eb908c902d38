"""Compare `flowar plan` with measurements on one H100, and predict what was not measured, up to 512 GPUs.

python -m benchmarks.planning measured               plan and measurement side by side: takes seconds
python -m benchmarks.planning fit                    fit the four constants to the measured speeds again
python -m benchmarks.planning scaling [--picture F]  strong and weak scaling, 8 to 512 GPUs: takes minutes
python -m benchmarks.planning predictions            speeds of one H100 that were not measured: takes ten minutes

measured.json holds the operations of the code that was measured, counted as in planning/trace.py; later code does less
work, so its speed is a prediction.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from scipy.optimize import minimize

from flowar.base.files import GIB
from flowar.config.drawing import PRESETS, DrawConfig
from flowar.config.load import load_config
from flowar.config.models import variant_config
from flowar.config.training import ParallelConfig, PlanConfig
from flowar.planning import machines
from flowar.planning.engines import Layout, memory_of, sizes_of
from flowar.planning.machines import Machine, busy, find_machine, launch_seconds, operation_seconds
from flowar.planning.operations import Operation
from flowar.planning.steps import AVERAGE_BYTES, UPDATE_BYTES, PlannedStep, images_per_s, largest_micro, time_step
from flowar.planning.trace import trace_sampling

MEASURED_FILE = Path(__file__).with_name("measured.json")
RECIPES = {name: Path(__file__).parents[1] / "configs" / "train" / f"flowar_{name}.yaml" for name in ("l", "h")}
BOOKKEEPING_THEN_S = (
    0.02  # of the host between two steps in the code that was measured: not fitted, from benchmarks/host
)
GPUS = (8, 16, 32, 64, 128, 256, 512)
H100 = find_machine("H100", 8, PlanConfig().rail_gb_per_s)


def measured_runs() -> list[dict[str, Any]]:
    """Return the runs of measured.json."""
    runs: list[dict[str, Any]] = json.loads(MEASURED_FILE.read_text())["runs"]
    return runs


def phase_seconds(phase: list[list[Any]], machine: Machine, precision: str) -> float:
    """Return how long operations take if the host never waits between them; `phase` has rows of measured.json."""
    names = {"m": "matmul", "a": "attention", "o": "other"}
    rows = [(Operation(names[kind], *rest), count) for kind, *rest, count in phase]  # type: ignore[arg-type]
    on_device: float = sum(count * operation_seconds(operation, machine, precision) for operation, count in rows)
    on_host: float = sum(count * launch_seconds(operation) for operation, count in rows)
    return max(on_device, on_host)


def compared() -> Iterator[tuple[str, float, float, float | None, float | None]]:
    """Yield each measurement: its name, images/s planned and measured, GiB planned and measured."""
    sizes = sizes_of(variant_config("flowar-l"))
    updating = sizes.total * (UPDATE_BYTES + AVERAGE_BYTES) / (H100.bytes_per_s * machines.LARGE_COPY_SHARE)
    for run in measured_runs():
        for found in run["measured"]:
            seconds = sum(phase_seconds(phase, H100, found["precision"]) for phase in run["phases"])
            gib = None
            if run["what"] == "training":
                seconds += updating + BOOKKEEPING_THEN_S
                layout = Layout(ParallelConfig(engine="single"), 1, 1)
                gib = memory_of(layout, sizes, 1, 1, int(run["peak_gib"] * GIB)).total / GIB
            how = f"{'compiled' if run['compiled'] else 'eager'}, batch {run['batch']}"
            name = f"{run['what']}, {found['precision']}, {how}"
            yield name, run["batch"] / seconds, found["images_per_s"], gib, found.get("gib")


def say_measured() -> None:
    """Print the table of what was measured."""
    print("| FlowAR-L, one H100 | images/s, plan | measured | ratio | GiB, plan | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, planned, measured, gib, measured_gib in compared():
        memory = (
            " | | " if gib is None or measured_gib is None else f"{gib:.1f} | {measured_gib} | {gib / measured_gib:.2f}"
        )
        print(f"| {name} | {planned:.4g} | {measured} | {planned / measured:.2f} | {memory} |")


def fit() -> None:
    """Print the constants that bring the plan nearest to the measured speeds, by least squares of logarithms."""

    def set_constants(values: list[float]) -> None:
        half, tf32, fp32, machines.EAGER_SHARE = values
        machines.MATMUL_SHARES.update({"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32})

    def loss(values: list[float]) -> float:
        set_constants(values)
        return sum(math.log(planned / measured) ** 2 for _, planned, measured, *_ in compared())

    shares = machines.MATMUL_SHARES
    start = [shares["bf16"], shares["tf32"], shares["fp32"], machines.EAGER_SHARE]
    best = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 100})
    names = ("matmul bf16", "matmul tf32", "matmul fp32", "eager traffic")
    print(", ".join(f"{name} {value:.3f}" for name, value in zip(names, best.x, strict=True)))


def spread(name: str, gpus: int, *, weak: bool) -> PlannedStep:
    """Return a shipped recipe on `gpus` GPUs, with its batch, or with the samples per GPU that 64 GPUs have."""
    recipe = load_config(PlanConfig, RECIPES[name])
    batch = recipe.batch_size * gpus // 64 if weak else recipe.batch_size
    setting = PlannedStep.of(dataclasses.replace(recipe, batch_size=batch, micro_batch_size=None), gpus, 8)
    return dataclasses.replace(setting, micro=min(recipe.micro_batch_size or setting.micro, setting.micro))


def scale() -> dict[tuple[str, bool], list[float]]:
    """Return the images/s of each recipe on each number of GPUs, strong (False) and weak (True)."""
    found: dict[tuple[str, bool], list[float]] = {}
    for name in RECIPES:
        for weak in (False, True):
            settings = [spread(name, gpus, weak=weak) for gpus in GPUS]
            found[name, weak] = [images_per_s(setting, time_step(setting, H100)) for setting in settings]
    return found


def say_scaling(picture: Path | None) -> None:
    """Print the table of scaling, and draw it."""
    found = scale()
    print("| images/s (per GPU, relative to 8) | " + " | ".join(map(str, GPUS)) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for (name, weak), rates in found.items():
        kind = "weak, 32 samples per GPU" if weak else "strong, batch 2,048"
        cells = [f"{rate:,.0f} ({rate / gpus / (rates[0] / 8):.0%})" for rate, gpus in zip(rates, GPUS, strict=True)]
        print(f"| FlowAR-{name.upper()}, {kind} | " + " | ".join(cells) + " |")
        if weak:
            print(f"weak scaling of {name.upper()} from 64 to 512: {rates[-1] / rates[GPUS.index(64)] / 8:.1%}")
    if picture is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, weak), rates in found.items():
        kind = "weak" if weak else "strong, batch 2,048"
        axes.plot(
            GPUS, rates, "o--" if weak else "o-", color={"l": "C0", "h": "C1"}[name], label=f"{name.upper()}, {kind}"
        )
    axes.set(xscale="log", yscale="log", xlabel="H100 GPUs, 8 in a node", ylabel="images/s, predicted")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def say_predictions() -> None:
    """Print what one H100 should do with the code as it is."""
    print("| one H100, predicted | images/s | GPU, s | host, s |")
    print("|---|---|---|---|")
    for name in ("flowar-s", "flowar-l", "flowar-h"):
        for compiled in (False, True):
            layout = Layout(ParallelConfig(engine="single", compile=compiled), 1, 1)
            setting = PlannedStep(variant_config(name), "bf16", 64, 64, 1, layout)
            setting = dataclasses.replace(setting, micro=largest_micro(setting, H100))
            step = time_step(setting, H100)
            how = f"{'compiled' if compiled else 'eager'}, micro batch {setting.micro}"
            rate = images_per_s(setting, step)
            print(f"| {name}, training, bf16, {how} | {rate:.0f} | {step.device_s:.3f} | {step.launch_s:.3f} |")
    released = DrawConfig(precision="bf16")
    for what, draw in (("released", released), ("fast", dataclasses.replace(released, **PRESETS["fast"]))):
        for compiled in (False, True):
            trace = trace_sampling(variant_config("flowar-l"), draw, 64, compiled)
            took = busy(trace.forward, H100, draw.precision)
            kind = "compiled" if compiled else "eager"
            name = f"flowar-l, sampling ({what}), bf16, {kind}, batch 64"
            print(f"| {name} | {64 / took.total_s:.1f} | {took.device_s:.2f} | {took.launch_s:.2f} |")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["measured", "fit", "scaling", "predictions"])
    parser.add_argument("--picture", type=Path, help="file for the picture of scaling")
    options = parser.parse_args()
    if options.what == "scaling":
        say_scaling(options.picture)
    else:
        {"measured": say_measured, "fit": fit, "predictions": say_predictions}[options.what]()


if __name__ == "__main__":
    main()
