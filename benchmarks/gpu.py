"""Run everything that is measured on one GPU, part by part; run the same command to resume.

python -m benchmarks.gpu --out gpu.json               everything that gpu.json doesn't hold yet, FlowAR-L
python -m benchmarks.gpu --list                       the names of the parts
python -m benchmarks.gpu --out gpu.json --parts limits train-bf16-compiled
python -m benchmarks.gpu --device cpu --tiny --out /tmp/tiny.json     every part, at toy size

Each part runs in its own process, for at most `--timeout-s`, and is written as soon as it is done. Parts that fail or
take too long are recorded as such; `--again` repeats them.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.loading import SHAPE, write_all
from flowar import bench, train
from flowar.base.devices import decoding_precision, pick_device
from flowar.base.files import write_text
from flowar.base.run_folder import METRICS_FILE
from flowar.config.benching import BenchConfig
from flowar.config.data import DataConfig, VAEConfig
from flowar.config.models import FlowARConfig, variant_config
from flowar.config.training import OptimConfig, ParallelConfig, PreviewConfig, TrainConfig
from flowar.latents.vae import MAR_CONFIG, VAE
from flowar.models.build import create_model, family_of
from flowar.models.tally import Tally

TIMEOUT_S = 480
TINY_MODEL = FlowARConfig(
    variant="custom", num_classes=10, ar_depth=2, ar_width=32, ar_heads=2, flow_depth=1, flow_width=32, flow_heads=2
)
TINY_VAE = {**MAR_CONFIG, "block_out_channels": (8,) * 5, "norm_num_groups": 4}
READ_STEPS = 3  # two lengths of training, whose device reads are compared

Result = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where the parts run, and at what size."""

    device: str
    model: str
    tiny: bool

    @property
    def shape(self) -> Any:
        """The model's shape."""
        return TINY_MODEL if self.tiny else variant_config(self.model)

    def batch(self, size: int) -> int:
        """Return a batch size, or the toy's."""
        return 2 if self.tiny else size

    def bench(self, *, batch: int, rounds: int, **settings: Any) -> BenchConfig:
        """Return what to measure."""
        settings |= {"batch_size": self.batch(batch), "rounds": 1 if self.tiny else rounds}
        if self.tiny:
            settings |= {"num_steps": 4, "precision": "fp32"}  # bfloat16 is slow on most CPUs
        return BenchConfig(model=self.shape, device=self.device, counts=False, **settings)


def as_result(found: dict[str, bench.Measured], batch: int) -> Result:
    """Return the figures of a comparison, for JSON."""
    return {
        name: {
            "images_per_s": batch / one.median_s,
            "seconds": one.seconds,
            "peak_gib_beside_weights": one.peak_bytes / 2**30,
        }
        for name, one in found.items()
    } | {"batch": batch}


def compare(machine: Machine, **settings: Any) -> Result:
    """Measure the model, and its baseline unless that is off; and the MFU by useful FLOPs."""
    config = machine.bench(**settings)
    found = bench.measure(config, torch.device(machine.device))
    result = as_result(found, config.batch_size)
    flops = bench.useful_flops(config, found)
    if flops:
        rate, _ = bench.measure_limits(torch.device(machine.device), config.precision)
        for name in found:
            result[name]["mfu"] = flops * result[name]["images_per_s"] / rate
    return result


def limits(machine: Machine) -> Result:
    """Measure the rates of large matrix products and copies."""
    found = {}
    for precision in ("fp32",) if machine.tiny else ("fp32", "tf32", "bf16"):
        flops_per_s, bytes_per_s = bench.measure_limits(torch.device(machine.device), precision)
        found[precision] = {"tflops": flops_per_s / 1e12, "gb_per_s": bytes_per_s / 1e9}
    return found


def decode(machine: Machine, size: int) -> Result:
    """Measure MAR-VAE's decoder with random weights: the time that drawing takes on top of the latents."""
    device, batch = torch.device(machine.device), machine.batch(size)
    vae = VAE(AutoencoderKL(**(TINY_VAE if machine.tiny else MAR_CONFIG)), "mar").to(device).eval()
    part = min(batch, 64)
    latents = torch.randn(part, *machine.shape.latent_shape, device=device)

    def work() -> None:
        with torch.inference_mode(), decoding_precision("tf32", device):
            for _ in range(0, batch, part):
                vae.decode(latents)

    work()
    seconds = [bench.timed(work, device) for _ in range(1 if machine.tiny else 5)]
    return {"batch": batch, "seconds": seconds, "images_per_s": batch / statistics.median(seconds)}


