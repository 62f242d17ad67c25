"""Curves lie where their values say, bands where theirs do, and ticks are round."""

import math
import re
from typing import NamedTuple

import pytest

from dcmdp_jax.report import line_chart, run_page
from support.pages import CONFIG, DELTAS, ROWS, Page

ZERO = line_chart.HEIGHT - line_chart.BOTTOM  # where the value 0 is drawn


class Drawn(NamedTuple):
    """The chart of the run's delta, and how many units of the drawing delta = 1 takes."""

    text: str
    scale: float


@pytest.fixture
def delta_chart():
    """Its scale is read off the tolerance line, which lies at 0.01."""
    panel = next(p for p in run_page.panels(CONFIG, ROWS) if p.title == "Mean delta")
    text = line_chart.chart(panel)
    line = next(a["d"] for _, a in Page(text).tags if "stroke-dasharray" in a)
    at_tolerance = float(re.match(r"M\S+ ([\d.]+)H", line)[1])
    return Drawn(text, (ZERO - at_tolerance) / 0.01)


@pytest.fixture
def curve(delta_chart):
    """The points of its curve; coordinates have one decimal."""
    tags = Page(delta_chart.text).tags
    drawn = next(a["d"] for _, a in tags if a.get("stroke") == line_chart.NEUTRAL)
    return [tuple(map(float, point.split())) for point in drawn[1:].split("L")]


def test_points_are_as_high_as_their_values(curve, delta_chart):
    values = [(ZERO - y) / delta_chart.scale for _, y in curve]
    assert values == pytest.approx(DELTAS, abs=0.1 / delta_chart.scale)


def test_points_lie_at_their_steps(curve):
    width = line_chart.WIDTH - line_chart.LEFT - line_chart.RIGHT
    places = [line_chart.LEFT + width * step / 3 for step in range(4)]
    assert [x for x, _ in curve] == pytest.approx(places, abs=0.06)


def test_labels_lie_at_their_values(delta_chart):
    """A text's baseline lies 4 below its grid line."""
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', delta_chart.text)
    assert len(labels) > 3 and float(labels[-1][0]) - 4 == line_chart.TOP
    for y, label in labels:
        value = (ZERO - (float(y) - 4)) / delta_chart.scale
        assert value == pytest.approx(float(label), abs=0.15 / delta_chart.scale)


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


BANDED = line_chart.Series(
    "x", "#123456", [(0, 2.0), (1, 3.0)], band=[(0, 1.0, 4.0), (1, 2.0, 5.0)]
)


def test_a_band_runs_along_its_upper_edge_and_back_along_the_lower():
    drawn = line_chart._band(BANDED, lambda x: x, lambda y: y)
    assert 'd="M0.0 4.0L1.0 5.0L1.0 2.0L0.0 1.0Z" fill="#123456"' in drawn


def test_ticks_enclose_a_band():
    assert line_chart.value_ticks(line_chart.Panel("t", "u", [BANDED]))[-1] >= 5.0


def test_a_curve_without_a_band_has_none():
    assert line_chart._band(BANDED._replace(band=[]), lambda x: x, lambda y: y) == ""


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
