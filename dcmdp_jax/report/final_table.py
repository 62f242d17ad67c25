"""The table that a run prints when it ends."""

from __future__ import annotations

import os
import statistics

from dcmdp_jax.monitoring import phases, quantities
from dcmdp_jax.report import run_data, tables
from dcmdp_jax.report.line_chart import finite


def text(workdir: str | os.PathLike) -> str:
    """Returns the headline quantities of a run at its start and at its end, with its speed.

    Raises ValueError as `run_data.load` does.
    """
    config, rows = run_data.load(workdir)
    tenth = len(run_data.last_tenth(rows))
    table = [["", "start", "end", ""]]
    evaluated: list[int] = []
    for quantity in quantities.headline():
        points = finite(run_data.points_of(rows, quantity.key))
        if not points:
            continue
        if quantity.key in dict(quantities.HELD_OUT):
            evaluated = [points[0][0], points[-1][0]]
            ends = [points[0][1], points[-1][1]]
        else:
            parts = (points[:tenth], points[-tenth:])
            ends = [statistics.fmean(value for _, value in part) for part in parts]
        values = [quantity.format.format(value) for value in ends]
        table.append([quantity.name, *values, _bound(config, quantity.key)])
    steps = run_data.counted(tenth, "step")
    note = f"start and end: means over {steps}"
    if evaluated:
        note += f"; held out: after steps {evaluated[0]} and {evaluated[1]}"
    return "\n".join([_aligned(table), note, _speed(rows)])


def _aligned(table: list[list[str]]) -> str:
    """The last column, of notes, is aligned left."""
    notes = [row.pop() for row in table]
    lines = tables.aligned_text(table).splitlines()
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes))


def _bound(config: run_data.Config, key: str) -> str:
    tolerance = run_data.tolerance_of(config)
    if key == "delta_mean" and tolerance is not None:
        return f"tolerance {tolerance:g}"
    bound = run_data.setting(config, "constraint", "multiplier_max")
    if key == "multiplier" and isinstance(bound, (int, float)):
        return f"at most {bound:g}"
    return ""


def _speed(rows: run_data.Rows) -> str:
    seconds = sum(value for _, value in finite(run_data.points_of(rows, "seconds")))
    tokens = sum(value for _, value in finite(run_data.points_of(rows, "tokens")))
    speed = f", {tokens / seconds:,.0f} tokens/s" if seconds and tokens else ""
    return f"{run_data.counted(len(rows), 'step')} in {phases.clock(seconds)}{speed}"
