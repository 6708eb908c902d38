"""`flowar train`: the loop, read top to bottom. Read next: training/setup.py, training/step.py, models/family.py.

Everything random in a step follows from (seed, step, place in the batch), and the learning rate follows from the step.
So a run that is killed and resumed gives the same weights: bit for bit on a CPU (some GPU kernels don't sum in a fixed
order), and up to rounding if it resumes with another number of processes.
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flowar.base.devices import peak_tflops, pick_device
from flowar.base.distributed import (
    StopSignals,
    World,
    broadcast_object,
    limit_waiting,
    training_world,
    world_size,
)
from flowar.base.errors import EXIT_AGAIN, UserError
from flowar.base.run_folder import (
    ANOMALIES,
    AVERAGES,
    CHECKPOINTS,
    METRICS_FILE,
    PREVIEWS,
    Progress,
    find_latest,
    step_name,
)
from flowar.config.models import ModelConfig
from flowar.config.training import GuardConfig, TrainConfig
from flowar.latents.batches import Batch, read_batches
from flowar.models.build import create_model
from flowar.models.costs import count_parameters, count_training_flops
from flowar.models.layers import set_attention
from flowar.planning.room import check_room
from flowar.training.averages import EMA
from flowar.training.checkpoint import (
    CheckpointContents,
    Checkpoints,
    Kept,
    averages_state,
    remove_averages_after,
    restore_newest,
    whole_state,
)
from flowar.training.engine import Engine
from flowar.training.guard import Anomaly, Guard, keep_anomaly
from flowar.training.meter import StepMeter, profiled
from flowar.training.optim import learning_rate
from flowar.training.previews import save_previews
from flowar.training.report import TrainingReport
from flowar.training.setup import (
    RunPlan,
    check_attention,
    keep_recorded_rate,
    make_engine,
    plan_run,
    prepare_run_dir,
    record_settings,
)
from flowar.training.start import begin, read_old_names
from flowar.training.step import TrainingInputs, accumulate, agree, draw_training_inputs, drawn_bytes


def main(config: TrainConfig, dry_run: bool = False) -> None:
    """Train the run in `run_dir`, or resume it, on all processes that were started."""
    device = pick_device(config.device)
    check_attention(config.attention, device)
    if dry_run:
        world = World(0, world_size(), device, None)
        plan_run(config, world)
        check_room(config, world)
        parameters = count_parameters(config.model)["total"]
        print(f"{config.model.variant}: {parameters / 1e6:.1f} M parameters; dry run, nothing was written")
        return
    needs_group = config.parallel.engine in ("ddp", "fsdp", "deepspeed")  # also for one process
    timeout = f"parallel.timeout_s={config.parallel.timeout_s:g}"
    with training_world(
        device, with_group=needs_group, verb="train", timeout=timeout, latest=lambda: find_latest(config.run_dir)
    ) as world:
        train(config, world)


def train(config: TrainConfig, world: World) -> None:
    """Do what `main` does, in a world that is already started."""
    # Set up.
    config = keep_recorded_rate(config)
    run = plan_run(config, world)
    check_room(config, world)
    run_dir, passport = Path(config.run_dir), run.shards.passport
    owner = broadcast_object(prepare_run_dir(run_dir, passport) if world.is_main else None)
    assert owner is not None
    if config.precision == "tf32" and world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    with torch.device("cpu" if world.is_main else "meta"):  # the others get their parts from rank 0
        model = create_model(config.model).train()
    set_attention(model, config.attention)
    if world.is_main and run.start is not None:
        begin(run.start, config, model)
    old = broadcast_object(read_old_names(config) if world.is_main else None)
    assert old is not None

    # Resume.
    engine = make_engine(dataclasses.replace(run.engine, old=old), model, world)
    ema = EMA(config.ema, engine.local_weights())
    progress = Progress(averages=tuple(ema.averages))
    restored = restore_newest(engine, ema, run_dir)
    if restored is not None:
        progress = dataclasses.replace(restored[0], averages=tuple(ema.averages))
        if world.is_main:
            print(f"resuming from {restored[1]}")
    if world.is_main and progress.step < run.num_steps:
        record_settings(owner, config, passport, progress.step, world)
    contents = CheckpointContents(config.model, passport)
    kept = Kept(config.keep_checkpoints, config.keep_every_steps)
    checkpoints = Checkpoints(owner, world, contents, CHECKPOINTS, kept)
    kept_averages = Checkpoints(owner, world, contents, AVERAGES)
    guard = Guard(config.guard, progress)
    terms = run.step.family.loss_terms(config.model)
    speed: dict[str, Any] = {
        "num_steps": run.num_steps,
        "batch_size": config.batch_size * config.model.images_per_sample,
        "mfu_per_speed": mfu_per_speed(config.model, config.peak_tflops, config.precision, world),
    }

    # Loop: `step` counts finished steps; batches have their own numbers, as a rollback skips some.
    asked_to_stop, is_set_up = 0, False
    sinks = TrainingReport(
        run_dir,
        config.wandb,
        dataclasses.asdict(config),
        step=progress.step,
        num_steps=run.num_steps,
        is_main=world.is_main,
        tensorboard=config.tensorboard,
    )
    with StopSignals() as stopping, sinks as report:
        batches = read_from(progress, config, run, world)
        meter = StepMeter(progress.step, terms, world)
        while progress.step < run.num_steps and not asked_to_stop:
            inputs = next(batches)
            meter.data_arrived()
            progress = dataclasses.replace(progress, step=progress.step + 1)
            step = progress.step
            with profiled(config.profile_steps, step, world, run_dir / "profile"):
                shares = accumulate(engine, inputs, run.step)
                numbers = agree(engine, shares, run.step, stopping.asked)
            asked_to_stop = numbers.asked_to_stop
            meter.gradients_done()

            # One optimizer step, skipped if something is wrong.
            problem = guard.judge(numbers.loss, numbers.grad_norm)
            lr = learning_rate(
                step - 1,
                num_steps=run.num_steps,
                warmup_steps=run.warmup_steps,
                lr=config.optim.peak_lr(config.batch_size),
                min_lr=config.optim.min_lr,
            )
            if problem is None:
                engine.step(lr, numbers.grad_norm)
                progress = dataclasses.replace(progress, updates=progress.updates + 1)
                meter.add(numbers)
                ema.update(engine.local_weights(), progress.updates)
            else:
                engine.skip()
                if world.is_main:
                    owner.check()  # before anything of the run is changed
                bundle = keep_anomaly(engine, inputs, Anomaly(step, problem, numbers), run.step, config)
                where = f"kept in {bundle}" if bundle else f"not kept: guard.max_kept={config.guard.max_kept} reached"
                report.say(f"step {step} skipped: {problem}; {where}")
            progress = guard.note_in(progress)
            meter.update_done()
            if guard.in_a_row >= config.guard.skips_before_rollback:
                checkpoints.wait()
                kept_averages.wait()
                progress = roll_back(engine, ema, progress, f"the last is {step}: {problem}", run_dir, config.guard)
                report.rewind(progress.step)
                report.say(f"rolled back to step {progress.step}; the batches since then are skipped")
                batches = read_from(progress, config, run, world)
                meter = StepMeter(progress.step, terms, world)
                guard.in_a_row = 0
                asked_to_stop = 0  # the next step sees it again, and is saved
                continue

            # Log, save, draw previews.
            if not is_set_up:
                limit_waiting(config.parallel.timeout_s)
                is_set_up = True
            report.advance(step)
            is_last = step == run.num_steps
            if step % config.log_every_steps == 0 or is_last:
                record = meter.record(step, lr=lr, **speed)
                if world.is_main:
                    owner.check()
                report.log(record)
                meter = StepMeter(step, terms, world)
            checkpoints.check()
            kept_averages.check()
            if config.ema.keep_every_steps and step % config.ema.keep_every_steps == 0:
                names = tuple(name for name in ema.averages if name.startswith("std_"))
                state = averages_state(engine, ema, names)
                kept_averages.save(state, dataclasses.replace(progress, averages=names))
            if step % config.save_every_steps == 0 or is_last or asked_to_stop:
                checkpoints.save(whole_state(engine, ema), progress, engine.save_own_files)
            if run.vae is not None and (step % config.preview.every_steps == 0 or is_last):
                checkpoints.wait()
                picture = run_dir / PREVIEWS / step_name(step)
                vae = run.vae.to(world.device)
                for name, path in save_previews(engine, ema, vae, config.preview, config.seed, picture).items():
                    report.log_image(name, path, step)
            meter.step_ended()
        checkpoints.wait()
        kept_averages.wait()
    if progress.step < run.num_steps:
        if world.is_main:
            name = signal.Signals(asked_to_stop).name
            print(f"stopped by {name} after step {progress.step:,}, saved; run the same command to resume")
        sys.exit(EXIT_AGAIN)
    if world.is_main:
        print(
            f"finished {run.num_steps:,} steps; weights in {find_latest(run_dir)}, metrics in {run_dir / METRICS_FILE}"
        )


def read_from(progress: Progress, config: TrainConfig, run: RunPlan, world: World) -> Iterator[TrainingInputs]:
    """Return this rank's inputs for the remaining steps; the data.num_workers processes draw the random numbers too."""
    first, offset = progress.step, progress.data_offset

    def draw(batch: Batch, step: int) -> TrainingInputs:
        return draw_training_inputs(batch, step + 1, run.step, world.rank)

    return read_batches(
        run.shards,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=range(first + offset, run.num_steps + offset),
        rank=world.rank,
        world_size=world.size,
        labels=run.labels,
        images_per_sample=config.model.images_per_sample,
        make=draw,
        made_bytes=drawn_bytes(run.step),
        pinned=world.device.type == "cuda",
    )


