"""Curves as SVG: what is in them, by reading them."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from flowar.base.charts import MOST_BUCKETS, Axis, Line, line_chart, short_number, ticks


def drawn(figure):
    """Return a figure's polylines as lists of points."""
    svg = ElementTree.fromstring(re.search("<svg.*</svg>", figure, re.S)[0])
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in svg.iter("polyline")
    ]


def test_a_line_starts_and_ends_where_its_values_do():
    (line,) = drawn(line_chart("a", [Line("b", [0, 5, 10], [0, 1, 2])], "step"))
    assert len(line) == 3
    assert [x for x, _ in line] == pytest.approx([46, (46 + 412) / 2, 412], abs=0.1)
    heights = [y for _, y in line]
    assert heights[0] == pytest.approx(206, abs=0.1) and heights[0] - heights[1] == pytest.approx(
        heights[1] - heights[2]
    )


def test_what_is_not_finite_leaves_a_gap_and_one_point_alone_is_seen():
    figure = line_chart("a", [Line("b", [1, 2, 3, 4, 5], [1, 2, math.nan, math.inf, 5])], "step")
    lines = drawn(figure)
    assert figure.count("<circle") == 4  # the point alone is there twice
    assert [len(line) for line in lines] == [2, 2] and lines[1][0] == lines[1][1]
    assert "no values yet" in line_chart("a", [Line("b", [1], [math.nan])], "step")
    assert "no values yet" in line_chart("a", [], "step")


def test_a_long_line_keeps_its_spikes_in_few_points():
    values = [1.0] * 50_000
    values[31_417], values[7_000] = 9.0, 0.25
    (line,) = drawn(line_chart("a", [Line("b", range(50_000), values)], "step"))
    assert len(line) <= 2 * MOST_BUCKETS + 2
    heights = [y for _, y in line]
    assert heights.count(min(heights)) == 1 and heights.count(max(heights)) == 1
    assert [x for x, _ in line] == sorted(x for x, _ in line)


def test_a_large_span_is_logarithmic_and_says_so():
    wide = line_chart("a", [Line("b", [0, 1, 2], [0.01, 1, 100])], "step")
    assert "logarithmic" in wide
    (line,) = drawn(wide)
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)
    assert "logarithmic" not in line_chart("a", [Line("b", [0, 1], [0, 100])], "step")


def test_names_stay_text():
    hostile = "<script>alert(1)</script>"
    figure = line_chart(hostile, [Line(hostile, [0, 1], [0, 1]), Line("b", [0], [0])], hostile, {1: hostile})
    assert "<script>" not in figure and figure.count("&lt;script&gt;") == 5


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis(0, 0.0011), [0, 0.0005, 0.001]),
        (Axis(-1, 1), [-1, -0.5, 0, 0.5, 1]),
        (Axis(0.9, 120, is_log=True), [1, 2, 5, 10, 20, 50, 100]),
        (Axis(1e-9, 1e9, is_log=True), [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
    ],
)
def test_ticks_are_round(axis, expected):
    assert ticks(axis) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0005, "0.0005"), (300, "300"), (1200, "1,200"), (1.25e6, "1.25 M"), (0.30000000000000004, "0.3")],
)
def test_numbers_of_axes_are_short(value, shown):
    assert short_number(value) == shown
