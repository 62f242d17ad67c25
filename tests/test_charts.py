"""Curves lie where their values say, bands where theirs do, and ticks are round; labels lie inside
the drawing, long curves keep their extremes, and columns show the values.
"""

import math
import random
import re
from typing import NamedTuple

import pytest

from dcmdp_jax.report import discrepancy, line_chart, run_page
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


def test_a_bucket_of_one_position_is_named_by_it():
    buckets = [{"from": 16, "to": 32, "delta": 0.1}, {"from": 32, "to": 33, "delta": 0.1}]
    shown = Page(discrepancy.position_panel([("a", "#000", buckets)])).text
    assert "16–31" in shown and "32–32" not in shown


# Labels

FORMATS = ("{:.4g}", "{:.1%}")


def random_panel(seed):
    """A panel of any scale, length and kind."""
    rng = random.Random(seed)
    form = rng.choice(FORMATS)
    low = 0 if "%" in form else rng.choice([-1, 0])  # no share is negative
    scale = 10 ** rng.uniform(-14, 0 if "%" in form else 8)
    count = rng.choice([1, 2, 3, 16, 200, 5000])
    first = rng.choice([0, 1, 10**6, 10**12])
    points = [(first + i, scale * rng.uniform(low, 1)) for i in range(count)]
    names = ()
    if count <= 16:
        points = [(i, value) for i, (_, value) in enumerate(points)]
        names = tuple(f"{8 * 2**i}–{8 * 2 ** (i + 1) - 1}" for i in range(count))
    series = [line_chart.Series("s", "#000", points)]
    return line_chart.Panel("t", "u", series, names=names, format=form)


class Label(NamedTuple):
    """Where a text of a drawing begins and ends; its baseline."""

    left: float
    right: float
    baseline: float


def labels(text):
    found = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<', text)
    for x, y, anchor, content in found:
        width = line_chart.CHARACTER * len(content)
        left = float(x) - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        yield Label(left, left + width, float(y))


@pytest.mark.parametrize("seed", range(60))
def test_labels_lie_inside_the_drawing(seed):
    for label in labels(line_chart.chart(random_panel(seed))):
        assert label.left >= -0.1 and label.right <= line_chart.WIDTH + 0.1
        assert 9 <= label.baseline <= line_chart.HEIGHT - 4


@pytest.mark.parametrize("seed", range(60))
def test_names_of_steps_do_not_touch(seed):
    drawn = list(labels(line_chart.chart(random_panel(seed))))
    names = [label for label in drawn if label.baseline == ZERO + 17]
    assert names
    assert all(left.right < right.left for left, right in zip(names, names[1:]))


@pytest.mark.parametrize("form, tick", [("{:.1%}", "40%"), ("{:.3f}", "0.4")])
def test_ticks_are_in_the_unit_of_the_values(form, tick):
    panel = line_chart.Panel("t", "u", [line_chart.Series("s", "#000", [(1, 1.0)])], format=form)
    assert f">{tick}<" in line_chart.chart(panel)


# Long curves


def long_points(seed, count=5000):
    rng = random.Random(seed)
    return [(step, rng.gauss(0, 1)) for step in range(count)]


def drawn_points(series):
    drawn = line_chart._line(series, lambda x: x, lambda y: 1000 * y)
    return [tuple(map(float, point)) for point in re.findall(r"([\d.-]+) ([\d.-]+)", drawn)]


@pytest.mark.parametrize("seed", range(5))
def test_a_long_curve_keeps_the_extremes_of_each_part(seed):
    points = long_points(seed)
    shown = set(drawn_points(line_chart.Series("s", "#000", points)))
    for part in line_chart.parts(points, line_chart.DRAWN):
        values = [value for _, value in part]
        for step, value in part:
            if value in (min(values), max(values)):
                assert (step, round(1000 * value, 1)) in shown


def test_a_long_curve_has_few_points():
    shown = drawn_points(line_chart.Series("s", "#000", long_points(0)))
    assert len(shown) == 2 * line_chart.DRAWN


def test_a_short_curve_has_all_its_points():
    points = long_points(0, count=line_chart.DRAWN)
    assert len(drawn_points(line_chart.Series("s", "#000", points))) == len(points)


