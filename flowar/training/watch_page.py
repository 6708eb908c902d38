"""The page of `flowar watch`: where a run is, its curves, how its images grow. Read next: base/charts.py."""

import math
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path

from flowar.base.charts import Line, line_chart
from flowar.base.pages import embed_png, html_table, write_page
from flowar.training.run_view import MeasuredFID, Picture, RunView

LOSS_TERM = "loss/"  # what the names of the loss's terms in metrics.jsonl begin with
STATES = {  # of run_state.py, in the page's words
    "RUNNING": '<span class="good">training</span>',
    "STOPPED": '<span class="bad">stopped</span>: the same <code>flowar train</code> command resumes it',
    "UNKNOWN": "on another machine",  # only the ages below tell whether it still trains
    "FINISHED": '<span class="good">finished</span>',
}


def write_watch_page(file: Path, view: RunView, refresh_s: float | None) -> None:
    """Write the page, whole or not at all.

    Args:
        file: where to.
        view: what it shows.
        refresh_s: after how many seconds a browser loads it again; None: never.
    """
    now = datetime.now(UTC)
    again = "" if refresh_s is None else f"; again every {refresh_s:g} s"
    where = f", {escape(view.trainer.host)}" if view.trainer.state in ("RUNNING", "UNKNOWN") else ""
    parts = [
        f"<h1>{escape(view.name)}</h1>",
        f"<p>{escape(view.variant)}, <b>{STATES[view.trainer.state]}</b>{where}. "
        f'<span class="note">Seen on {now:%Y-%m-%d at %H:%M:%S} UTC{again}.</span></p>',
        *_progress(view),
        _tiles(view),
        *(f'<p class="bad">{escape(note)}</p>' for note in view.notes),
        "<h2>Curves</h2>",
        _charts(view),
    ]
    if view.film:
        parts += [
            "<h2>Growing samples</h2>",
            '<p class="note">The same noise and classes after more and more steps, drawn with averaged weights.</p>',
            f'<div class="film">{"".join(_film_row(picture) for picture in view.film)}</div>',
        ]
    if view.newest is not None:
        parts += [f"<h2>Samples after step {view.newest.step:,}</h2>", _embed(view.newest)]
    parts += ["<h2>Starts</h2>", _starts(view)]
    write_page(file, f"{view.name}: training", "\n".join(parts), refresh_s)


def _progress(view: RunView) -> list[str]:
    if not view.num_steps:
        return []
    done = min(1.0, _step(view) / view.num_steps)
    return [f'<div class="bar"><div style="width: {done:.1%}"></div></div>']


def _step(view: RunView) -> int:
    """Return how far the run is, as far as it has said."""
    logged = int(view.records[-1]["step"]) if view.records else 0
    return max(logged, view.checkpoint[0] if view.checkpoint else 0)


def _tiles(view: RunView) -> str:
    of_all = f"of {view.num_steps:,}" if view.num_steps else ""
    tiles = [(f"{_step(view):,}", f"steps {of_all}")]
    if view.records:
        last = view.records[-1]
        tiles += [(_show(last.get("loss"), ".4f"), "loss"), (_show(last.get("images_per_s"), ",.1f"), "images/s")]
        remaining = last.get("remaining_s", math.nan)
        if view.trainer.state != "FINISHED" and math.isfinite(remaining):
            tiles.append((show_duration(timedelta(seconds=max(0, round(remaining)))), "left, at this speed"))
    if view.logged is not None:
        tiles.append((show_duration(view.logged), "since the last record"))
    if view.checkpoint is None:
        tiles.append(("none", "checkpoint yet"))
    else:
        step, age = view.checkpoint
        tiles.append((show_duration(age), f"since the newest checkpoint (step {step:,})"))
    tiles.append((f"{max(0, len(view.starts) - 1)}", "restarts"))
    skipped = sum(value for value in view.values("skipped_steps") if math.isfinite(value))
    if skipped:
        tiles.append((f"{skipped:,.0f}", "steps skipped by the guard"))
    return f'<div class="tiles">{"".join(_tile(value, what) for value, what in tiles)}</div>'


def _tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b>{escape(what)}</div>'


def _show(value: float | None, form: str) -> str:
    return "not a number" if value is None or not math.isfinite(value) else format(value, form)


def show_duration(duration: timedelta) -> str:
    """Return a duration in two units at most: 3 d 4 h, 2 h 5 min, 40 s."""
    seconds = round(duration.total_seconds())
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((place for place, (_, size) in enumerate(units) if seconds >= size), len(units) - 1)
    shown: list[str] = []
    for unit, size in units[first : first + 2]:
        count, seconds = divmod(seconds, size)
        if count or not shown:
            shown.append(f"{count} {unit}")
    return " ".join(shown)


def show_time(time: str) -> str:
    """Return a time of history.jsonl, which is in UTC, as people write it."""
    return time.replace("T", " ").replace("+00:00", " UTC")


def _charts(view: RunView) -> str:
    steps = view.values("step")
    terms = dict.fromkeys(key for record in view.records for key in record if key.startswith(LOSS_TERM))
    losses = [Line("total, weighted", steps, view.values("loss"), is_strong=True)]
    losses += [Line(key.removeprefix(LOSS_TERM).replace("_", " "), steps, view.values(key)) for key in terms]
    marks = {float(start.after_step): f"start of {show_time(start.time)}" for start in view.starts[1:]}
    charts = [line_chart("Loss", losses, "step", marks)]
    for title, key in (("Images per second", "images_per_s"), ("Gradient norm", "grad_norm"), ("Learning rate", "lr")):
        charts.append(line_chart(title, [Line(title, steps, view.values(key))], "step", marks))
    if view.measured:
        charts.append(line_chart("FID of checkpoints", _distances(view), "step", marks))
    note = '<p class="note">Dashed lines: restarts.</p>' if marks else ""
    return f'{note}<div class="charts">{"".join(charts)}</div>'


def _distances(view: RunView) -> list[Line]:
    """Return a line for each way to measure."""
    by_way: dict[str, list[MeasuredFID]] = {}
    for each in view.measured:
        by_way.setdefault(each.how, []).append(each)
    return [Line(how, [own.step for own in found], [own.fid for own in found]) for how, found in by_way.items()]


def _film_row(picture: Picture) -> str:
    return f"<span>{picture.step:,}</span>{_embed(picture)}"


def _embed(picture: Picture) -> str:
    return embed_png(picture.content, picture.size, "", f"samples after step {picture.step:,}")


def _starts(view: RunView) -> str:
    rows = [[show_time(start.time), f"{start.after_step:,}", f"{start.processes:,}"] for start in view.starts]
    return html_table(["time", "after step", "processes"], rows)
