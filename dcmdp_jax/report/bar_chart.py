"""Horizontal bars as an SVG that stands alone."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import NamedTuple

from dcmdp_jax.report.line_chart import INSIDE, NEUTRAL, round_step

WIDTH = 720
LEFT = 270
RIGHT = 80  # of the picture, of its labels, of the numbers behind the longest bar


class Bar(NamedTuple):
    label: str
    note: str  # in small print under the label
    value: float
    error: float  # half the length of the whisker
    color: str
    ring: float | None = None  # a second value, as a ring


class Chart(NamedTuple):
    title: str
    bars: list[Bar]
    floor: float  # drawn as a line, the region below it shaded
    logarithmic: bool


def draw(charts: list[Chart], legend: tuple[str, ...]) -> str:
    """The charts, values >= 0, one under the other, and below them the lines of `legend`."""
    drawn = []
    top = 4
    for chart in charts:
        body, height = _chart(chart)
        drawn.append(f'<g transform="translate(0,{top})">{body}</g>')
        top += height
    drawn += [
        f'<text x="8" y="{top + 14 * i + 10:.0f}" font-size="11">{html.escape(line)}</text>'
        for i, line in enumerate(legend)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 14 * len(legend) + 6:.0f}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#475569">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>'
    )


def _chart(chart: Chart) -> tuple[str, float]:
    """One chart as SVG, and its height."""
    ticks = _ticks(chart)
    low = ticks[0]
    high = ticks[-1]
    span = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        if not chart.logarithmic:
            return LEFT + span * value / high
        return LEFT + span * math.log(max(value, low) / low) / math.log(high / low)

    top = 30.0
    rows = []
    for bar in chart.bars:
        height = 34 if bar.note else 20
        rows.append(_bar(bar, top + height / 2, x))
        top += height
    grid = [
        f'<path d="M{x(v):.1f} 26V{top:.1f}" stroke="#e2e8f0"/>'
        f'<text x="{x(v):.1f}" y="{top + 16:.1f}" text-anchor="middle">{v:g}</text>'
        for v in ticks
    ]
    edge = x(chart.floor)
    floor = (
        f'<rect x="{LEFT}" y="26" width="{edge - LEFT:.1f}" height="{top - 26:.1f}" fill="{INSIDE}" '
        f'fill-opacity="0.12"/><path d="M{edge:.1f} 26V{top:.1f}" stroke="{INSIDE}" stroke-width="1.6" '
        f'stroke-dasharray="6 4"/>'
    )
    title = f'<text x="8" y="14" font-size="14" font-weight="600" fill="#1e293b">{html.escape(chart.title)}</text>'
    return title + "".join(grid) + floor + "".join(rows), top + 32


def _bar(bar: Bar, middle: float, x: Callable[[float], float]) -> str:
    end = x(bar.value)
    low = x(max(bar.value - bar.error, 0))
    high = x(bar.value + bar.error)
    furthest = max(end, high, 0 if bar.ring is None else x(bar.ring))

    def label(text: str, y: float, style: str) -> str:
        return (
            f'<text x="{LEFT - 8}" y="{y:.1f}" text-anchor="end" {style}>{html.escape(text)}</text>'
            if text
            else ""
        )

    marks = [
        label(bar.label, middle + (-3 if bar.note else 4), 'fill="#1e293b"'),
        label(bar.note, middle + 10, 'font-size="10"'),
        f'<rect x="{LEFT}" y="{middle - 6:.1f}" width="{end - LEFT:.1f}" height="12" fill="{bar.color}"/>',
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#1e293b"/>',
    ]
    if bar.ring is not None:
        marks.append(
            f'<circle cx="{x(bar.ring):.1f}" cy="{middle:.1f}" r="4.5" fill="#fff" stroke="{NEUTRAL}" '
            f'stroke-width="1.8"/>'
        )
    return (
        "".join(marks) + f'<text x="{furthest + 8:.1f}" y="{middle + 4:.1f}">{bar.value:.2g}</text>'
    )


def _ticks(chart: Chart) -> list[float]:
    """Powers of ten that enclose what is drawn, or round numbers from zero on."""
    values = [
        value for bar in chart.bars for value in (bar.value, bar.value + bar.error, bar.ring)
    ] + [chart.floor]
    seen = [value for value in values if value] or [1.0]
    if not chart.logarithmic:
        step = round_step(max(seen) / 5)
        return [float(f"{k * step:.10g}") for k in range(math.ceil(round(max(seen) / step, 6)) + 1)]
    low = math.floor(math.log10(min(seen)))
    high = math.ceil(math.log10(max(seen)))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]
