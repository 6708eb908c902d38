"""What a training run keeps where, and which of its checkpoints are complete. Read next: checkpoint.py.

RUN_DIR/
    config.yaml                     the resolved settings
    dataset.json                    the passport of its shards
    metrics.jsonl                   one record per logged step
    previews/step_00001000.png      images drawn with the averaged weights
    checkpoints/step_00001000/      complete as soon as it has this name: it is written as .step_00001000 and renamed
        raw/, ema/                  model folders (model.safetensors, config.json, dataset.json)
        training.pt                 {"step", "optimizer"}
"""

import re
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the complete checkpoint after `step` steps."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / CHECKPOINTS
    found = [entry for entry in folder.iterdir() if STEP_FOLDER.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))


def find_latest(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete = list_checkpoints(run_dir)
    return complete[-1] if complete else None
