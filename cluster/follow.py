"""`flowar submit evaluate --follow RUN_DIR`: measure each new checkpoint of a training run in its own job.

The training isn't involved and never waits. The state is in the folders, so following can be stopped and restarted at
any time:
    RUN_DIR/evaluations/step_00001000/model     the averaged weights, until the job has finished
    RUN_DIR/evaluations/step_00001000           its samples or their features, evaluation/, jobs/
    RUN_DIR/evaluations/step_00001000.*.json    its metrics; report.py
Read next: submit.py.
"""

import dataclasses
import shutil
import time
from pathlib import Path

from cluster.job import Job
from cluster.status import find_jobs, is_finished, is_live, jobs_folder
from cluster.submit import PlannedJob, read_cluster, submit, without_cluster
from flowar.base.errors import UserError
from flowar.base.run_folder import EVALUATIONS, checkpoint_step, list_checkpoints, step_name
from flowar.cli import parse_words
from flowar.config.drawing import SampleConfig
from flowar.config.jobs import ClusterConfig, FollowConfig
from flowar.config.load import extend
from flowar.config.measuring import EvaluateConfig
from flowar.models.folders import export_model
from flowar.sampling.job import choose_vae

MODEL = "model"
MAY_PASS = (UserError, OSError)  # Slurm is busy, or a disk is full: the next try may succeed


def follow(run_dir: Path, words: list[str], cluster_file: str, *, once: bool, dry_run: bool) -> None:
    """Submit a job for each due checkpoint without one, until the training's job and these jobs are finished.

    A training that was not submitted as a job is followed until Ctrl-C.

    Args:
        run_dir: of the training.
        words: of the command line: a YAML file of FollowConfig, settings, settings of the cluster.
        cluster_file: YAML.
        once: look once, then return.
        dry_run: print what would be submitted.

    Raises:
        UserError: if something doesn't fit.
    """
    config = parse_words(FollowConfig, without_cluster(words))
    cluster = read_cluster(cluster_file, words)
    if not run_dir.is_dir():
        raise UserError(f"--follow {run_dir} does not exist; give the run_dir of a training run")
    if not Path(config.evaluate.reference).exists():
        raise UserError(
            f"evaluate.reference={config.evaluate.reference} does not exist; make it with `flowar evaluate "
            "make-reference`, or give images"
        )
    print(f"following {run_dir}, every {config.poll_s:g} s; stop with Ctrl-C, the same command resumes")
    if dry_run:
        for checkpoint in due_checkpoints(run_dir, config):
            print(f"would measure {checkpoint} with {num_images(config, checkpoint_step(checkpoint)):,} images")
        return
    look(run_dir, config, cluster)
    while not once and not is_done(run_dir, config):
        time.sleep(config.poll_s)
        try:
            look(run_dir, config, cluster)
        except MAY_PASS as error:
            print(f"{error} (looking again in {config.poll_s:g} s)")


def is_done(run_dir: Path, config: FollowConfig) -> bool:
    """Return whether nothing is left to do; False if that can't be determined now."""
    try:
        return not due_checkpoints(run_dir, config) and is_over(run_dir)
    except MAY_PASS as error:
        print(f"{error} (looking again in {config.poll_s:g} s)")
        return False


def look(run_dir: Path, config: FollowConfig, cluster: ClusterConfig) -> None:
    """Submit jobs for due checkpoints, and delete the copied weights of measured ones."""
    for checkpoint in due_checkpoints(run_dir, config):
        submit_measurement(run_dir, checkpoint, config, cluster)
    for model in (run_dir / EVALUATIONS).glob(f"step_*/{MODEL}"):
        jobs = submitted_jobs(model.parent)
        if jobs and is_finished(jobs[-1]):
            shutil.rmtree(model)


def submitted_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a folder that reached the scheduler; an interrupted submission leaves a job without ids."""
    return [job for job in find_jobs(folder) if job.ids]


def due_checkpoints(run_dir: Path, config: FollowConfig) -> list[Path]:
    """Return the complete checkpoints that should be measured and have no job yet, oldest first."""
    due = []
    for checkpoint in list_checkpoints(run_dir):
        step = checkpoint_step(checkpoint)
        every = config.every_steps or 1
        is_asked = step % every == 0 or is_milestone(config, step)
        if is_asked and not submitted_jobs(run_dir / EVALUATIONS / step_name(step)):
            due.append(checkpoint)
    return due


def is_milestone(config: FollowConfig, step: int) -> bool:
    """Return whether a step's checkpoint is measured with more images."""
    return bool(config.milestone_every_steps) and step % config.milestone_every_steps == 0


def num_images(config: FollowConfig, step: int) -> int:
    """Return how many images are drawn for a step's checkpoint."""
    return config.milestone_images if is_milestone(config, step) else config.num_images


def submit_measurement(run_dir: Path, checkpoint: Path, config: FollowConfig, cluster: ClusterConfig) -> None:
    """Copy a checkpoint's weights, which the training may soon delete, and submit the job that draws and measures."""
    step = checkpoint_step(checkpoint)
    folder = run_dir / EVALUATIONS / step_name(step)
    model = folder / MODEL
    sample = config.evaluate.sample
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            export_model(checkpoint, sample.weights, model)
        except (UserError, OSError):
            if checkpoint.exists():
                raise
            print(f"{checkpoint} was deleted before its weights were copied; raise keep_checkpoints to keep more")
            return
    vae = choose_vae(sample.vae, checkpoint)  # from the run, as the copied model doesn't name the VAE's weights
    drawn = dataclasses.replace(sample, weights="ema", vae=vae, num_images=num_images(config, step))
    drawing = extend(SampleConfig, drawn, model=str(model), out_dir=str(folder))
    evaluation = extend(
        EvaluateConfig, config.evaluate, sample=drawing, samples=str(folder), run_dir=str(run_dir), step=step
    )
    submit([PlannedJob("evaluate", evaluation, cluster, jobs_folder("evaluate", evaluation))], dry_run=False)


def is_over(run_dir: Path) -> bool:
    """Return whether the run was submitted as a job that has finished, and no measuring job is left."""
    jobs = [job for job in submitted_jobs(run_dir) if job.verb == "train"]
    measuring = [job for folder in (run_dir / EVALUATIONS).glob("step_*/") for job in submitted_jobs(folder)[-1:]]
    return bool(jobs) and is_finished(jobs[-1]) and not any(is_live(job) for job in measuring)
