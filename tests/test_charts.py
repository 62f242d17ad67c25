"""Curves lie where their values say, bands where theirs do, and ticks are round."""

import math
import re

import pytest

from dcmdp_jax.report import line_chart, run_page
from support.pages import CONFIG, DELTAS, ROWS, Page


def test_points_lie_where_their_values_say(tmp_path):
    """Read off the drawn curve of delta against the drawn tolerance line and the axis."""
    shown = {panel.title: panel for panel in run_page.panels(CONFIG, ROWS)}
    chart = Page(line_chart.chart(shown["Mean delta"]))
    curve = next(a["d"] for _, a in chart.tags if a.get("stroke") == line_chart.NEUTRAL)
    points = [tuple(map(float, point.split())) for point in curve[1:].split("L")]
    line = next(a["d"] for _, a in chart.tags if "stroke-dasharray" in a)
    at_tolerance = float(re.match(r"M\S+ ([\d.]+)H", line)[1])
    zero = line_chart.HEIGHT - line_chart.BOTTOM
    unit = (zero - at_tolerance) / 0.01
    for (x, y), delta, step in zip(points, DELTAS, range(4)):
        # coordinates have one decimal
        assert (zero - y) / unit == pytest.approx(delta, abs=0.1 / unit)
        width = line_chart.WIDTH - line_chart.LEFT - line_chart.RIGHT
        assert x == pytest.approx(line_chart.LEFT + width * step / 3, abs=0.06)
    drawn = line_chart.chart(shown["Mean delta"])
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', drawn)
    assert len(labels) > 3 and float(labels[-1][0]) - 4 == line_chart.TOP
    for y, label in labels:  # the text's baseline lies 4 below its grid line
        assert (zero - (float(y) - 4)) / unit == pytest.approx(float(label), abs=0.15 / unit)


@pytest.mark.parametrize("delta, drawn", [(0.0, True), (0.004, True), (0.003, False), (0.5, True)])
def test_the_tolerance_is_drawn_unless_it_would_flatten_the_curve(delta, drawn):
    panel = line_chart.Panel(
        "t", "u", [line_chart.Series("s", "#000", [(1, delta), (2, delta)])], tolerance=0.01
    )
    assert ("stroke-dasharray" in line_chart.chart(panel)) == drawn
    assert line_chart.value_ticks(panel)[-1] <= 2 * max(delta, 0.01 * drawn)


def test_gaps_break_the_line_and_lone_points_are_dots():
    values = [1.0, 2.0, math.nan, 3.0, math.nan, math.nan, 4.0, 5.0]
    series = line_chart.Series("x", "#000", [(i, v) for i, v in enumerate(values)])
    drawn = line_chart._line(series, lambda x: x, lambda y: y)
    assert 'd="M0.0 1.0L1.0 2.0M6.0 4.0L7.0 5.0"' in drawn
    assert re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn) == [("3.0", "3.0")]


@pytest.mark.parametrize(
    "low, high",
    [
        (0.0, 1.0),
        (0.0, 0.0),
        (0.0, 3e-14),
        (0.0, 8192.0),
        (-1.0, 1.0),
        (-3.7, 0.0),
        (0.0, 0.0037),
        (0.0, 0.3),
        (0.0, 7.0),
    ],
)
def test_ticks_enclose_the_values_evenly(low, high):
    ticks = line_chart.value_ticks(
        line_chart.Panel("t", "u", [line_chart.Series("s", "#000", [(1, low), (2, high)])])
    )
    gaps = [b - a for a, b in zip(ticks, ticks[1:])]
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) and gap > 0 for gap in gaps)
    assert 0.0 in ticks and float(f"{gaps[0]:.6g}") == float(f"{gaps[0]:.1g}")


def test_a_band_runs_along_its_upper_edge_and_back_along_the_lower():
    series = line_chart.Series(
        "x", "#123456", [(0, 2.0), (1, 3.0)], band=[(0, 1.0, 4.0), (1, 2.0, 5.0)]
    )
    assert 'd="M0.0 4.0L1.0 5.0L1.0 2.0L0.0 1.0Z" fill="#123456"' in line_chart._band(
        series, lambda x: x, lambda y: y
    )
    assert line_chart.value_ticks(line_chart.Panel("t", "u", [series]))[-1] >= 5.0
    assert line_chart._band(series._replace(band=[]), lambda x: x, lambda y: y) == ""


def test_names_stand_in_place_of_steps():
    panel = line_chart.Panel(
        "t",
        "u",
        [line_chart.Series("s", "#000", [(0, 1.0), (1, 2.0)])],
        names=("0–7", "<8>"),
        axis="position",
    )
    drawn = Page(line_chart.chart(panel)).text
    assert "0–7" in drawn and "<8>" in drawn and "position" in drawn and "step" not in drawn
