"""Report a run's progress: metrics.jsonl, the progress bar, wandb. Formats numbers, never computes them."""

import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.base.records import DamagedRecordError, parse_record, read_record, record_line, write_record
from flowar.base.run_folder import CONFIG_FILE, EVALUATIONS, METRICS_FILE, PREVIEWS, step_name
from flowar.config.load import load_described
from flowar.config.training import TrainConfig, WandbConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

WANDB_ID_FILE = "wandb_id.txt"
SENT_FILE = "sent.txt"  # the evaluations that wandb has
LIVE_FILE = "wandb_live"  # touched while a training process has the wandb run open
LIVE_S = 1800
QUIET_LINE_EVERY = 10  # without a terminal for the bar, print a line every 10 records


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return the records of a run's metrics.jsonl, one per logged step.

    Raises:
        UserError: if a line is damaged.
    """
    file = Path(run_dir) / METRICS_FILE
    *lines, _ = file.read_text(errors="replace").split("\n") if file.exists() else [""]  # the rest is half-written
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_record(line)
            if not isinstance(record.get("step"), int):
                raise ValueError("it has no step")
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} is damaged in line {number} ({error}); remove that line") from error
        records.append(record)
    return records


class TrainingReport:
    """Sinks of one training run; a context manager. `step` counts finished steps everywhere.

    metrics.jsonl is authoritative: on resuming, records past the checkpoint are dropped, as those steps are repeated.
    """

    def __init__(
        self,
        run_dir: Path,
        wandb_config: WandbConfig,
        settings: dict[str, object],
        *,
        step: int,
        num_steps: int,
        is_main: bool,
        tensorboard: bool = False,
    ) -> None:
        self.is_main = is_main  # the others' reports do nothing
        self.file = run_dir / METRICS_FILE
        self.rewind(step)
        self.wandb_run = _start_wandb(run_dir, wandb_config, settings) if is_main else None
        if self.wandb_run is not None:
            (run_dir / LIVE_FILE).touch()
        self.tensorboard = _start_tensorboard(run_dir, step) if is_main and tensorboard else None
        self.console = Console(quiet=not is_main)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (self.console.is_terminal and is_main),
        )
        self.task = self.progress.add_task("training", total=num_steps, completed=step, status="")
        self.num_records = 0

    def __enter__(self) -> "TrainingReport":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        if self.wandb_run is not None:
            for evaluation in take_evaluations(self.wandb_run, self.file.parent):
                self.wandb_run.log(evaluation)
            self.finish_wandb(self.wandb_run)
            self.wandb_run.finish(exit_code=1 if exception[0] else 0)
            (self.file.parent / LIVE_FILE).unlink(missing_ok=True)
        if self.tensorboard is not None:
            self.tensorboard.close()

    def finish_wandb(self, wandb_run: "Run") -> None:
        """Send all previews as one table over the steps, and the last record as the run's summary."""
        import wandb

        table = wandb.Table(columns=["step", "weights", "images"])
        for file in sorted((self.file.parent / PREVIEWS).glob("step_*.png")):
            step, _, raw = file.stem.removeprefix("step_").partition("_")
            table.add_data(int(step), raw or "averaged", wandb.Image(str(file)))
        if table.data:
            wandb_run.log({"previews": table})
        records = read_metrics(self.file.parent)
        if records:
            wandb_run.summary.update({f"final/{key}": value for key, value in records[-1].items()})

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.progress.update(self.task, completed=step)

    def log(self, record: dict[str, float]) -> None:
        """Write one record, which holds "step", to every sink."""
        if not self.is_main:
            return
        try:
            with self.file.open("a") as file:
                file.write(record_line(record))
        except OSError as error:
            raise UserError(
                f"can't write to {self.file}: {error.strerror or error}; checkpoints are intact; free some space or "
                "fix the folder's permissions, then run the same command again"
            ) from error
        if self.wandb_run is not None:
            (self.file.parent / LIVE_FILE).touch()
            values = {k: v for k, v in record.items() if k != "step"}
            for evaluation in take_evaluations(self.wandb_run, self.file.parent, most=1):
                values |= evaluation  # in one record: a second one would advance wandb's own step
            self.wandb_run.log(values, step=int(record["step"]))
        if self.tensorboard is not None:
            for key, value in record.items():
                self.tensorboard.add_scalar(key, value, int(record["step"]))
        by_term = " ".join(f"{record[key]:.3f}" for key in record if key.startswith("loss/"))
        status = f"loss {record['loss']:.4f} ({by_term}), {record['images_per_s']:.0f} images/s"
        self.progress.update(self.task, status=status)
        if not self.console.is_terminal and self.num_records % QUIET_LINE_EVERY == 0:
            remaining_min = record["remaining_s"] / 60
            self.say(f"step {record['step']:,}: {status}, about {remaining_min:.1f} min left")
        self.num_records += 1

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send a picture to wandb and TensorBoard; the file exists in any case."""
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path))}, step=step)
        if self.tensorboard is not None:
            pixels = np.asarray(Image.open(path))
            self.tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, as those steps will be repeated."""
        if not self.is_main or not self.file.exists():
            return
        kept = [record for record in read_metrics(self.file.parent) if record["step"] <= step]
        replacement = self.file.with_name("." + self.file.name)
        replacement.write_text("".join(map(record_line, kept)))
        replacement.replace(self.file)