def flash(machine: Machine, what: str) -> Result:
    """Measure with attention=flash, if flash_attn is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"left_out": "flash_attn is not installed"}
    return compare(machine, what=what, batch=32 if what == "train" else 64, rounds=5, precision="bf16",
                   attention="flash", baseline=False)  # fmt: skip


def training(machine: Machine, folder: Path, steps: int, parallel: ParallelConfig, log_every: int) -> TrainConfig:
    """Return a run of `num_steps` steps on random latents."""
    batch, rows = machine.batch(32), 64
    if not (folder / "mds").exists():
        moments = np.random.default_rng(0).standard_normal((rows, *SHAPE), dtype=np.float32).astype(np.float16)
        write_all(folder, moments)
    epochs = steps * batch / rows
    return TrainConfig(
        run_dir=str(folder / f"run_{steps}"), vae=VAEConfig(name="none"), device=machine.device, parallel=parallel,
        model=dataclasses.replace(machine.shape, num_classes=1),
        data=DataConfig(path=str(folder / "mds"), num_workers=0 if machine.tiny else 2),
        epochs=epochs, optim=OptimConfig(lr=4e-4, warmup_epochs=epochs / 2), batch_size=batch,
        log_every_steps=log_every,
        save_every_steps=10**6, preview=PreviewConfig(every_steps=0), precision="fp32" if machine.tiny else "bf16",
    )  # fmt: skip


def engine(machine: Machine, parallel: ParallelConfig) -> Result:
    """Measure `flowar train` with an engine, on one process."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    with tempfile.TemporaryDirectory() as scratch:
        steps = 4 if machine.tiny else 60
        config = training(machine, Path(scratch), steps, parallel, steps // 2)
        train.main(config)
        records = [json.loads(line) for line in (Path(config.run_dir) / METRICS_FILE).read_text().splitlines()]
    last = records[-1]
    names = ("images_per_s", "peak_memory_gib", "data_wait_share", "gradients_share", "update_share", "rest_share")
    return {name: last[name] for name in names} | {"batch": config.batch_size, "steps": last["step"]}


def gap(machine: Machine) -> Result:
    """Trace `flowar train`: the share of the time between updates when the device is busy, and its longest pauses."""
    on_gpu = machine.device != "cpu"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    steps = 4 if machine.tiny else 24
    with tempfile.TemporaryDirectory() as scratch:
        config = training(machine, Path(scratch), steps, ParallelConfig(), log_every=10**6)
        with torch.profiler.profile(activities=[activity]) as profiler:
            train.main(config)
    events = [(e.time_range.start, e.time_range.end, e.name.lower()) for e in profiler.events() or []]
    updates = [end for _, end, name in events if "adam" in name or "multi_tensor" in name]
    return {"steps": steps, **pauses([event[:2] for event in events], updates)}


def pauses(intervals: list[tuple[float, float]], updates: list[float]) -> Result:
    """Return the busy share of the time between updates, in the second half of the run, and the longest pauses.

    Args:
        intervals: (start, end) of everything that ran, in microseconds.
        updates: when the optimizer's updates ended; the first half warms up.
    """
    first, last = (min(updates) + max(updates)) / 2, max(updates)
    busy, idle, until = 0.0, [], first
    for start, end in sorted(interval for interval in intervals if interval[1] > first and interval[0] < last):
        if start > until:
            idle.append(start - until)
        busy += max(0.0, min(end, last) - max(start, until))
        until = max(until, end)
    longest = sorted(idle, reverse=True)[:20]
    return {"busy_share": busy / (last - first), "longest_pauses_ms": [round(pause / 1e3, 3) for pause in longest]}


def syncs(machine: Machine) -> Result:
    """Count how often a step, a batch of latents and the whole training loop wait for the device, and where."""
    device = torch.device(machine.device)
    found: Result = {}
    for what in ("train", "sample"):
        config = machine.bench(what=what, batch=8, rounds=1)
        model = create_model(config.model).to(device)
        work = bench.make_work(config, family_of(config.model), model, device)
        found[what] = waits_of(work, device)
    reads = []
    with tempfile.TemporaryDirectory() as scratch:
        for steps in (READ_STEPS, 2 * READ_STEPS):
            run = training(machine, Path(scratch), steps, ParallelConfig(), log_every=10**6)
            reads.append(waits_of(functools.partial(train.main, run), device)["reads"])
    return found | {"reads_per_step_of_flowar_train": (reads[1] - reads[0]) / READ_STEPS}


def waits_of(work: Callable[[], object], device: torch.device) -> Result:
    """Return how often some work reads a number from the device, and on a GPU all waits for it, by line of code."""
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        tally = stack.enter_context(Tally())
        work()
    places = Counter(f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))
    return {"reads": tally.reads, "synchronizing": dict(places)}