def roll_back(engine: Engine, ema: EMA, progress: Progress, what: str, run_dir: Path, guard: GuardConfig) -> Progress:
    """Roll back to the newest checkpoint, and skip the batches since then; return the progress from there.

    Raises:
        UserError: if there is no checkpoint, or the run was rolled back `guard.max_rollbacks` times already.
    """
    rollbacks = progress.rollbacks + 1
    found = restore_newest(engine, ema, run_dir) if rollbacks <= guard.max_rollbacks else None
    if found is None:
        before = "the run was rolled back before" if rollbacks > guard.max_rollbacks else "there is no checkpoint yet"
        raise UserError(
            f"{guard.skips_before_rollback} steps in a row went wrong, {what}; {before}. Replay the steps kept in "
            f"{run_dir / ANOMALIES} with `flowar replay`; a lower optim.lr or precision=tf32 may help"
        )
    restored, _ = found
    if engine.world.is_main:
        remove_averages_after(run_dir, restored.step)
    last_batch = progress.step + progress.data_offset
    return dataclasses.replace(
        restored, averages=progress.averages, data_offset=last_batch - restored.step, rollbacks=rollbacks
    )


def mfu_per_speed(model: ModelConfig, peak: float | None, precision: str, world: World) -> float | None:
    """Return the share of all devices' peak rate that one image/s takes, or None if the peak is not known.

    Args:
        model: in training.
        peak: TFLOP/s of one device; None: from the table of known GPUs, or measured on a CPU.
        precision: of the training.
        world: gives the number of devices.
    """
    peak = peak or peak_tflops(world.device, precision)
    return None if peak is None else count_training_flops(model) / (1e12 * peak * world.size)
