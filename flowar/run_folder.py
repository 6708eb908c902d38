"""What a training run keeps where, and which of its checkpoints are complete. Read next: checkpoint.py.

RUN_DIR/
    config.yaml                     the resolved settings
    dataset.json                    the passport of its shards
    metrics.jsonl                   one record per logged step
    previews/step_00001000.png      images drawn with the averaged weights, step_00001000_raw.png with the raw ones
    anomalies/batch_00001234/       a step that was skipped, for `flowar replay`
    checkpoints/step_00001000/      complete as soon as it has this name: it is written as .step_00001000 and renamed
        .metadata, __0_0.distcp     torch.distributed.checkpoint: model.NAME, optim.NAME.exp_avg, ema.AVERAGE.NAME
        state.json                  {"step", "world_size", ...}
        config.json, dataset.json   the model's shape and the shards' passport
    averages/step_00001000/         the same, of EDM2's averages alone; kept for `flowar ema`
"""

import contextlib
import json
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
AVERAGES = "averages"
ANOMALIES = "anomalies"
STATE_FILE = "state.json"


def step_name(step: int) -> str:
    """Return the name of what was written after `step` steps."""
    return f"step_{step:08d}"


def read_progress(folder: Path) -> dict[str, object]:
    """Return the state.json of a checkpoint."""
    return json.loads((folder / STATE_FILE).read_text())


def checkpoint_step(folder: Path) -> int:
    """Return after how many steps a checkpoint was written, from what it says itself."""
    return int(read_progress(folder)["step"])


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a complete checkpoint."""
    return not folder.name.startswith(".") and (folder / STATE_FILE).is_file() and (folder / ".metadata").is_file()


def list_checkpoints(run_dir: str | Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Return the complete checkpoints (or AVERAGES) of a run, by content and not by name, oldest first."""
    folder = Path(run_dir) / kind
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # the run may be deleting it
            if is_checkpoint(entry):
                found.append((checkpoint_step(entry), entry))
    return [entry for _, entry in sorted(found)]


def find_latest(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete = list_checkpoints(run_dir)
    return complete[-1] if complete else None
