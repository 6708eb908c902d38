"""What can be seen of a training run from outside: its records, starts, previews, checkpoint. Read next: watch_page.py.

Everything comes from files that the run writes anyway, and nothing of its settings but the model's name: they may hold
what others shouldn't read.
"""

import functools
import io
import math
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from flowar.base.errors import UserError
from flowar.base.pages import GRID_PADDING, PAGE_WIDTH
from flowar.base.records import parse_record, read_record
from flowar.base.run_folder import CONFIG_FILE, EVALUATIONS, HISTORY_FILE, METRICS_FILE, PREVIEWS
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.latents.schema import read_passport
from flowar.training.report import read_metrics
from flowar.training.run_state import Trainer, age_of, find_trainer, latest_checkpoint, total_steps

PREVIEW_NAME = re.compile(r"step_(\d+)\.png")  # drawn with averaged weights; those of raw ones have another ending
FILM_ROWS, FILM_IMAGES = 8, 8  # of the previews that show how images grow: so many of them, so many images of each


SMALLEST_IMAGE = 64  # pixels; smaller ones are enlarged


class Start(NamedTuple):
    """A start of the run that trained."""

    after_step: int
    time: str
    processes: int


class MeasuredFID(NamedTuple):
    """The FID of a checkpoint's samples."""

    step: int
    fid: float
    how: str  # by which protocol, of how many samples, against what: only what is measured alike compares


class Picture(NamedTuple):
    """A PNG for the page."""

    step: int
    content: bytes
    size: tuple[int, int]


@dataclass(frozen=True)
class RunView:
    """A training run at one moment."""

    name: str  # of its folder
    variant: str  # of the model
    trainer: Trainer
    num_steps: int | None
    records: list[dict[str, float]]  # of metrics.jsonl
    logged: timedelta | None  # how long ago the last one was written
    starts: list[Start]
    checkpoint: tuple[int, timedelta] | None  # step and age of the newest
    measured: list[MeasuredFID]  # by step
    film: list[Picture]  # the first images of some previews, oldest first
    newest: Picture | None  # the newest preview, all of it
    notes: list[str]  # what could not be read

    def values(self, key: str) -> list[float]:
        """Return one column of the records; not a number where a record doesn't have it."""
        return [record.get(key, math.nan) for record in self.records]


def view_run(run_dir: Path) -> RunView:
    """Return what can be seen of a run now.

    Raises:
        UserError: if one of its records is damaged.
    """
    notes: list[str] = []
    previews = list_previews(run_dir)
    size = read_passport(run_dir).image_size
    film = [read_picture(previews[step], step, size, is_whole=False, notes=notes) for step in choose_steps(previews)]
    last = max(previews, default=None)
    newest = None if last is None else read_picture(previews[last], last, size, is_whole=True, notes=notes)
    metrics = run_dir / METRICS_FILE
    return RunView(
        name=run_dir.resolve().name,
        variant=load_described(TrainConfig, run_dir / CONFIG_FILE).model.variant,
        trainer=find_trainer(run_dir),
        num_steps=total_steps(run_dir),
        records=read_metric_numbers(run_dir),
        logged=age_of(metrics) if metrics.exists() else None,
        starts=read_starts(run_dir),
        checkpoint=latest_checkpoint(run_dir),
        measured=read_measured(run_dir),
        film=[picture for picture in film if picture is not None],
        newest=newest,
        notes=list(dict.fromkeys(notes)),
    )


def read_metric_numbers(run_dir: Path) -> list[dict[str, float]]:
    """Return the records of metrics.jsonl, in which every value is a number.

    Raises:
        UserError: if one is not.
    """
    records = read_metrics(run_dir)
    for record in records:
        for key, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(
                    f"{run_dir / METRICS_FILE} is damaged: {key} of step {record['step']} is {str(value)[:40]!r}, a "
                    "number is needed; remove that line"
                )
    return records


def read_starts(run_dir: Path) -> list[Start]:
    """Return the starts of a run that trained, from its history.jsonl; a line that is half-written doesn't count.

    Raises:
        UserError: if a line is damaged.
    """
    file = run_dir / HISTORY_FILE
    *lines, _ = file.read_text(errors="replace").split("\n") if file.exists() else [""]
    starts = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_record(line)
            starts.append(Start(int(record["after_step"]), str(record["time"]), int(record["processes"])))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged in line {number} ({type(error).__name__}: {error}); put it back from a backup, or "
                "remove that line"
            ) from error
    return starts


def read_measured(run_dir: Path) -> list[MeasuredFID]:
    """Return the FIDs of a run's checkpoints, by step; evaluations without one are left out.

    Raises:
        UserError: if a record is damaged.
    """
    found = []
    for file in (run_dir / EVALUATIONS).glob("step_*.json"):
        record = read_record(file, "remove it and evaluate those samples again", ("step", "num_samples", "protocol"))
        fid = record.get("fid")
        if isinstance(fid, int | float):
            against = Path(str(record.get("reference"))).name
            how = f"{record['protocol']}, {record['num_samples']} samples, against {against}"
            found.append(MeasuredFID(int(record["step"]), float(fid), how))
    return sorted(found)


def list_previews(run_dir: Path) -> dict[int, Path]:
    """Return the previews of a run's averaged weights by step; other files there are ignored."""
    folder = run_dir / PREVIEWS
    found = ((PREVIEW_NAME.fullmatch(file.name), file) for file in folder.iterdir()) if folder.is_dir() else ()
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def choose_steps(previews: dict[int, Path]) -> list[int]:
    """Return at most FILM_ROWS of the steps, evenly spaced, the first and the last among them."""
    steps = list(previews)
    count = min(FILM_ROWS, len(steps))
    return [steps[round(place * (len(steps) - 1) / max(1, count - 1))] for place in range(count)]


def read_picture(file: Path, step: int, image_size: int, *, is_whole: bool, notes: list[str]) -> Picture | None:
    """Return a preview for the page; None, with a note, if it can't be read.

    Args:
        file: the grid of images.
        step: after which it was drawn.
        image_size: pixels of an image of the grid.
        is_whole: all images, not only the first FILM_IMAGES of its first row.
        notes: get one more if it can't be read.
    """
    try:
        content, size = shrink(file, file.stat().st_mtime_ns, image_size, is_whole)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"{file} can't be read as a PNG; is it damaged? Remove it, and the page does without")
        return None
    return Picture(step, content, size)


@functools.lru_cache(maxsize=4 * FILM_ROWS)
def shrink(file: Path, changed: int, image_size: int, is_whole: bool) -> tuple[bytes, tuple[int, int]]:
    """Return a preview as PNG bytes, at most as wide as the page, small images enlarged; and its size.

    Args:
        file: the grid of images.
        changed: when; what was made of an older file counts no more.
        image_size, is_whole: as of `read_picture`.
    """
    with Image.open(file, formats=["PNG"]) as opened:
        picture = opened.convert("RGB")
    cell = image_size + GRID_PADDING
    is_grid = (picture.width - GRID_PADDING) % cell == 0 and picture.height >= GRID_PADDING + cell
    if not is_whole and is_grid:  # one image alone has no padding
        columns = min(FILM_IMAGES, (picture.width - GRID_PADDING) // cell)
        picture = picture.crop((0, 0, GRID_PADDING + columns * cell, GRID_PADDING + cell))
    if picture.width > PAGE_WIDTH:
        picture.thumbnail((PAGE_WIDTH, picture.height), Image.Resampling.LANCZOS)
    elif enlarge := min(SMALLEST_IMAGE // image_size, PAGE_WIDTH // picture.width):
        picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue(), picture.size
