"""Bars, whiskers and rings end where their values say."""

import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from dcmdp_jax.report import bar_chart, line_chart

BARS = [
    bar_chart.Bar("a<b", "note", 3e-3, 1e-3, line_chart.ENGINE, 2e-5),
    bar_chart.Bar("b", "", 0.0, 0.0, line_chart.FAINT),
]


@pytest.fixture(params=["logarithmic", "linear"])
def drawn(request):
    """A drawn chart, the scale of its values, and its ticks."""
    charts = [
        bar_chart.Chart("one", BARS, 1e-6, True),
        bar_chart.Chart("two", BARS, 1e-6, False),
    ]
    logarithmic, linear = xml.fromstring(bar_chart.draw(charts, ("legend",))).findall("{*}g")
    if request.param == "logarithmic":
        return logarithmic, np.log10, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    return linear, float, [0, 0.001, 0.002, 0.003, 0.004]


def value_at(drawn):
    """Returns a function from x to the scaled value there, and the scaled value of one unit of x,
    which is the drawing's precision.
    """
    chart, scale, ticks = drawn
    labels = [text for text in chart.findall("{*}text") if text.get("text-anchor") == "middle"]
    assert [float(text.text) for text in labels] == ticks
    first = float(labels[0].get("x"))
    last = float(labels[-1].get("x"))
    unit = (scale(ticks[-1]) - scale(ticks[0])) / (last - first)
    return lambda x: scale(ticks[0]) + unit * (x - first), unit


def test_bars_end_at_their_values(drawn):
    chart, scale, _ = drawn
    value, unit = value_at(drawn)
    first, empty = (rect for rect in chart.findall("{*}rect") if rect.get("height") == "12")
    end = value(bar_chart.LEFT + float(first.get("width")))
    assert end == pytest.approx(scale(3e-3), abs=unit)
    assert float(empty.get("width")) == 0


def test_rings_lie_at_their_values(drawn):
    chart, scale, _ = drawn
    value, unit = value_at(drawn)
    ring = value(float(chart.find("{*}circle").get("cx")))
    assert ring == pytest.approx(scale(2e-5), abs=unit)


def test_whiskers_reach_a_standard_error_to_both_sides(drawn):
    chart, scale, _ = drawn
    value, unit = value_at(drawn)
    path = next(path for path in chart.findall("{*}path") if path.get("stroke") == "currentColor")
    ends = re.fullmatch(r"M(\S+) \S+H(\S+)", path.get("d")).groups()
    expected = [scale(2e-3), scale(4e-3)]
    assert [value(float(x)) for x in ends] == pytest.approx(expected, abs=unit)


def test_names_are_escaped(drawn):
    chart, _, _ = drawn
    assert "a<b" in [text.text for text in chart.findall("{*}text")]


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 0.37])
def test_extreme_values_can_be_drawn(value, logarithmic):
    bars = [bar_chart.Bar("a", "", value, 0.0, line_chart.ENGINE)]
    chart = bar_chart.Chart("t", bars, 0.0, logarithmic)
    xml.fromstring(bar_chart.draw([chart], ()))


def test_a_bar_and_its_ring_have_their_values_in_titles(drawn):
    chart, _, _ = drawn
    assert [title.text for title in chart.findall("*/{*}title")] == [
        "0.003 ± 0.001",
        "2e-05",
        "0 ± 0",
    ]
