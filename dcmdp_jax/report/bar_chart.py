"""Horizontal bars as an SVG file that needs no other."""

from __future__ import annotations

import html
import math
from typing import NamedTuple

from dcmdp_jax.report.line_chart import GRID, INSIDE, Scale, round_step

# in the SVG's own units
WIDTH = 720
LEFT = 270  # of the labels
RIGHT = 80  # of the number behind the longest bar
TOP = 26


class Bar(NamedTuple):
    """One bar, of a value >= 0."""

    label: str
    note: str  # in small print under the label
    value: float
    error: float  # half the length of the whisker
    color: str
    ring: float | None = None  # a second value, drawn as a ring


class Chart(NamedTuple):
    """Bars on one scale."""

    title: str
    bars: list[Bar]
    floor: float  # drawn as a line, the region below it shaded
    logarithmic: bool


def draw(charts: list[Chart], legend: tuple[str, ...]) -> str:
    """Returns the charts, one under the other, and below them the lines of `legend`, as SVG."""
    drawn = []
    top = 4.0
    for chart in charts:
        body, height = _chart(chart)
        drawn.append(f'<g transform="translate(0,{top})">{body}</g>')
        top += height
    for line in legend:
        drawn.append(f'<text x="8" y="{top + 10:.0f}" font-size="11">{html.escape(line)}</text>')
        top += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 6:.0f}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#475569" color="#1e293b">'
        f'<rect class="paper" width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>'
    )


def _chart(chart: Chart) -> tuple[str, float]:
    """Returns one chart as SVG, and its height."""
    ticks = _ticks(chart)
    low = ticks[0]
    high = ticks[-1]

    def x(value: float) -> float:
        share = value / high
        if chart.logarithmic:
            share = math.log(max(value, low) / low) / math.log(high / low)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    bottom = 30.0
    rows = []
    for bar in chart.bars:
        height = 34 if bar.note else 20
        rows.append(_bar(bar, bottom + height / 2, x))
        bottom += height
    title = (
        '<text x="8" y="14" font-size="14" font-weight="600" fill="currentColor">'
        f"{html.escape(chart.title)}</text>"
    )
    grid = [
        f'<path d="M{x(tick):.1f} {TOP}V{bottom:.1f}" stroke="{GRID}" stroke-opacity="0.35"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    edge = x(chart.floor)
    floor = (
        f'<rect x="{LEFT}" y="{TOP}" width="{edge - LEFT:.1f}" height="{bottom - TOP:.1f}" '
        f'fill="{INSIDE}" fill-opacity="0.12"/>'
        f'<path d="M{edge:.1f} {TOP}V{bottom:.1f}" stroke="{INSIDE}" stroke-width="1.6" '
        'stroke-dasharray="6 4"/>'
    )
    return title + "".join(grid) + floor + "".join(rows), bottom + 32


def _bar(bar: Bar, middle: float, x: Scale) -> str:
    end = x(bar.value)
    low = x(max(bar.value - bar.error, 0))
    high = x(bar.value + bar.error)
    furthest = max(end, high)
    marks = [
        _label(bar.label, middle + (-3 if bar.note else 4), 'fill="currentColor"'),
        _label(bar.note, middle + 10, 'font-size="10"'),
        f'<rect x="{LEFT}" y="{middle - 6:.1f}" width="{end - LEFT:.1f}" height="12" '
        f'fill="{bar.color}"><title>{bar.value:.3g} ± {bar.error:.1g}</title></rect>',
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="currentColor"/>',
    ]
    if bar.ring is not None:
        furthest = max(furthest, x(bar.ring))
        marks.append(
            f'<circle cx="{x(bar.ring):.1f}" cy="{middle:.1f}" r="4.5" fill="#fff" '
            f'stroke="#1e293b" stroke-width="1.8"><title>{bar.ring:.3g}</title></circle>'
        )
    marks.append(f'<text x="{furthest + 8:.1f}" y="{middle + 4:.1f}">{bar.value:.2g}</text>')
    return "".join(marks)


def _label(text: str, y: float, style: str) -> str:
    if not text:
        return ""
    escaped = html.escape(text)
    return f'<text x="{LEFT - 8}" y="{y:.1f}" text-anchor="end" {style}>{escaped}</text>'


def _ticks(chart: Chart) -> list[float]:
    """Returns powers of ten that enclose what is drawn, or round numbers from zero on."""
    values = [chart.floor]
    for bar in chart.bars:
        values += [bar.value, bar.value + bar.error, bar.ring or 0.0]
    positive = [value for value in values if value] or [1.0]
    if not chart.logarithmic:
        step = round_step(max(positive) / 5)
        count = math.ceil(round(max(positive) / step, 6))
        return [float(f"{k * step:.10g}") for k in range(count + 1)]
    low = math.floor(math.log10(min(positive)))
    high = math.ceil(math.log10(max(positive)))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]
