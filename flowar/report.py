"""What a run says of itself: metrics.jsonl, the progress bar, wandb. Formats numbers, never computes them."""

import json
import secrets
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowar.config import TrainConfig, WandbConfig, load_config
from flowar.files import write_text
from flowar.run_folder import CONFIG_FILE, METRICS_FILE

WANDB_ID_FILE = "wandb_id.txt"
EVALUATIONS_FILE = "evaluations.jsonl"  # one line for each time that samples of a checkpoint were measured
SENT_FILE = "evaluations_sent.txt"  # how many of them wandb has
LIVE_FILE = "wandb_live"  # touched while a training process has the wandb run open
LIVE_S = 1800
QUIET_LINE_EVERY = 10  # where no terminal shows the bar, every so many records give a line


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return the records of a run's metrics.jsonl, one per logged step."""
    file = Path(run_dir) / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half-written


class TrainingReport:
    """Sinks of one training run; a context manager. `step` counts finished steps everywhere.

    metrics.jsonl is the truth: on resuming, records past the checkpoint are dropped, as those steps are done again.
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
            send_evaluations(self.wandb_run, self.file.parent)
            (self.file.parent / LIVE_FILE).unlink(missing_ok=True)
            self.wandb_run.finish(exit_code=1 if exception[0] else 0)
        if self.tensorboard is not None:
            self.tensorboard.close()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.progress.update(self.task, completed=step)

    def log(self, record: dict[str, float]) -> None:
        """Write one record, which holds "step", to every sink."""
        if not self.is_main:
            return
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))
            (self.file.parent / LIVE_FILE).touch()
            send_evaluations(self.wandb_run, self.file.parent)
        if self.tensorboard is not None:
            for key, value in record.items():
                self.tensorboard.add_scalar(key, value, int(record["step"]))
        by_scale = " ".join(f"{record[key]:.3f}" for key in record if key.startswith("loss/scale_"))
        status = f"loss {record['loss']:.4f} (scales {by_scale}), {record['images_per_s']:.0f} images/s"
        self.progress.update(self.task, status=status)
        if not self.console.is_terminal and self.num_records % QUIET_LINE_EVERY == 0:
            remaining_min = record["remaining_s"] / 60
            self.say(f"step {record['step']:,}: {status}, about {remaining_min:.1f} min left")
        self.num_records += 1

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send a picture to wandb; the file is there in any case."""
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
        """Drop the records after `step`: those steps are done again."""
        if not self.is_main or not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # a process that died while writing left half a line
            if json.loads(line)["step"] <= step:
                kept.append(line)
        replacement = self.file.with_name("." + self.file.name)
        replacement.write_text("".join(kept))
        replacement.replace(self.file)


def record_evaluation(run_dir: Path, record: dict[str, object]) -> None:
    """Add metrics of a checkpoint's samples to a run: to evaluations.jsonl, and to wandb.

    A training process that has the wandb run open sends them itself, when it logs next: two processes must not write to
    one run.

    Args:
        run_dir: of the training.
        record: "step", "num_samples", and metrics.
    """
    if record not in read_evaluations(run_dir):
        with (run_dir / EVALUATIONS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
    live = run_dir / LIVE_FILE
    if live.exists() and time.time() - live.stat().st_mtime < LIVE_S:
        return
    config = load_config(TrainConfig, run_dir / CONFIG_FILE)
    wandb_run = _start_wandb(run_dir, config.wandb, {})
    if wandb_run is not None:
        send_evaluations(wandb_run, run_dir)
        wandb_run.finish()


def read_evaluations(run_dir: Path) -> list[dict[str, object]]:
    """Return the records of evaluations.jsonl."""
    file = run_dir / EVALUATIONS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def send_evaluations(wandb_run: object, run_dir: Path) -> None:
    """Send to wandb what it doesn't have of evaluations.jsonl, each at the step of its checkpoint."""
    sent_file = run_dir / SENT_FILE
    sent = int(sent_file.read_text()) if sent_file.exists() else 0
    records = read_evaluations(run_dir)
    if len(records) <= sent:
        return
    wandb_run.define_metric("evaluation/*", step_metric="evaluation/step")
    for record in records[sent:]:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        count = f"_{round(record['num_samples'] / 1000)}k" if record["num_samples"] >= 1000 else ""
        named = {f"evaluation/{name}{'' if name == 'step' else count}": value for name, value in numbers.items()}
        wandb_run.log(named)
    write_text(sent_file, f"{len(records)}\n")


def _start_tensorboard(run_dir: Path, step: int) -> object:
    """Return a writer of event files that forgets what an earlier process wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _start_wandb(run_dir: Path, config: WandbConfig, settings: dict[str, object]) -> object | None:
    """Return the wandb run, the same one after every restart, or None where it is disabled."""
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
