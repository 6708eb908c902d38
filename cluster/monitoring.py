"""What `flowar status` shows, for other programs: JSON, and Prometheus' text format for dashboards.

A node exporter's textfile collector reads the text: `flowar status runs/l --prometheus > /var/lib/node_exporter/l.prom`
Read next: status.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.runs import RunCells
from flowar.training.run_state import is_run, latest_checkpoint, total_steps

SHOWN_STATES = ("PENDING", "RUNNING", "STOPPED", "FINISHED", "FAILED", "ENDED", "UNKNOWN")
# By number of a run: the metric's name and what it is.
GAUGES = {
    "step": "finished training steps",
    "num_steps": "training steps in all",
    "loss": "training loss, mean since the last record",
    "images_per_s": "training speed",
    "grad_norm": "gradient norm, mean since the last record",
    "lr": "learning rate",
    "remaining_s": "expected time to the last step",
    "checkpoint_step": "step of the newest complete checkpoint",
    "checkpoint_age_s": "age of the newest complete checkpoint",
    "restarts": "restarts of the job",
}


INFINITE = (float("inf"), float("-inf"))  # neither they nor nan are JSON


class StatusRow(NamedTuple):
    """A job, or a run that no scheduler started."""

    run: str
    job: str
    verb: str
    state: str
    nodes: str
    cells: RunCells
    restarts: int | None
    run_dir: Path | None  # of a training


def numbers_of(row: StatusRow) -> dict[str, float]:
    """Return the numbers of GAUGES that are known of a row."""
    from flowar.training.report import read_metrics

    found: dict[str, float] = {} if row.restarts is None else {"restarts": row.restarts}
    if row.run_dir is None or not is_run(row.run_dir):
        return found
    records, steps, latest = read_metrics(row.run_dir), total_steps(row.run_dir), latest_checkpoint(row.run_dir)
    if records:
        found |= {key: value for key, value in records[-1].items() if key in GAUGES}
    if steps is not None:
        found["num_steps"] = steps
    if latest is not None:
        found |= {"checkpoint_step": latest[0], "checkpoint_age_s": latest[1].total_seconds()}
    return found


def as_json(rows: Sequence[StatusRow], notes: Sequence[str]) -> str:
    """Return the rows and notes as JSON."""
    named = ("run", "job", "verb", "state", "nodes")
    listed: list[dict[str, Any]] = [{key: getattr(row, key) for key in named} | numbers_of(row) for row in rows]
    finite = [
        {key: None if value != value or value in INFINITE else value for key, value in row.items()} for row in listed
    ]
    return json.dumps({"runs": finite, "notes": list(notes)}, indent=2, allow_nan=False)


def as_prometheus(rows: Sequence[StatusRow]) -> str:
    """Return the rows in Prometheus' text format: a gauge for each number; flowar_state is 1 for the current state."""
    numbers = [numbers_of(row) for row in rows]
    lines = ["# HELP flowar_state 1 for the state that a job or run is in", "# TYPE flowar_state gauge"]
    for row in rows:
        states = dict.fromkeys((*SHOWN_STATES, row.state))
        lines += [f"flowar_state{labels_of(row, state=state)} {int(state == row.state)}" for state in states]
    for name, help_text in GAUGES.items():
        values = [(row, own[name]) for row, own in zip(rows, numbers, strict=True) if name in own]
        if values:
            lines += [f"# HELP flowar_{name} {help_text}", f"# TYPE flowar_{name} gauge"]
            lines += [f"flowar_{name}{labels_of(row)} {float(value)!r}" for row, value in values]
    return "\n".join(lines) + "\n"


def labels_of(row: StatusRow, **more: str) -> str:
    """Return the labels of a row; backslashes, quotes and line breaks in values are escaped, as the format demands."""
    folder = "" if row.run_dir is None else str(row.run_dir.absolute())
    labels = {"run": row.run, "folder": folder, "job": row.job, "verb": row.verb} | more
    escaped = {
        key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, value in labels.items()
    }
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"
