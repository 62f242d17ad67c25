"""Curves as inline SVG, with their legends: no scripts, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import NamedTuple

ENGINE = "#d55e00"
TRAINER = "#0072b2"  # the two policies, told apart by the colour-blind too
NEUTRAL = "#334155"
FAINT = "#cbd5e1"
INSIDE = "#009e73"


class Series(NamedTuple):
    label: str
    color: str
    points: list[tuple[int, float]]  # (step, value); a value that is not finite breaks the line
    width: float = 2.0
    marked: bool = False  # a dot on each point
    band: list[tuple[int, float, float]] = []  # (step, low, high), shaded in the colour


class Panel(NamedTuple):
    title: str
    unit: str
    series: list[Series]
    tolerance: float | None = None  # drawn as a line, the region below it shaded
    names: tuple[str, ...] = ()  # of x = 0, 1, ..., instead of step numbers
    axis: str = "step"


# The charts, as SVG in units of a 440 x 250 box.
WIDTH = 440
HEIGHT = 250
LEFT = 52
RIGHT = 14
TOP = 26
BOTTOM = 36


def chart(panel: Panel) -> str:
    steps = [step for series in panel.series for step, _ in series.points]
    left = min(steps)
    right = max(steps)
    ticks = value_ticks(panel)
    tolerance = panel.tolerance
    bottom = ticks[0]
    top = ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (
            (step - left) / (right - left) if right > left else 0.5
        )

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - bottom) / (top - bottom)

    marks = [_band(tolerance, top, y)] if tolerance is not None else []
    marks += [
        f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>'
        f'<text x="{LEFT - 7}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in ticks
    ]
    named = list(enumerate(panel.names)) or [(step, str(step)) for step in _step_ticks(left, right)]
    marks += [
        f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{html.escape(name)}</text>'
        for s, name in named
    ]
    axis = html.escape(panel.axis)
    marks += [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" '
        f'text-anchor="middle">{axis}</text>',
        f'<text x="0" y="13">{html.escape(panel.unit)}</text>',
    ]
    marks += [_spread(series, x, y) for series in panel.series] + [
        _line(series, x, y) for series in panel.series
    ]
    title = html.escape(panel.title)
    return (
        f'<figure><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
        f'font-size="12" fill="#475569">{"".join(marks)}</svg>{_legend(panel)}</figure>'
    )


def _band(tolerance: float, top: float, y: Callable[[float], float]) -> str:
    edge = min(tolerance, top)
    band = (
        f'<rect x="{LEFT}" y="{y(edge):.1f}" width="{WIDTH - LEFT - RIGHT}" height="{y(0) - y(edge):.1f}" '
        f'fill="{INSIDE}" fill-opacity="0.12"/>'
    )
    line = (
        f'<path d="M{LEFT} {y(edge):.1f}H{WIDTH - RIGHT}" stroke="{INSIDE}" stroke-width="1.6" '
        f'stroke-dasharray="6 4"/>'
    )
    return band + (line if tolerance <= top else "")


def _spread(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The band around a curve, as one polygon: there along its upper edge, back along the lower."""
    if len(series.band) < 2:
        return ""
    edge = [(s, high) for s, _, high in series.band] + [
        (s, low) for s, low, _ in reversed(series.band)
    ]
    drawn = "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in edge)
    return f'<path d="M{drawn}Z" fill="{series.color}" fill-opacity="0.15"/>'


def _line(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The curve in pieces between gaps; a piece of one point is a dot."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for point in series.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    drawn = [
        "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in piece)
        for piece in pieces
        if len(piece) > 1
    ]
    dots = [point for piece in pieces if series.marked or len(piece) == 1 for point in piece]
    line = (
        (
            f'<path d="{"".join(drawn)}" fill="none" stroke="{series.color}" stroke-width="{series.width}" '
            f'stroke-linejoin="round"/>'
        )
        if drawn
        else ""
    )
    radius = 1.5 + series.width / 2
    return line + "".join(
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="{radius}" fill="{series.color}"/>'
        for s, v in dots
    )


def _legend(panel: Panel) -> str:
    entries = [(series.label, series.color, series.width, "solid") for series in panel.series]
    if panel.tolerance is not None:
        entries.append((f"tolerance {panel.tolerance:g}, inside shaded", INSIDE, 2.0, "dashed"))
    if len(entries) == 1:
        return ""
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i style="border-top:{width}px {line} {color}"></i>{html.escape(label)}</span>'
            for label, color, width, line in entries
        )
        + "</div>"
    )


def value_ticks(panel: Panel) -> list[float]:
    """Round numbers, about five, that enclose zero, the values and, where it is not far above them,
    the tolerance.
    """
    values = [value for series in panel.series for _, value in finite(series.points)]
    values += [edge for series in panel.series for _, *both in series.band for edge in both]
    low = min(0.0, *values)
    high = max(0.0, *values)
    # further up it flattens the curve
    if panel.tolerance is not None and (panel.tolerance <= 3 * high or high == 0):
        high = max(high, 1.1 * panel.tolerance)
    high = high if high - low > 1e-300 else low + 1.0
    step = round_step((high - low) / 5)
    # Ten digits, not a number of decimals: the values of an exact engine are as small as 1e-14.
    return [
        float(f"{k * step:.10g}")
        for k in range(math.floor(low / step), math.ceil(round(high / step, 6)) + 1)
    ]


def _step_ticks(first: int, last: int) -> list[int]:
    """Round step numbers within first..last; all of them where they are few."""
    gap = max(1, int(round_step((last - first) / 8))) if last > first else 1
    return list(range(-(-first // gap) * gap, last + 1, gap))


def round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [point for point in points if math.isfinite(point[1])]