def test_a_gap_breaks_a_long_curve():
    points = [(i, math.nan if i == 2500 else 1.0) for i in range(5000)]
    drawn = line_chart._line(line_chart.Series("s", "#000", points), lambda x: x, lambda y: y)
    assert drawn.count("M") == 2


def test_a_long_band_encloses_its_points():
    band = [(step, value - 0.1, value + 0.1) for step, value in long_points(0)]
    series = line_chart.Series("s", "#000", [(0, 0.0)], band=band)
    drawn = line_chart._band(series, lambda x: x, lambda y: 1000 * y)
    values = [float(y) for y in re.findall(r"[\d.-]+ ([\d.-]+)", drawn)]
    assert len(values) == 2 * line_chart.DRAWN
    assert max(values) == round(1000 * max(high for _, _, high in band), 1)
    assert min(values) == round(1000 * min(low for _, low, _ in band), 1)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_parts_are_the_items_in_order(most):
    items = list(range(20))
    assert [item for part in line_chart.parts(items, most) for item in part] == items
    assert len(line_chart.parts(items, most)) == min(most, 20)


# The values under the pointer


def columns(panel):
    """The texts of a chart's columns, and their widths."""
    text = line_chart.chart(panel)
    found = re.findall(r'<label style="flex:([\d.]+)">.*?<b>(.*?)</b></label>', text, re.DOTALL)
    return [shown for _, shown in found], [float(width) for width, _ in found]


def test_a_column_shows_each_curve_at_its_step():
    series = [
        line_chart.Series("a<", "#000", [(1, 0.25), (2, 0.5)]),
        line_chart.Series("b", "#000", [(2, 0.75)]),
    ]
    panel = line_chart.Panel("t", "u", series, format="{:.0%}")
    assert columns(panel)[0] == ["step 1\na&lt; 25%", "step 2\na&lt; 50%\nb 75%"]


def test_a_column_shows_its_band():
    assert columns(line_chart.Panel("t", "u", [BANDED]))[0][0] == "step 0\nx 2 (1 to 4)"


def test_a_column_without_a_value_says_so():
    series = [line_chart.Series("a", "#000", [(1, 0.5), (2, math.nan)])]
    assert columns(line_chart.Panel("t", "u", series))[0][1] == "step 2\nno value"


def test_a_column_of_many_steps_shows_the_lowest_and_the_highest():
    points = long_points(0)
    shown, _ = columns(line_chart.Panel("t", "u", [line_chart.Series("a", "#000", points)]))
    expected = []
    for part in line_chart.parts(points, line_chart.COLUMNS):
        values = [value for _, value in part]
        steps = f"steps {part[0][0]} to {part[-1][0]}"
        expected.append(f"{steps}\na {min(values):.4g} to {max(values):.4g}")
    assert shown == expected


def test_a_column_has_the_name_of_its_place():
    series = [line_chart.Series("a", "#000", [(0, 1.0), (1, 2.0)])]
    panel = line_chart.Panel("t", "u", series, names=("0–7", "8–15"))
    assert columns(panel)[0] == ["0–7\na 1", "8–15\na 2"]


@pytest.mark.parametrize("steps", [[1], [1, 2, 3], [1, 20, 40, 41], range(5000)])
def test_columns_cover_the_plot_and_meet_halfway_between_steps(steps):
    series = [line_chart.Series("a", "#000", [(step, 1.0) for step in steps])]
    _, widths = columns(line_chart.Panel("t", "u", series))
    plot = line_chart.WIDTH - line_chart.LEFT - line_chart.RIGHT
    assert sum(widths) == pytest.approx(plot, abs=0.05 * len(widths))
    if len(steps) == 4:
        assert widths[0] == pytest.approx(plot * 9.5 / 40, abs=0.06)


def test_a_chart_is_one_stop_of_the_tab_key():
    """Radio buttons of one name are."""
    text = Page(line_chart.chart(line_chart.Panel('<t">', "u", [BANDED])))
    inputs = [attributes for tag, attributes in text.tags if tag == "input"]
    assert inputs == 2 * [{"type": "radio", "name": '<t">'}]
