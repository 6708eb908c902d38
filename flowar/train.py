"""`flowar train`: the loop, read top to bottom. Read next: flow.py for the loss, data.py for the order, parallel.py.

Everything random in a step follows from (seed, step, place in the batch), and so does the learning rate from the step:
a run that was killed and started again gives the same weights, on a CPU bit for bit (on a GPU some kernels add up in an
order of their own), and one that goes on with another number of processes the same up to rounding.
"""

import copy
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.schema import Passport, read_passport, write_passport
from flowar.checkpoint import Checkpoints, remove_averages_after, remove_unfinished
from flowar.config import FREE_ON_RESUME, TrainConfig, changed_settings, describe_config, load_config
from flowar.data import Batch, check_fits, check_same_vae, read_batches
from flowar.distributed import (
    StopSignals,
    World,
    has_lost_ranks,
    limit_waiting,
    pick_device,
    share,
    start,
    stop,
    world_size,
)
from flowar.ema import EMA
from flowar.errors import EXIT_AGAIN, UserError
from flowar.files import write_text
from flowar.flow import weigh
from flowar.guard import Guard, keep_anomaly
from flowar.layers import import_flash_attention
from flowar.model import FlowAR
from flowar.optim import learning_rate
from flowar.owner import Owner, take_over
from flowar.parallel import Engine, engine_name, make_engine
from flowar.previews import save_previews
from flowar.report import TrainingReport
from flowar.run_folder import ANOMALIES, AVERAGES, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, find_latest, read_progress
from flowar.shards import LatentShards
from flowar.speed import Interval, peak_tflops, profiled
from flowar.step import accumulate
from flowar.vae import VAE, load_vae
from flowar.weights import create_model

FREE_IN_PASSPORT = ("images", "encoded_with")  # where and on what the shards were made; their hashes say what they are
# Batches left out by rollbacks, how many of these there were, and optimizer steps: skipped steps are none.
FIRST_PROGRESS = {"data_offset": 0, "rollbacks": 0, "updates": 0, "guard": {}}