def make_parts() -> dict[str, Callable[[Machine], Result]]:
    """Return the parts, by name, the most informative first."""
    parts: dict[str, Callable[[Machine], Result]] = {"limits": limits}
    alone = {"compile": True, "baseline": False}
    for precision in ("bf16", "tf32"):
        step = functools.partial(compare, what="train", batch=32, rounds=7, precision=precision)
        parts |= {f"train-{precision}": step, f"train-{precision}-compiled": functools.partial(step, **alone)}
    for batch in (64, 256):
        for precision in ("bf16", "tf32"):
            draw = functools.partial(compare, what="sample", batch=batch, rounds=3, precision=precision)
            name = f"sample-{batch}-{precision}"
            parts |= {name: draw, f"{name}-compiled": functools.partial(draw, **alone)}
        parts[f"vae-{batch}"] = functools.partial(decode, size=batch)
    parts["attention-bf16"] = functools.partial(compare, what="attention", batch=32, rounds=20, precision="bf16")
    parts["train-flash"] = functools.partial(flash, what="train")
    parts["sample-flash"] = functools.partial(flash, what="sample")
    parts["gap"] = gap
    zero2 = ParallelConfig(engine="deepspeed", zero_stage=2, zero_files=False)
    for name, parallel in (("single", ParallelConfig()), ("fsdp", ParallelConfig(engine="fsdp")), ("zero2", zero2)):
        parts[f"engine-{name}"] = functools.partial(engine, parallel=parallel)
    parts["syncs"] = syncs
    return parts


PARTS = make_parts()


def run_part(name: str, machine: Machine) -> Result:
    """Return a part's figures and how long it took, or what went wrong."""
    began = time.perf_counter()
    try:
        pick_device(machine.device)
        with torch.compiler.set_stance("force_eager") if machine.tiny else contextlib.nullcontext():
            return PARTS[name](machine) | {"took_s": round(time.perf_counter() - began, 1)}
    except Exception as error:  # the other parts are still measured
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def run_apart(name: str, machine: Machine, timeout_s: float) -> Result:
    """Return the result of `run_part`, run in a new process that is killed after a time."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=send_part, args=(sender, name, machine))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout_s):
            result: Result = receiver.recv()
            return result
        return {"error": f"took more than {timeout_s:g} s"}
    except EOFError:
        process.join()
        return {"error": f"its process ended with {process.exitcode}"}
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def send_part(sender: Any, name: str, machine: Machine) -> None:
    """Run one part; the target of its process."""
    sender.send(run_part(name, machine))


def describe(machine: Machine) -> dict[str, str]:
    """Return the machine, versions and settings that the figures belong to."""
    on_gpu = machine.device != "cpu"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "model": "tiny" if machine.tiny else machine.model,
        "commit": commit.stdout.strip(),
    }


def main(words: list[str] | None = None) -> None:
    """Run the parts that are not done yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--model", default="flowar-l")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check that every part runs")
    parser.add_argument(
        "--timeout-s", type=float, default=TIMEOUT_S, help="limit for each part; 0: run all in this process"
    )
    parser.add_argument("--again", action="store_true", help="repeat what failed")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    options = parser.parse_args(words)
    if options.list:
        print("\n".join(PARTS))
        return
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU found: run this on a machine with a GPU, or check that it runs with --device cpu --tiny")
    machine = Machine(options.device, options.model, options.tiny)
    what = describe(machine)
    done: Result = {"machine": what, "parts": {}}
    if options.out.exists():
        done = json.loads(options.out.read_text())
    if done["machine"] != what:
        sys.exit(f"{options.out} is for {done['machine']}, but this is {what}; give another --out")
    for name in options.parts:
        known = done["parts"].get(name)
        if known is not None and not (options.again and "error" in known):
            continue
        print(f"{name} ...", flush=True)
        alone = options.timeout_s > 0
        result = run_apart(name, machine, options.timeout_s) if alone else run_part(name, machine)
        done["parts"][name] = result
        write_text(options.out, json.dumps(done, indent=1) + "\n")
        print(f"{name}: {json.dumps(result)[:400]}", flush=True)


if __name__ == "__main__":
    main()
