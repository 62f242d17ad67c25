"""The page of a run: `report.html` in its folder.

The page is one file without scripts or links: a verdict, the curves as inline SVG, a table, what
`samples` and `discrepancy` show, and the resolved configuration. It can be written while the run
goes on. `comparison` shows several runs on one page.
"""

from __future__ import annotations

import html
import math
import os
import pathlib
import statistics

from dcmdp_jax import files
from dcmdp_jax.monitoring import quantities
from dcmdp_jax.report import discrepancy, html_page, samples, tables
from dcmdp_jax.report.line_chart import (
    ENGINE,
    FAINT,
    NEUTRAL,
    TRAINER,
    Panel,
    Series,
    chart,
    finite,
)
from dcmdp_jax.report.run_advice import advice
from dcmdp_jax.report.run_data import (
    Config,
    Points,
    Rows,
    counted,
    load,
    points_of,
    setting,
    smoothed,
    tolerance_of,
    trailing_window,
)
from dcmdp_jax.report.run_verdict import verdict


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into the run's folder and returns its path.

    Raises ValueError as `run_data.load`, `samples.section` and `discrepancy.sections` do.
    """
    config, rows = load(workdir)
    path = pathlib.Path(workdir) / "report.html"
    sections = samples.section(workdir) + discrepancy.sections(workdir)
    files.write_atomic(path, _page(config, rows, sections))
    return path


def panels(config: Config, rows: Rows) -> list[Panel]:
    """Returns the charts of a run: the rewards in one, every other quantity in its own.

    A curve or a chart without a finite value is left out.
    """
    reward = quantities.get("reward")
    charts = [Panel("Reward", reward.unit, _reward_curves(rows), format=reward.format)]
    for quantity in quantities.of_rows(rows):
        if quantity.key in ("reward", quantities.HELD_OUT_ENGINE, quantities.HELD_OUT_TRAINER):
            continue
        points = points_of(rows, quantity.key)
        curves = [Series(quantity.name, NEUTRAL, points)]
        if quantity.noisy:
            curves = _with_mean(quantity.name, points)
        limit = tolerance_of(config) if quantity.key == "delta_mean" else None
        charts.append(Panel(quantity.title, quantity.unit, curves, limit, format=quantity.format))
    charts = [
        panel._replace(series=[curve for curve in panel.series if finite(curve.points)])
        for panel in charts
    ]
    return [panel for panel in charts if panel.series]


def _reward_curves(rows: Rows) -> list[Series]:
    engine = quantities.get(quantities.HELD_OUT_ENGINE)
    trainer = quantities.get(quantities.HELD_OUT_TRAINER)
    # The trainer's line is the wider one, below: where the two policies agree both are seen.
    return [
        *_with_mean("training", points_of(rows, "reward")),
        Series(trainer.name, TRAINER, finite(points_of(rows, trainer.key)), 3.6, True),
        Series(engine.name, ENGINE, finite(points_of(rows, engine.key)), 1.6, True),
    ]


def _with_mean(name: str, points: Points) -> list[Series]:
    """Returns a curve, and over it a trailing mean if there are enough steps for one."""
    window = trailing_window(points)
    if window == 1:
        return [Series(name, NEUTRAL, points)]
    return [
        Series(name, FAINT, points, width=1.2),
        Series(f"{name}, mean of {window} steps", NEUTRAL, smoothed(points, window)),
    ]


def _page(config: Config, rows: Rows, sections: str) -> str:
    charts = "".join(chart(panel) for panel in panels(config, rows))
    body = f"""<p class="summary">{html.escape(_summary(config))}</p>
{html_page.verdict(verdict(config, rows), advice(config, rows))}
<div class="charts">{charts}</div>
{_table(rows)}
{sections}
<p>{html.escape(_cost(rows))}</p>"""
    return html_page.page(str(config.get("name", "run")), body, config)


def _summary(config: Config) -> str:
    """Returns the settings that tell runs apart, in one line; a missing one is left out."""
    parts = (
        ("{} engine", ("rollout", "precision", "weights")),
        ("{} prompts a step", ("data", "prompts_per_step")),
        ("{} samples a prompt", ("rollout", "samples")),
        ("up to {} tokens", ("rollout", "max_tokens")),
        ("learning rate {}", ("algorithm", "learning_rate")),
        ("tolerance {}", ("constraint", "tolerance")),
        ("dual learning rate {}", ("constraint", "dual_lr")),
        ("seed {}", ("seed",)),
    )
    values = [(text, setting(config, *names)) for text, names in parts]
    shown = [text.format(value) for text, value in values if value is not None]
    steps = config.get("steps")
    return " · ".join(shown if steps is None else [counted(steps, "step"), *shown])


def _table(rows: Rows) -> str:
    """Returns the first, best and last value of each quantity, with the steps they belong to, as
    HTML."""
    lines = []
    for quantity in quantities.of_rows(rows):
        points = finite(points_of(rows, quantity.key))
        if not points:
            continue

        def cell(step: int, value: float, quantity=quantity) -> tables.Cell:
            return tables.with_note(quantity.format.format(value), f"at {step}")

        best = tables.MISSING
        if quantity.better:
            best = cell(*quantity.better(points, key=lambda point: point[1]))
        label = tables.with_note(quantity.title, quantity.unit)
        lines.append([label, cell(*points[0]), best, cell(*points[-1])])
    return tables.html_table(["quantity", "first", "best", "last"], lines) if lines else ""


def _cost(rows: Rows) -> str:
    """Returns the wall time and the sampling speed, over the steps that have both."""
    pairs = [(row.get("seconds") or 0.0, row.get("tokens")) for row in rows]
    timed = [
        (seconds, tokens)
        for seconds, tokens in pairs
        if 0 < seconds < math.inf and files.matches(tokens, files.NUMBER)
    ]
    if not timed:
        return "No step was timed."
    seconds = sum(seconds for seconds, _ in timed)
    tokens = sum(tokens for _, tokens in timed)
    typical = statistics.median(seconds for seconds, _ in timed)
    minutes = f"{int(seconds) // 60} min {int(seconds) % 60} s"
    clock = f"{seconds:.1f} s" if seconds < 60 else minutes
    return (
        f"{counted(len(timed), 'step')} took {clock} (median {typical:.3g} s); {tokens:,} tokens "
        f"were sampled, {tokens / seconds:,.0f} per second of the whole step."
    )