def main(config: TrainConfig, dry_run: bool = False) -> None:
    """Train, or go on training, the run in `run_dir`; on as many processes as were started."""
    device = pick_device(config.device)
    check_attention(config, device)
    if dry_run:
        plan_run(config, World(0, world_size(), device, None))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FlowAR(config.model).parameters())
        print(f"{config.model.variant}: {parameters / 1e6:.1f} M parameters; dry run, nothing was written")
        return
    needs_group = config.parallel.engine in ("ddp", "fsdp", "deepspeed")  # also for one process
    world = start(device, with_group=needs_group)
    try:
        train(config, world)
    except RuntimeError as error:
        if not has_lost_ranks(error):
            raise
        print(
            f"flowar train: rank {world.rank} has lost the others, one of them died or kept it waiting for more than "
            f"parallel.timeout_s={config.parallel.timeout_s:g}: {' '.join(str(error).split())[:200]}; the same command "
            f"goes on from {find_latest(config.run_dir)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # a save in the background would wait for the others for much longer
    finally:
        stop()


def check_attention(config: TrainConfig, device: torch.device) -> None:
    """Raise a UserError if attention=flash can't run here."""
    if config.attention == "flash":
        import_flash_attention()
        if device.type != "cuda":
            raise UserError(f"attention=flash needs a GPU, but device is {device}; set attention=sdpa")


@dataclasses.dataclass(frozen=True)
class Run:
    """What follows from the settings, the shards and the number of processes."""

    shards: LatentShards
    vae: VAE | None
    num_steps: int
    warmup_steps: float
    micro_batch_size: int

    def sizes(self) -> dict[str, float]:
        """Return what a step depends on beside the settings."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "latent_multiplier": self.shards.passport.latent_multiplier,
        }


def plan_run(config: TrainConfig, world: World) -> Run:
    """Check what can be known before anything is built, and say what will be done.

    Raises:
        UserError: if settings, shards and processes don't fit together.
    """
    shards = LatentShards(config.data)
    passport = shards.passport
    check_fits(passport, config.model, config.data.path)
    micro = split_batch(config, world.size)
    steps_per_epoch = passport.num_images / config.batch_size
    num_steps = math.ceil(config.epochs * steps_per_epoch)
    warmup_steps = config.optim.warmup_epochs * steps_per_epoch
    if world.is_main:
        parts = config.batch_size // (micro * world.size)
        how = f"{engine_name(config, world)}, {world.device}, {config.precision}, attention {config.attention}"
        print(
            f"{passport.num_images:,} images / batch of {config.batch_size:,} = {steps_per_epoch:,.1f} steps an epoch, "
            f"{config.epochs:g} epochs = {num_steps:,} steps, {warmup_steps:,.0f} of them warm-up; batch = {micro:,} x "
            f"{parts} parts x {world.size} processes ({how})"
        )
    check_resumable(Path(config.run_dir), config, passport)
    vae = load_vae(config.vae.name, config.vae.weights) if config.preview.every_steps else None
    if vae is not None:
        check_same_vae(passport, vae, config.data.path)
    elif passport.vae_name != config.vae.name:  # without previews the VAE isn't loaded, its weights may not be here
        raise UserError(
            f"data.path={config.data.path} was made with VAE {passport.vae_name}, but vae.name={config.vae.name}; set "
            f"vae.name={passport.vae_name}, or use other shards"
        )
    return Run(shards, vae, num_steps, warmup_steps, micro)


def split_batch(config: TrainConfig, num_ranks: int) -> int:
    """Return how many samples each process takes at once.

    Raises:
        UserError: if the batch can't be cut into equal parts, with a size that can.
    """
    if config.batch_size % num_ranks:
        fitting = max(1, round(config.batch_size / num_ranks)) * num_ranks
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {num_ranks} processes; try batch_size={fitting}, or "
            "another number of processes"
        )
    share_of_rank = config.batch_size // num_ranks
    micro = config.micro_batch_size or share_of_rank
    if share_of_rank % micro:
        fitting = max(n for n in range(1, micro + 1) if share_of_rank % n == 0)
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of micro_batch_size={micro} x {num_ranks} processes = "
            f"{micro * num_ranks}; try micro_batch_size={fitting}"
        )
    return micro


def train(config: TrainConfig, world: World) -> None:
    """Do what `main` does, within a started world."""
    # Set up.
    run = plan_run(config, world)
    run_dir, passport = Path(config.run_dir), run.shards.passport
    owner = share(prepare_run_dir(run_dir, config, passport) if world.is_main else None)
    if config.precision == "tf32" and world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    model = create_model(config.model).train()
    model.set_attention(config.attention)

    # Resume: rank 0 looks, so that all go on from the same checkpoint.
    latest = share(find_latest(run_dir) if world.is_main else None)
    engine = make_engine(config, model, world, run.micro_batch_size)
    ema = EMA(config.ema, engine.local_weights())
    first_step, progress = 0, copy.deepcopy(FIRST_PROGRESS)
    if latest is not None:
        first_step, progress = restore(engine, ema, latest)
        if world.is_main:
            print(f"resuming from {latest}")
    checkpoints = Checkpoints(
        owner,
        world,
        model=config.model,
        passport=passport,
        keep=config.keep_checkpoints,
        keep_every_steps=config.keep_every_steps,
    )
    kept_averages = Checkpoints(owner, world, model=config.model, passport=passport, kind=AVERAGES)
    guard = Guard(config.guard, **progress["guard"])

    # Loop: step counts finished steps; batches are numbered apart, as a rollback leaves some out.
    step, asked_to_stop, is_set_up = first_step, 0, False
    settings = dataclasses.asdict(config)
    sinks = TrainingReport(
        run_dir,
        config.wandb,
        settings,
        step=step,
        num_steps=run.num_steps,
        is_main=world.is_main,
        tensorboard=config.tensorboard,
    )
    peak = config.peak_tflops or peak_tflops(world.device, config.precision)
    with StopSignals() as stopping, sinks as report:
        batches = read_from(step, progress, config, run, world)
        interval = Interval(step, len(config.model.scales), world)
        while step < run.num_steps and not asked_to_stop:
            batch = next(batches)
            interval.data_arrived()
            step += 1
            number = step + progress["data_offset"]
            with profiled(config, step, world):
                losses, asked_to_stop = accumulate(engine, batch, number, config, **run.sizes(), asked=stopping.asked)
            grad_norm = engine.grad_norm()
            interval.gradients_done()

            # One optimizer step, or none if something is wrong.
            problem = guard.judge(weigh(losses, config.model.scales).item(), grad_norm)
            lr = learning_rate(
                step - 1,
                num_steps=run.num_steps,
                warmup_steps=run.warmup_steps,
                lr=config.optim.lr,
                min_lr=config.optim.min_lr,
            )
            if problem is None:
                engine.step(lr)
                progress["updates"] += 1
                interval.add(losses, grad_norm)
                ema.update(engine.local_weights(), progress["updates"])
            else:
                engine.skip()
                bundle = keep_anomaly(engine, batch, step, number, losses, grad_norm, problem, config, run.sizes())
                where = f"kept in {bundle}" if bundle else f"not kept, as {config.guard.max_kept} are"
                report.say(f"step {step} skipped: {problem}; {where}")
            interval.update_done()
            if guard.in_a_row >= config.guard.skips_before_rollback:
                checkpoints.wait()
                kept_averages.wait()
                step = roll_back(engine, ema, progress, step, problem, config)
                report.rewind(step)
                report.say(f"rolled back to step {step}; the batches since then are left out")
                batches = read_from(step, progress, config, run, world)
                interval = Interval(step, len(config.model.scales), world)
                guard.in_a_row = 0
                continue

            # What a step leaves behind.
            if not is_set_up:
                limit_waiting(config.parallel.timeout_s)
                is_set_up = True
            report.advance(step)
            is_last = step == run.num_steps
            if step % config.log_every_steps == 0 or is_last:
                record = interval.record(step, run.num_steps, lr, config, peak)
                if world.is_main:
                    owner.check()
                report.log(record)
                interval = Interval(step, len(config.model.scales), world)
            checkpoints.finish_if_written()
            kept_averages.finish_if_written()
            if config.ema.keep_every_steps and step % config.ema.keep_every_steps == 0:
                kept = [name for name in ema.averages if name.startswith("std_")]
                kept_averages.save(step, averages_state(engine, ema, kept), progress | {"averages": kept})
            if step % config.save_every_steps == 0 or is_last or asked_to_stop:
                record = progress | {"averages": list(ema.averages), "guard": guard.state()}
                checkpoints.save(step, whole_state(engine, ema), record, engine.save_own_files)
            if run.vae is not None and (step % config.preview.every_steps == 0 or is_last):
                checkpoints.wait()
                for name, path in save_previews(engine, ema, run.vae.to(world.device), config, step).items():
                    report.log_image(name, path, step)
            interval.step_ended()
        checkpoints.wait()
        kept_averages.wait()
    if step < run.num_steps:
        if world.is_main:
            name = signal.Signals(asked_to_stop).name
            print(f"stopped by {name} after step {step:,}, saved; the same command goes on")
        sys.exit(EXIT_AGAIN)
    if world.is_main:
        print(
            f"finished {run.num_steps:,} steps; weights in {find_latest(run_dir)}, metrics in {run_dir / METRICS_FILE}"
        )


def read_from(step: int, progress: dict, config: TrainConfig, run: Run, world: World) -> Iterator[Batch]:
    """Return this rank's batches of the steps after `step`."""
    offset = progress["data_offset"]
    return read_batches(
        run.shards,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=range(step + offset, run.num_steps + offset),
        rank=world.rank,
        world_size=world.size,
    )


def whole_state(engine: Engine, ema: EMA) -> dict[str, Tensor]:
    """Return all tensors that a run goes on with, this rank's part."""
    return engine.state() | averages_state(engine, ema, ema.averages)


def averages_state(engine: Engine, ema: EMA, names: Iterable[str]) -> dict[str, Tensor]:
    """Return some of the averages, this rank's part."""
    state = {}
    for name in names:
        state |= {f"ema.{name}.{key}": tensor for key, tensor in engine.to_state(ema.averages[name]).items()}
    return state


def restore(engine: Engine, ema: EMA, folder: Path) -> tuple[int, dict[str, int]]:
    """Load a checkpoint into engine and averages; return its step and what else the run goes on with."""
    engine.load(folder)
    for name, average in ema.averages.items():
        engine.load_local(average, f"ema.{name}.", folder)
    progress = read_progress(folder)
    engine.set_step(progress["updates"])
    return progress["step"], {key: progress[key] for key in FIRST_PROGRESS}


def roll_back(engine: Engine, ema: EMA, progress: dict[str, int], step: int, problem: str, config: TrainConfig) -> int:
    """Go back to the newest checkpoint, and leave out the batches since then; return its step.

    Raises:
        UserError: if there is none, or this was done before.
    """
    latest = share(find_latest(config.run_dir) if engine.world.is_main else None)
    rollbacks = progress["rollbacks"] + 1
    if latest is None or rollbacks > config.guard.max_rollbacks:
        before = "there is no checkpoint to go back to" if latest is None else "the run was rolled back before"
        raise UserError(
            f"{config.guard.skips_before_rollback} steps in a row went wrong, the last is {step}: {problem}; {before}. "
            f"Look at {Path(config.run_dir) / ANOMALIES} with `flowar replay`; a lower optim.lr or precision=tf32 may "
            "help"
        )
    last_batch = step + progress["data_offset"]
    step, restored = restore(engine, ema, latest)
    if engine.world.is_main:
        remove_averages_after(Path(config.run_dir), step)
    progress |= restored | {"data_offset": last_batch - step, "rollbacks": rollbacks}
    return step


def check_resumable(run_dir: Path, config: TrainConfig, passport: Passport) -> None:
    """Raise a UserError if `run_dir` holds a run with other settings or other data, naming what differs."""
    if not (run_dir / CONFIG_FILE).exists():
        return
    before = load_config(TrainConfig, run_dir / CONFIG_FILE)
    changed = changed_settings(before, config)
    free = {key for key in changed if any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)}
    for key in sorted(free):
        old, new = changed.pop(key)
        print(f"{key} was {old}, now {new}")
    if changed:
        listed = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())
        raise UserError(f"run_dir={run_dir} holds another run: {listed}; give another run_dir, or the same settings")
    recorded = dataclasses.asdict(read_passport(run_dir))
    found = dataclasses.asdict(passport)
    differing = [key for key in found if key not in FREE_IN_PASSPORT and recorded[key] != found[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"run_dir={run_dir} was trained on other shards: {key} was {str(recorded[key])[:40]}, data.path="
            f"{config.data.path} has {str(found[key])[:40]}; give another run_dir, or those shards"
        )


def prepare_run_dir(run_dir: Path, config: TrainConfig, passport: Passport) -> Owner:
    """Make the folder, own it, write the resolved config and the passport, remove what a killed process left."""
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        owner = take_over(run_dir)
        remove_unfinished(run_dir)
        write_passport(passport, run_dir)
        write_text(run_dir / CONFIG_FILE, describe_config(config))
    except OSError as error:
        raise UserError(f"can't write to run_dir={run_dir}: {error.strerror or error}") from error
    return owner


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("train")
