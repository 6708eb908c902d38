"""`flowar submit evaluate --follow RUN_DIR`: each new checkpoint of a training run is measured by a job of its own.

The training knows nothing of it and never waits. What was done is read from the folders, so this can be stopped and
started at any time:
    RUN_DIR/evaluations/step_00001000/model     the averaged weights, until the job has finished
    RUN_DIR/evaluations/step_00001000           its samples or their features, evaluation/, jobs/
Read next: submit.py.
"""

import dataclasses
import shutil
import time
from pathlib import Path

from cluster.status import find_jobs, is_finished, jobs_folder
from cluster.submit import PlannedJob, submit
from flowar import export
from flowar.config import ClusterConfig, ExportConfig, FollowConfig, load_config
from flowar.errors import UserError
from flowar.run_folder import checkpoint_step, list_checkpoints, step_name

EVALUATIONS = "evaluations"
MODEL = "model"


def follow(run_dir: Path, words: list[str], cluster_file: str, *, once: bool, dry_run: bool) -> None:
    """Submit a job for each checkpoint that is due and has none, until the training is finished and all are measured.

    Args:
        run_dir: of the training.
        words: of the command line: a YAML file of FollowConfig, settings, settings of the cluster.
        cluster_file: YAML.
        once: look once instead of going on.
        dry_run: say what would be submitted.

    Raises:
        UserError: if something doesn't fit.
    """
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    own = tuple(word.removeprefix("cluster.") for word in words if word.startswith("cluster."))
    others = tuple(word for word in words if not word.startswith("cluster.") and word not in files)
    config = load_config(FollowConfig, files[0] if files else None, others)
    cluster = load_config(ClusterConfig, cluster_file, own)
    if not run_dir.is_dir():
        raise UserError(f"--follow {run_dir} does not exist; give the run_dir of a training run")
    if not Path(config.evaluate.reference).exists():
        raise UserError(f"evaluate.reference={config.evaluate.reference} does not exist")
    print(f"following {run_dir}, every {config.poll_s:g} s; Ctrl-C ends it, the same command goes on")
    while True:
        for checkpoint in due_checkpoints(run_dir, config):
            if dry_run:
                print(f"would measure {checkpoint} with {num_images(config, checkpoint_step(checkpoint)):,} images")
            else:
                measure(run_dir, checkpoint, config, cluster)
        remove_weights(run_dir)
        if once or dry_run or (is_trained(run_dir) and not due_checkpoints(run_dir, config)):
            return
        time.sleep(config.poll_s)


def due_checkpoints(run_dir: Path, config: FollowConfig) -> list[Path]:
    """Return the complete checkpoints that are to be measured and have no job yet, oldest first."""
    due = []
    for checkpoint in list_checkpoints(run_dir):
        step = checkpoint_step(checkpoint)
        every = config.every_steps or 1
        is_asked = step % every == 0 or is_milestone(config, step)
        if is_asked and not find_jobs(run_dir / EVALUATIONS / step_name(step)):
            due.append(checkpoint)
    return due


def is_milestone(config: FollowConfig, step: int) -> bool:
    """Return whether a step's checkpoint is measured with more images."""
    return bool(config.milestone_every_steps) and step % config.milestone_every_steps == 0


def num_images(config: FollowConfig, step: int) -> int:
    """Return how many images are drawn of a step's checkpoint."""
    return config.milestone_images if is_milestone(config, step) else config.num_images


def measure(run_dir: Path, checkpoint: Path, config: FollowConfig, cluster: ClusterConfig) -> None:
    """Copy a checkpoint's weights, which the training may soon delete, and submit the job that draws and measures."""
    step = checkpoint_step(checkpoint)
    folder = run_dir / EVALUATIONS / step_name(step)
    model = folder / MODEL
    sample = config.evaluate.sample
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            export.main(ExportConfig(model=str(checkpoint), out_dir=str(model), weights=sample.weights))
        except (UserError, OSError):
            if checkpoint.exists():
                raise
            print(f"{checkpoint} was deleted before its weights were copied; keep more: keep_checkpoints=")
            return
    drawing = dataclasses.replace(
        sample, model=str(model), weights="ema", out_dir=str(folder), num_images=num_images(config, step)
    )
    evaluation = dataclasses.replace(
        config.evaluate, sample=drawing, samples=str(folder), run_dir=str(run_dir), step=step
    )
    submit([PlannedJob("evaluate", evaluation, cluster, jobs_folder("evaluate", evaluation))], dry_run=False)


def remove_weights(run_dir: Path) -> None:
    """Delete the copied weights of what has been measured."""
    for model in (run_dir / EVALUATIONS).glob(f"step_*/{MODEL}"):
        jobs = find_jobs(model.parent)
        if jobs and is_finished(jobs[-1]):
            shutil.rmtree(model)


def is_trained(run_dir: Path) -> bool:
    """Return whether the run was submitted as a job that has finished, and all that was measured too."""
    jobs = [job for job in find_jobs(run_dir) if job.verb == "train"]
    measuring = [job for folder in (run_dir / EVALUATIONS).glob("step_*") for job in find_jobs(folder)[-1:]]
    return bool(jobs) and is_finished(jobs[-1]) and all(is_over(job) for job in measuring)


def is_over(job: object) -> bool:
    """Return whether a job has finished or failed."""
    return all(any(job.mark(kind, job_id).exists() for kind in ("finished", "failed")) for job_id in job.ids)
