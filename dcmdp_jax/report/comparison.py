"""The page of several runs: a verdict that compares them, their curves, a table, their settings.

Runs that differ in the seed alone are one configuration: a curve of their mean in a band from the
lowest seed to the highest, and intervals over seeds. The other configurations are compared with
that of the first run.
"""

from __future__ import annotations

import html
import math
import os
import pathlib
import statistics
from collections.abc import Sequence

from dcmdp_jax import buckets, files
from dcmdp_jax.evaluation import intervals
from dcmdp_jax.monitoring import metrics, quantities
from dcmdp_jax.report import (
    discrepancy,
    html_page,
    run_advice,
    run_data,
    run_groups,
    run_verdict,
    tables,
)
from dcmdp_jax.report.line_chart import Panel, Series, chart, finite
from dcmdp_jax.report.run_data import counted
from dcmdp_jax.report.run_groups import Group, Run
from dcmdp_jax.run import staging


def write(workdirs: Sequence[str | os.PathLike], output: str | os.PathLike | None = None) -> str:
    """Writes the page of several runs and returns its path or address: `output`, or `report.html`
    in the folder that holds them all, or else here.

    Raises ValueError as `run_groups.load` does, and if the path is a run's own page.
    """
    base, runs = run_groups.load([pathlib.Path(workdir) for workdir in workdirs])
    text = str(output or f"{base}report.html")
    own = [staging.shown(str(run.folder.resolve() / "report.html")) for run in runs]
    if text in own or str(pathlib.Path(text).resolve()) in own:
        raise ValueError(f"{text} is a run's own page; give another --output")
    with buckets.local_file(text) as path:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, _page(run_groups.group_runs(runs)))
    return text


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Returns a chart for each quantity with a curve for each configuration; a chart without a
    finite value is left out.
    """
    tolerances = {run_data.tolerance_of(run.config) for group in groups for run in group.runs}
    common_tolerance = tolerances.pop() if len(tolerances) == 1 else None
    charts = []
    rows = [row for group in groups for run in group.runs for row in run.rows]
    for quantity in quantities.of_rows(rows):
        curves = [curve for group in groups if (curve := _curve(group, quantity))]
        limit = common_tolerance if quantity.key == "delta_mean" else None
        if curves:
            charts.append(
                Panel(quantity.title, quantity.unit, curves, limit, format=quantity.format)
            )
    return charts


def _curve(group: Group, quantity: quantities.Quantity) -> Series | None:
    """Returns the mean over the group's runs, step by step, in a band from the lowest to the
    highest if there are several; None if no value is finite.
    """
    lines = []
    for run in group.runs:
        points = run_data.points_of(run.rows, quantity.key)
        window = run_data.trailing_window(points) if quantity.noisy else 1
        lines.append(run_data.smoothed(points, window))
    values: dict[int, list[float]] = {}
    for line in lines:
        for step, value in finite(line):
            values.setdefault(step, []).append(value)
    if not values:
        return None
    # A mean over fewer seeds would jump: the curve ends where the first of the runs ends.
    complete = [step for step in sorted(values) if len(values[step]) == len(lines)]
    means = [(step, statistics.fmean(values[step])) for step in complete or sorted(values)]
    band = [(step, min(values[step]), max(values[step])) for step in complete]
    evaluated = quantity.key.startswith("reward_eval")
    return Series(
        group.label,
        group.color,
        means,
        marked=evaluated,
        band=band if len(lines) > 1 else [],
    )


def last_evaluation(group: Group, key: str) -> intervals.Interval | None:
    """Returns the last held-out reward, None if nothing was held out.

    Its interval is over seeds, or over the prompts of a single run if rewards are in [0, 1]; nan if
    neither gives one.
    """
    ends = list(_last_evaluations(group, key).values())
    prompts = run_data.setting(group.runs[0].config, "eval", "prompts")
    if not ends:
        return None
    if len(ends) > 1:
        return intervals.mean(ends)
    if prompts and 0 <= ends[0] <= 1:
        return intervals.wilson(ends[0], prompts)
    return intervals.Interval(ends[0], math.nan, math.nan)


def _last_evaluations(group: Group, key: str) -> dict[int, float]:
    """Returns the last finite value of each run that has one, by the run's place in the group."""
    points = [finite(run_data.points_of(run.rows, key)) for run in group.runs]
    return {i: run_points[-1][1] for i, run_points in enumerate(points) if run_points}