def record_evaluation(run_dir: Path, record: dict[str, Any]) -> None:
    """Add metrics of a checkpoint's samples to a run: a file in RUN_DIR/evaluations, and wandb.

    A training process that has the wandb run open sends them itself: two processes must not write to one run.

    Args:
        run_dir: of the training.
        record: "step", "num_samples", "protocol", "samples", "reference", and metrics.
    """
    which = [record.get(name) for name in ("step", "num_samples", "protocol", "samples", "reference")]
    name = hashlib.sha256(json.dumps(which).encode()).hexdigest()[:12]
    folder = run_dir / EVALUATIONS
    folder.mkdir(exist_ok=True)
    write_record(folder / f"{step_name(int(record['step']))}.{name}.json", record)
    config = load_described(TrainConfig, run_dir / CONFIG_FILE)
    with FileLock(folder / ".lock"):
        live = run_dir / LIVE_FILE
        if live.exists() and time.time() - live.stat().st_mtime < LIVE_S:
            return
        wandb_run = _start_wandb(run_dir, config.wandb, {})
        if wandb_run is None:
            return
        for values in take_evaluations(wandb_run, run_dir):
            wandb_run.log(values)
        wandb_run.finish()


def record_export(run_dir: Path, folder: Path, step: int, weights: str) -> None:
    """Add an exported model folder to the wandb run as an artifact, if there is one that no other process has open."""
    if not (run_dir / CONFIG_FILE).is_file():
        return
    config = load_described(TrainConfig, run_dir / CONFIG_FILE)
    live = run_dir / LIVE_FILE
    if live.exists() and time.time() - live.stat().st_mtime < LIVE_S:
        print(f"{folder} is not in wandb, because a training process has that run open; export it again later")
        return
    wandb_run = _start_wandb(run_dir, config.wandb, {})
    if wandb_run is None:
        return
    import wandb

    artifact = wandb.Artifact(f"model-{wandb_run.id}", type="model", metadata={"step": step, "weights": weights})
    artifact.add_dir(str(folder))
    wandb_run.log_artifact(artifact, aliases=[step_name(step), weights])
    wandb_run.finish()


def take_evaluations(wandb_run: "Run", run_dir: Path, most: int | None = None) -> list[dict[str, float]]:
    """Return the evaluations of a run that wandb doesn't have, each with its checkpoint's step, and mark them as sent.

    Args:
        wandb_run: learns that evaluations have their own steps.
        run_dir: of the training.
        most: at most this many; None: all.
    """
    sent_file = run_dir / EVALUATIONS / SENT_FILE
    sent = sent_file.read_text().split() if sent_file.exists() else []
    files = [file for file in sorted((run_dir / EVALUATIONS).glob("step_*.json")) if file.name not in sent][:most]
    if not files:
        return []
    wandb_run.define_metric("evaluation/*", step_metric="evaluation/step")
    found = []
    for file in files:
        try:
            record = read_record(file, "remove it and evaluate those samples again")
        except DamagedRecordError as error:  # training doesn't stop for this
            print(f"not sent to wandb: {error}", flush=True)
            continue
        count = f"_{round(record['num_samples'] / 1000)}k" if record["num_samples"] >= 1000 else ""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        named = {f"evaluation/{name}{count}": value for name, value in numbers.items() if name != "num_samples"}
        found.append({"evaluation/step": record["step"], **named})
    write_text(sent_file, "\n".join([*sent, *(file.name for file in files)]) + "\n")
    return found


def _start_tensorboard(run_dir: Path, step: int) -> "SummaryWriter":
    """Return a writer of event files that discards what an earlier process wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _start_wandb(run_dir: Path, config: WandbConfig, settings: dict[str, object]) -> "Run | None":
    """Return the wandb run, the same one after every restart, or None if it is disabled."""
    if config.mode == "disabled":
        return None
    import wandb

    id_file = run_dir / WANDB_ID_FILE
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    id_file.write_text(run_id + "\n")
    return wandb.init(
        id=run_id,
        resume="allow",
        mode=config.mode,
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.name,
        dir=str(run_dir),
        config=settings,
    )
