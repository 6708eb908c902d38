"""Curves as SVG inside a page, drawn by hand so that no plotting library is needed. Read next: pages.py, watch.py."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

CHART_WIDTH, CHART_HEIGHT = 420, 240  # of a chart, in its own units; about a pixel each where the page is narrow
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 34  # of the axes
MOST_BUCKETS = 200  # of a line; each keeps its lowest and highest point, so that no spike is lost
MOST_DOTS = 24  # a line of at most this many points has a dot for each, so that a single point is visible
LOG_FROM = 30  # values that span a larger factor get a logarithmic axis
NUM_COLOURS = 7  # --c0 to --c6 in the page's style


class Line(NamedTuple):
    """One curve: x is not below 0 and rises; values of y that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_strong: bool = False


class Axis(NamedTuple):
    """A range of values, and how it is drawn."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(title: str, lines: Sequence[Line], x_name: str, marks: Mapping[float, str] | None = None) -> str:
    """Return a figure with lines over a common x axis, as HTML; names are escaped.

    Args:
        title: above it.
        lines: without values that are finite it says "no values yet".
        x_name: below the x axis.
        marks: x -> what happened there; a dashed line.
    """
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    if not values:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="note">no values yet</p></figure>'
    last = max(x for line in lines for x in line.x)
    x_axis, y_axis = Axis(0, last if last > 0 else 1), _axis(values)
    drawn = [*_grid(x_axis, y_axis), *_marks(x_axis, marks or {})]
    for number, line in enumerate(lines):
        colour, strength = f"var(--c{number % NUM_COLOURS})", ' class="strong"' if line.is_strong else ""
        for piece in _pieces(line):
            if len(line.y) <= MOST_DOTS:
                drawn += [_dot(_across(x_axis, x), _up(y_axis, y), colour) for x, y in piece]
            points = " ".join(f"{_across(x_axis, x):.1f},{_up(y_axis, y):.1f}" for x, y in piece)
            drawn.append(f'<polyline{strength} style="stroke: {colour}" points="{points}"></polyline>')
    middle = (LEFT + CHART_WIDTH - RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{CHART_HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
    caption = escape(title) + (' <span class="note">(logarithmic)</span>' if y_axis.is_log else "")
    size = f'width="{CHART_WIDTH}" height="{CHART_HEIGHT}" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}"'
    svg = f'<svg class="chart" role="img" aria-label="{escape(title)}" {size}>{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}{_legend(title, lines)}</figure>"


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" style="fill: {colour}"></circle>'


def _legend(title: str, lines: Sequence[Line]) -> str:
    if len(lines) == 1 and lines[0].name == title:
        return ""
    entries = (
        f'<span><i style="background: var(--c{number % NUM_COLOURS})"></i>{escape(line.name)}</span>'
        for number, line in enumerate(lines)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _axis(values: Sequence[float]) -> Axis:
    """Return an axis for finite values, with some room: from zero, or as a logarithm where they span a large factor."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.1, high * 1.1, is_log=True)
    if low == high == 0:
        return Axis(0, 1)
    return Axis(min(0, 1.05 * low), max(0, 1.05 * high))


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """Return round values within an axis, at most about `most` of them."""
    if axis.is_log:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [value for value in found if axis.low <= value <= axis.high]
            if len(found) <= 2 * most:
                return found
        return found[:: math.ceil(len(found) / most)]
    rough = (axis.high - axis.low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _grid(x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for value in ticks(y_axis):
        y = _up(y_axis, value)
        yield f'<line x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short_number(value)}</text>'
    for value in ticks(x_axis, most=4):
        x = _across(x_axis, value)
        anchor = "middle" if LEFT + 12 < x < CHART_WIDTH - RIGHT - 18 else "end" if x > CHART_WIDTH / 2 else "start"
        yield f'<text x="{x:.1f}" y="{CHART_HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{short_number(value)}</text>'


def _marks(x_axis: Axis, marks: Mapping[float, str]) -> Iterator[str]:
    for where, what in marks.items():
        if x_axis.low <= where <= x_axis.high:
            x = _across(x_axis, where)
            yield (
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{CHART_HEIGHT - BOTTOM}">'
                f"<title>{escape(what)}</title></line>"
            )


def _across(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (CHART_WIDTH - LEFT - RIGHT)


def _up(axis: Axis, value: float) -> float:
    return CHART_HEIGHT - BOTTOM - axis.place(value) * (CHART_HEIGHT - TOP - BOTTOM)


def short_number(value: float) -> str:
    """Return a number for an axis: 0.5, 300, 1,200, 1.2 M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g} M"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _pieces(line: Line) -> Iterator[list[tuple[float, float]]]:
    """Yield the parts of a line between its gaps, with at most two points for each bucket of x."""
    points = list(zip(line.x, line.y, strict=True))
    size = max(1, math.ceil(len(points) / MOST_BUCKETS))
    for is_finite, part in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
        if is_finite:
            piece = list(part)
            kept: list[tuple[float, float]] = []
            for start in range(0, len(piece), size):
                bucket = piece[start : start + size]
                kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
            yield kept if len(kept) > 1 else kept * 2