def difference_from(group: Group, first: Group, key: str) -> intervals.Interval | None:
    """Returns the difference of the last held-out rewards: paired over the seeds that both have, if
    there are two, else of independent estimates; None if one of them held nothing out.
    """
    by_seed = [
        {
            str(kind.runs[i].config.get("seed")): value
            for i, value in _last_evaluations(kind, key).items()
        }
        for kind in (group, first)
    ]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(common) > 1:
        return intervals.mean([by_seed[0][seed] - by_seed[1][seed] for seed in common])
    left = last_evaluation(group, key)
    right = last_evaluation(first, key)
    return intervals.difference(left, right) if left and right else None


def verdict(groups: Sequence[Group]) -> list[str]:
    """Returns sentences that compare each configuration with the first, for both policies, and tell
    what the figures cannot show.
    """
    first = groups[0]
    ends = [
        f"{_interval(interval)} for the {owner}'s policy"
        for key, owner in quantities.HELD_OUT
        if (interval := last_evaluation(first, key))
    ]
    if not ends:
        return [f"Nothing was held out in {first.label}, so no pass rates are compared."]
    sentences = [f"{first.label} ends at a held-out reward of {' and '.join(ends)}."]
    for group in groups[1:]:
        gaps = [
            f"{owner} {_difference(interval)}"
            for key, owner in quantities.HELD_OUT
            if (interval := difference_from(group, first, key))
        ]
        sentences.append(f"{group.label} against it: {'; '.join(gaps) or 'nothing was held out'}.")
    return sentences + _caveats(groups)


def advice(groups: Sequence[Group]) -> list[str]:
    """Returns what to do next, each sentence once with the configurations that it is about."""
    found: dict[str, list[str]] = {}
    for group in groups:
        sentences = [
            sentence for run in group.runs for sentence in run_advice.advice(run.config, run.rows)
        ]
        for sentence in dict.fromkeys(sentences):
            share = f"{sentences.count(sentence)} of {counted(len(group.runs), 'run')}"
            found.setdefault(sentence, []).append(f"{group.label} ({share})")
    return [f"{', '.join(labels)}: {sentence}" for sentence, labels in found.items()]


def _caveats(groups: Sequence[Group]) -> list[str]:
    sentences = []
    single = [group.label for group in groups if len(group.runs) == 1]
    if single and len(groups) > 1:
        sentences.append(
            f"{', '.join(single)}: one run{' each' if len(single) > 1 else ''}, whose interval "
            "counts held-out prompts and not seeds, so it is too narrow for a claim about the "
            "configuration."
        )
    if len(groups) > 2:
        sentences.append(
            f"Each interval is for one comparison: of {len(groups) - 1}, at least one shows a "
            "difference by chance with a probability of more than 5%."
        )
    last_steps = {run.rows[-1]["step"] for group in groups for run in group.runs}
    if len(last_steps) > 1:
        sentences.append(
            f"The runs end at different steps, {min(last_steps)} to {max(last_steps)}; their last "
            "evaluations are compared."
        )
    return sentences


def _interval(interval: intervals.Interval) -> str:
    bounds = f" [{interval.low:.3f}, {interval.high:.3f}]" if math.isfinite(interval.low) else ""
    return f"{interval.value:.3f}{bounds}"


def _difference(interval: intervals.Interval) -> str:
    if not math.isfinite(interval.low + interval.high):
        return f"{interval.value:+.3f}, without an interval"
    finding = "no difference shown"
    if interval.low > 0:
        finding = "higher"
    elif interval.high < 0:
        finding = "lower"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], {finding}"


def _page(groups: Sequence[Group]) -> str:
    runs = [(group, run) for group in groups for run in group.runs]
    charts = "".join(chart(panel) for panel in panels(groups))
    each = "".join(
        f'<li><i class="dot" style="background:{group.color}"></i><b>{html.escape(run.name)}</b> '
        f"{html.escape(' '.join(run_verdict.verdict(run.config, run.rows)))}</li>"
        for group, run in runs
    )
    several = any(len(group.runs) > 1 for group in groups)
    note = "Bands reach from the lowest seed to the highest. " if several else ""
    names = sorted({str(run.config.get("name", "run")) for _, run in runs})
    configs = {staging.shown(str(run.folder)): run.config for _, run in runs}
    body = f"""<p class="summary">{html.escape(_summary(groups))}</p>
{html_page.verdict(verdict(groups), advice(groups))}
{_table(groups)}
<h2 class="section">Curves</h2><p class="note">{note}Training curves are trailing means.</p>
<div class="charts">{charts}{_positions(groups)}</div>
<h2 class="section">Settings that differ</h2>{_settings_table(groups)}
<details><summary>Run by run</summary><ul class="runs">{each}</ul></details>
{_details(runs)}"""
    several_names = f"{counted(len(groups), 'configuration')} compared"
    return html_page.page(names[0] if len(names) == 1 else several_names, body, configs)


