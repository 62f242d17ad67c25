"""Curves as inline SVG with a legend, without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import NamedTuple

# colours of the engine's and the trainer's policy, distinct also to the colour-blind
ENGINE = "#d55e00"
TRAINER = "#0072b2"
NEUTRAL = "#334155"
FAINT = "#cbd5e1"
INSIDE = "#009e73"  # the region within the tolerance
GRID = "#e2e8f0"

# the SVG's own units
WIDTH = 440
HEIGHT = 250
LEFT = 52
RIGHT = 14
TOP = 26
BOTTOM = 36

Scale = Callable[[float], float]  # from a step or a value to a coordinate


class Series(NamedTuple):
    """One curve."""

    label: str
    color: str
    points: list[tuple[int, float]]  # (step, value); a value that is not finite breaks the line
    width: float = 2.0
    marked: bool = False  # a dot on each point
    band: list[tuple[int, float, float]] = []  # (step, low, high), shaded in the colour


class Panel(NamedTuple):
    """One chart."""

    title: str
    unit: str
    series: list[Series]
    tolerance: float | None = None  # drawn as a line, the region below it shaded
    names: tuple[str, ...] = ()  # of x = 0, 1, ..., instead of step numbers
    axis: str = "step"


def chart(panel: Panel) -> str:
    """Returns a chart as an HTML figure with its title and legend."""
    steps = [step for series in panel.series for step, _ in series.points]
    left = min(steps)
    right = max(steps)
    ticks = value_ticks(panel)
    bottom = ticks[0]
    top = ticks[-1]

    def x(step: float) -> float:
        share = (step - left) / (right - left) if right > left else 0.5
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - bottom) / (top - bottom)

    marks = []
    if panel.tolerance is not None:
        marks.append(_tolerance(panel.tolerance, top, y))
    for tick in ticks:
        marks.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        marks.append(_text(LEFT - 7, y(tick) + 4, f"{tick:g}", "end"))
    named = list(enumerate(panel.names)) or [(step, str(step)) for step in _step_ticks(left, right)]
    marks += [_text(x(step), HEIGHT - BOTTOM + 17, name, "middle") for step, name in named]
    marks.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, panel.axis, "middle"))
    marks.append(_text(0, 13, panel.unit, "start"))
    marks += [_band(series, x, y) for series in panel.series]
    marks += [_line(series, x, y) for series in panel.series]
    title = html.escape(panel.title)
    return (
        f'<figure><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}" font-size="12" fill="#475569">{"".join(marks)}</svg>'
        f"{_legend(panel)}</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _tolerance(tolerance: float, top: float, y: Scale) -> str:
    """Shades the region within the tolerance, and draws its edge if that is in the chart."""
    edge = y(min(tolerance, top))
    region = (
        f'<rect x="{LEFT}" y="{edge:.1f}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{y(0) - edge:.1f}" fill="{INSIDE}" fill-opacity="0.12"/>'
    )
    line = (
        f'<path d="M{LEFT} {edge:.1f}H{WIDTH - RIGHT}" stroke="{INSIDE}" stroke-width="1.6" '
        'stroke-dasharray="6 4"/>'
    )
    return region + (line if tolerance <= top else "")


def _band(series: Series, x: Scale, y: Scale) -> str:
    """Draws the band around a curve as one polygon: along its upper edge, back along the lower."""
    if len(series.band) < 2:
        return ""
    upper = [(step, high) for step, _, high in series.band]
    lower = [(step, low) for step, low, _ in reversed(series.band)]
    drawn = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in upper + lower)
    return f'<path d="M{drawn}Z" fill="{series.color}" fill-opacity="0.15"/>'


def _line(series: Series, x: Scale, y: Scale) -> str:
    """Draws a curve in pieces between gaps; a piece of one point is a dot."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for point in series.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    lines = [
        "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in piece)
        for piece in pieces
        if len(piece) > 1
    ]
    drawn = ""
    if lines:
        drawn = (
            f'<path d="{"".join(lines)}" fill="none" stroke="{series.color}" '
            f'stroke-width="{series.width}" stroke-linejoin="round"/>'
        )
    radius = 1.5 + series.width / 2
    for piece in pieces:
        for step, value in piece if series.marked or len(piece) == 1 else ():
            drawn += (
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}" '
                f'fill="{series.color}"/>'
            )
    return drawn


def _legend(panel: Panel) -> str:
    entries = [(series.label, series.color, series.width, "solid") for series in panel.series]
    if panel.tolerance is not None:
        entries.append((f"tolerance {panel.tolerance:g}, inside shaded", INSIDE, 2.0, "dashed"))
    if len(entries) == 1:
        return ""
    spans = [
        f'<span><i style="border-top:{width}px {line} {color}"></i>{html.escape(label)}</span>'
        for label, color, width, line in entries
    ]
    return f'<div class="legend">{"".join(spans)}</div>'


def value_ticks(panel: Panel) -> list[float]:
    """Returns about five round numbers that enclose zero and the values; also the tolerance, if it
    is not far above them.
    """
    values = [value for series in panel.series for _, value in finite(series.points)]
    for series in panel.series:
        for _, band_low, band_high in series.band:
            values += [band_low, band_high]
    low = min(0.0, *values)
    high = max(0.0, *values)
    # further up it would flatten the curve
    if panel.tolerance is not None and (panel.tolerance <= 3 * high or high == 0):
        high = max(high, 1.1 * panel.tolerance)
    high = high if high - low > 1e-300 else low + 1.0
    step = round_step((high - low) / 5)
    first = math.floor(low / step)
    last = math.ceil(round(high / step, 6))
    # ten digits, not a number of decimals: the values of an exact engine are as small as 1e-14
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def _step_ticks(first: int, last: int) -> list[int]:
    """Returns round step numbers within first..last; all of them if they are few."""
    gap = max(1, int(round_step((last - first) / 8))) if last > first else 1
    return list(range(-(-first // gap) * gap, last + 1, gap))


def round_step(rough: float) -> float:
    """Returns the least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the points whose value is finite."""
    return [point for point in points if math.isfinite(point[1])]
