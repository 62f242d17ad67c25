"""Curves as inline SVG with a legend and the values under the pointer, without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

# colours of the engine's and the trainer's policy, distinct also to the colour-blind; each has a
# contrast of 3 or more to a white page and to a dark one
ENGINE = "#d55e00"
TRAINER = "#0072b2"
NEUTRAL = "currentColor"  # the page's ink
FAINT = "#8391a7"
INSIDE = "#009e73"  # the region within the tolerance
GRID = "#94a3b8"  # drawn at a third of its strength

# the SVG's own units
WIDTH = 440
HEIGHT = 254
LEFT = 68  # room for eight characters
RIGHT = 14
TOP = 26
BOTTOM = 40
CHARACTER = 7.6  # width of a digit, in the widest of the fonts that browsers choose

DRAWN = 180  # parts of a long curve, of which the lowest and the highest point are drawn
COLUMNS = 60  # of a chart that show their values, at most

Scale = Callable[[float], float]  # from a step or a value to a coordinate
Item = TypeVar("Item")


class Series(NamedTuple):
    """One curve."""

    label: str
    color: str
    points: list[tuple[int, float]]  # (step, value); a value that is not finite breaks the line
    width: float = 2.0
    marked: bool = False  # a dot on each point, if there is room
    band: list[tuple[int, float, float]] = []  # (step, low, high), shaded in the colour


class Panel(NamedTuple):
    """One chart."""

    title: str
    unit: str
    series: list[Series]
    tolerance: float | None = None  # drawn as a line, the region below it shaded
    names: tuple[str, ...] = ()  # of x = 0, 1, ..., instead of step numbers
    axis: str = "step"
    format: str = "{:.4g}"  # of a value


def chart(panel: Panel) -> str:
    """Returns a chart as an HTML figure with its title and legend."""
    steps = sorted({step for series in panel.series for step, _ in series.points})
    left: float = steps[0]
    right: float = steps[-1]
    if panel.names:
        left = -0.5
        right = len(panel.names) - 0.5
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
        marks.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="{GRID}" '
            'stroke-opacity="0.35"/>'
        )
        marks.append(_text(LEFT - 7, y(tick) + 4, _tick_label(tick, panel), "end"))
    marks += _step_labels(panel, steps, x)
    marks.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, panel.axis, "middle"))
    marks.append(_text(0, 13, panel.unit, "start"))
    marks += [_band(series, x, y) for series in panel.series]
    marks += [_line(series, x, y) for series in panel.series]
    title = html.escape(panel.title)
    return (
        f'<figure><h2>{title}</h2><div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}" font-size="12">{"".join(marks)}</svg>'
        f"{_readout(panel, steps, x)}</div>{_legend(panel)}</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _tick_label(tick: float, panel: Panel) -> str:
    return f"{100 * tick:g}%" if "%" in panel.format else f"{tick:g}"


def _step_labels(panel: Panel, steps: list[int], x: Scale) -> list[str]:
    """Draws the names of steps, inside the drawing; one that would touch the name before it is left
    out.
    """
    ticks = _step_ticks(steps[0], steps[-1])
    named = list(enumerate(panel.names)) or [(step, str(step)) for step in ticks]
    labels = []
    free = 0.0  # where the next name may begin
    for step, name in named:
        width = CHARACTER * len(name)
        start = min(max(x(step) - width / 2, 0), WIDTH - width)
        if start >= free:
            labels.append(_text(start + width / 2, HEIGHT - BOTTOM + 17, name, "middle"))
            free = start + width + CHARACTER
    return labels


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


def parts(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Returns the items in at most `most` parts, in order and of nearly equal length."""
    count = min(len(items), most)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


def _band(series: Series, x: Scale, y: Scale) -> str:
    """Draws the band around a curve as one polygon: along its upper edge, back along the lower."""
    if len(series.band) < 2:
        return ""
    drawn = parts(series.band, DRAWN)
    upper = [(part[0][0], max(high for _, _, high in part)) for part in drawn]
    lower = [(part[0][0], min(low for _, low, _ in part)) for part in reversed(drawn)]
    outline = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in upper + lower)
    return f'<path d="M{outline}Z" fill="{series.color}" fill-opacity="0.15"/>'


def _extremes(part: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the lowest and the highest of neighbouring points, and a gap if they have one, in
    their order.
    """
    measured = [i for i, point in enumerate(part) if math.isfinite(point[1])]
    gaps = [i for i, point in enumerate(part) if not math.isfinite(point[1])]
    kept = gaps[:1]
    if measured:
        kept.append(min(measured, key=lambda i: part[i][1]))
        kept.append(max(measured, key=lambda i: part[i][1]))
    return [part[i] for i in sorted(set(kept))]


def _line(series: Series, x: Scale, y: Scale) -> str:
    """Draws a curve in pieces between gaps; a piece of one point is a dot."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for part in parts(series.points, DRAWN):
        for point in _extremes(part):
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
    marked = series.marked and len(series.points) <= COLUMNS
    for piece in pieces:
        for step, value in piece if marked or len(piece) == 1 else ():
            drawn += (
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}" '
                f'fill="{series.color}"/>'
            )
    return drawn


def _readout(panel: Panel, steps: list[int], x: Scale) -> str:
    """Returns columns over the plot; each shows its values while the pointer or the focus is on it.

    The columns are radio buttons: one stop of the tab key, moved along with the arrow keys.
    """
    columns = parts(steps, COLUMNS)
    place = {step: i for i, column in enumerate(columns) for step in column}
    lines = [[html.escape(_column_name(panel, column))] for column in columns]
    coloured = len(panel.series) > 2  # the values may cover a long legend
    for series in panel.series:
        values: list[list[float]] = [[] for _ in columns]
        edges: list[list[float]] = [[] for _ in columns]
        for step, value in finite(series.points):
            values[place[step]].append(value)
        for step, low, high in series.band:
            edges[place[step]] += [low, high]
        for shown, value, edge in zip(lines, values, edges):
            if value:
                band = f" ({_range(edge, panel)})" if edge else ""
                text = html.escape(f"{series.label} {_range(value, panel)}{band}")
                dot = f'<i style="background:{series.color}"></i>' if coloured else ""
                shown.append(dot + text)
    borders = [(x(a[-1]) + x(b[0])) / 2 for a, b in zip(columns, columns[1:])]
    borders = [LEFT, *borders, WIDTH - RIGHT]
    title = html.escape(panel.title)
    labels = []
    for shown, start, end in zip(lines, borders, borders[1:]):
        text = "\n".join(shown if len(shown) > 1 else [*shown, "no value"])
        labels.append(
            f'<label style="flex:{end - start:.1f}"><input type="radio" name="{title}">'
            f"<b>{text}</b></label>"
        )
    sides = (TOP / HEIGHT, RIGHT / WIDTH, BOTTOM / HEIGHT, LEFT / WIDTH)
    inset = " ".join(f"{100 * side:.1f}%" for side in sides)
    return (
        f'<div class="readout" style="inset:{inset}" role="radiogroup" '
        f'aria-label="Values: {title}">{"".join(labels)}</div>'
    )


def _column_name(panel: Panel, steps: Sequence[int]) -> str:
    if panel.names:
        return panel.names[steps[0]]
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _range(values: list[float], panel: Panel) -> str:
    low = panel.format.format(min(values))
    high = panel.format.format(max(values))
    return low if low == high else f"{low} to {high}"


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