def _summary(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({str(run.config.get("seed")) for run in runs})
    last = max(run.rows[-1]["step"] for run in runs)
    return (
        f"{counted(len(runs), 'run')} of {counted(len(groups), 'configuration')} · "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)} · {last} steps"
    )


def _table(groups: Sequence[Group]) -> str:
    shown = quantities.headline()
    rows = [
        [
            tables.with_dot(group.color, group.label),
            str(len(group.runs)),
            *(_cell(group, quantity) for quantity in shown),
        ]
        for group in groups
    ]
    header = ["configuration", "runs", *(quantity.name for quantity in shown)]
    return tables.html_table(header, rows) + (
        '<p class="note">Held-out: the last evaluation, with a 95% interval (over seeds by '
        "Student's t; of one run by Wilson, over its prompts); differences are over the seeds that "
        "both have, paired, if there are two. The others: means over the last tenth of the steps "
        "and over seeds.</p>"
    )


def _cell(group: Group, quantity: quantities.Quantity) -> str | tables.Cell:
    if quantity.key in dict(quantities.HELD_OUT):
        interval = last_evaluation(group, quantity.key)
        if interval is None:
            return tables.MISSING
        value = quantity.format.format(interval.value)
        if not math.isfinite(interval.low):
            return value
        bounds = f"[{interval.low:.3f}, {interval.high:.3f}]"
        return tables.with_note(value, bounds, below=True)
    mean = _mean_at_end(group, quantity.key)
    return tables.MISSING if mean is None else quantity.format.format(mean)


def _mean_at_end(group: Group, key: str) -> float | None:
    """Mean over the last tenth of the steps, and over the runs."""
    values = [
        value
        for run in group.runs
        for _, value in finite(run_data.points_of(run_data.last_tenth(run.rows), key))
    ]
    return statistics.fmean(values) if values else None


def _positions(groups: Sequence[Group]) -> str:
    """Draws the discrepancy by position at each configuration's last evaluation, over its runs."""
    curves = []
    for group in groups:
        totals: dict[tuple[int, int], tuple[int, float]] = {}  # tokens, and delta summed over them
        for run in group.runs:
            rows = metrics.read_gaps(run.folder)
            for bucket in rows[-1]["positions"] if rows else ():
                ends = bucket["from"], bucket["to"]
                tokens, delta = totals.get(ends, (0, 0.0))
                tokens += bucket["tokens"]
                totals[ends] = tokens, delta + bucket["tokens"] * bucket["delta"]
        buckets = [
            {"from": start, "to": end, "delta": delta / tokens}
            for (start, end), (tokens, delta) in sorted(totals.items())
        ]
        if buckets:
            curves.append((group.label, group.color, buckets))
    return discrepancy.position_panel(curves)


def _settings_table(groups: Sequence[Group]) -> str:
    firsts = [group.runs[0] for group in groups]
    names = run_groups.differing_settings(firsts)
    if not names:
        return '<p class="note">None but the seed.</p>'
    rows = []
    for name in names:
        values = [run_groups.short(run_groups.setting_of(run, name)) for run in firsts]
        rows.append([name, *(tables.Cell(html.escape(value), "setting") for value in values)])
    header = ["setting", *(tables.with_dot(group.color, group.label) for group in groups)]
    return tables.html_table(header, rows)


def _details(runs: Sequence[tuple[Group, Run]]) -> str:
    """Shows sources and worst tokens of each run; of the first that has some, unfolded."""
    parts = []
    for _, run in runs:
        body = discrepancy.source_table(discrepancy.read_diagnosis(run.folder))
        rows = metrics.read_gaps(run.folder)
        if rows:
            body += discrepancy.worst_tokens_table(rows[-1])
        if body:
            parts.append(
                f"<details{'' if parts else ' open'}>"
                f"<summary>Discrepancy of {html.escape(run.name)}</summary>{body}</details>"
            )
    return "".join(parts)
