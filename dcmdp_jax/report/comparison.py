"""Several runs on one page: a verdict that compares them, their curves over each other, a table,
their settings.

Runs that differ in the seed alone are one configuration (siblings in a folder also where each seed
starts from a model of its own): a curve of their mean in a band from the lowest seed to the
highest, and intervals over seeds. The configuration of the first run is the one the others are held
against.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from dcmdp_jax import files, intervals, metrics, quantities
from dcmdp_jax.report import discrepancy, run_page, tables
from dcmdp_jax.report.line_chart import Panel, Series, chart, finite
from dcmdp_jax.run_record import differences

# then anew
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7c3aed", "#475569")
# settings that make no other configuration
SAME = ("seed", "name", "checkpoint", "tensorboard", "wandb")
SHORT = 3  # as many differing settings still make a label


class Run(NamedTuple):
    folder: pathlib.Path
    name: str  # the folder, from the one on that holds them all
    config: dict[str, Any]
    rows: list[dict[str, Any]]


class Group(NamedTuple):
    """Runs of one configuration."""

    label: str
    color: str
    runs: list[Run]


def write(
    workdirs: Sequence[str | os.PathLike], output: str | os.PathLike | None = None
) -> pathlib.Path:
    """Writes the page of several runs, to `report.html` in the folder that holds them all unless
    `output` says where.

    Raises ValueError where a folder is no run's, is given twice or has no step, and where `output`
    is one of the runs' own pages.
    """
    folders = [pathlib.Path(workdir) for workdir in workdirs]
    whole = [folder.resolve() for folder in folders]
    for folder in folders:
        if whole.count(folder.resolve()) > 1:
            raise ValueError(f"{folder} is given twice; give each run once")
    base = pathlib.Path(os.path.commonpath([folder.parent for folder in whole]))
    runs = [
        Run(folder, str(full.relative_to(base)), *run_page.load(folder))
        for folder, full in zip(folders, whole)
    ]
    for run in runs:
        run_page.check_settings(run.config, run.folder)
        if not run.rows:
            raise ValueError(f"{run.folder} has not finished a step; leave it out")
    path = pathlib.Path(output) if output else base / "report.html"
    if path.resolve().parent in whole and path.name == "report.html":
        raise ValueError(f"{path} is a run's own page; give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, _page(group_runs(runs)))
    return path


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, in the order given; labels say by which settings they differ, or else
    name folders.
    """
    kinds: list[list[Run]] = []
    for run in runs:
        same = next((kind for kind in kinds if _another_seed(kind[0], run)), None)
        if same:
            same.append(run)
        else:
            kinds.append([run])
    names = differing_settings([kind[0] for kind in kinds])
    values = [[_at(kind[0].config, name) for name in names] for kind in kinds]
    plain = not any(isinstance(value, (dict, list)) for row in values for value in row)
    labels = [
        ", ".join(f"{name.split('.')[-1]} {_short(value)}" for name, value in zip(names, row))
        for row in values
    ]
    if not names or len(names) > SHORT or not plain:
        labels = [_folders(kind) for kind in kinds]
    return [
        Group(label, COLORS[i % len(COLORS)], kind)
        for i, (label, kind) in enumerate(zip(labels, kinds))
    ]


def _another_seed(one: Run, other: Run) -> bool:
    apart = differences(_settings(one.config), _settings(other.config)).keys()
    siblings = one.folder.resolve().parent == other.folder.resolve().parent
    own_start = siblings and one.config.get("seed") != other.config.get("seed")
    # each run's tolerance is its own
    measured = all((run.folder / "calibration.json").is_file() for run in (one, other))
    return (
        not apart
        or own_start
        and apart <= {"model.folder", *(["constraint.tolerance"] if measured else [])}
    )


def _folders(kind: Sequence[Run]) -> str:
    """The runs' common folder where they have one to themselves, else each one's."""
    parents = {str(pathlib.PurePath(run.name).parent) for run in kind}
    return (
        parents.pop()
        if len(kind) > 1 and len(parents) == 1 and parents != {"."}
        else ", ".join(run.name for run in kind)
    )


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Dotted names of the settings in which configurations differ from the first one's."""
    first = _settings(runs[0].config)
    return sorted({name for run in runs[1:] for name in differences(first, _settings(run.config))})


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Returns a chart for each quantity with a curve for each configuration; a chart without a
    finite value is left out.
    """
    tolerances = {run_page.tolerance_of(run.config) for group in groups for run in group.runs}
    common_tolerance = tolerances.pop() if len(tolerances) == 1 else None
    charts = []
    for quantity in quantities.QUANTITIES:
        curves = [curve for group in groups if (curve := _curve(group, quantity))]
        limit = common_tolerance if quantity.key == "delta_mean" else None
        if curves:
            charts.append(Panel(quantity.title, quantity.unit, curves, limit))
    return charts


def _curve(group: Group, quantity: quantities.Quantity) -> Series | None:
    """Mean over the group's runs, step by step, in a band from the lowest to the highest if there
    are several; None if no value is finite.
    """
    lines = []
    for run in group.runs:
        points = run_page.points_of(run.rows, quantity.key)
        window = run_page.trailing_window(points) if quantity.noisy else 1
        lines.append(run_page.smoothed(points, window))
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
    """The last evaluation: over seeds, or over one run's prompts; its value alone where neither
    gives an interval.
    """
    ends = [
        points[-1][1] for run in group.runs if (points := finite(run_page.points_of(run.rows, key)))
    ]
    prompts = run_page.setting(group.runs[0].config, "eval", "prompts")
    if len(ends) > 1:
        return intervals.mean(ends)
    if ends and prompts and 0 <= ends[0] <= 1:
        return intervals.wilson(ends[0], prompts)
    return intervals.Interval(ends[0], math.nan, math.nan) if ends else None


def verdict(groups: Sequence[Group]) -> list[str]:
    """Each configuration against the first, for both policies, in sentences; and what the figures
    cannot tell.
    """
    first = groups[0]
    ends = [
        f"{_interval(found)} for the {owner}'s policy"
        for key, owner in quantities.HELD_OUT
        if (found := last_evaluation(first, key))
    ]
    if not ends:
        return [f"Nothing was held out in {first.label}, so no pass rates are compared."]
    said = [f"{first.label} ends at a held-out reward of {' and '.join(ends)}."]
    for group in groups[1:]:
        found = [
            f"{owner} {_told(gap)}"
            for key, owner in quantities.HELD_OUT
            if (gap := difference_from(group, first, key))
        ]
        said.append(f"{group.label} against it: {'; '.join(found) or 'nothing was held out'}.")
    lone = [group.label for group in groups if len(group.runs) == 1]
    if lone and len(groups) > 1:
        said.append(
            f"One run of {'; '.join(lone)}: there the interval counts held-out prompts and not seeds, so it is too "
            "narrow for a claim about the configuration."
        )
    if len(groups) > 2:
        said.append(
            f"The intervals are of one comparison each; among {len(groups) - 1} a chance find is likelier than 5 %."
        )
    stops = {run.rows[-1]["step"] for group in groups for run in group.runs}
    if len(stops) > 1:
        said.append(
            f"The runs end at different steps, {min(stops)} to {max(stops)}; their last evaluations are compared."
        )
    return said


def difference_from(group: Group, first: Group, key: str) -> intervals.Interval | None:
    """Difference of the last evaluations: over the seeds that both have, two at least, else of
    independent estimates.
    """
    ends = [
        {
            str(run.config.get("seed")): points[-1][1]
            for run in kind.runs
            if (points := finite(run_page.points_of(run.rows, key)))
        }
        for kind in (group, first)
    ]
    shared = ends[0].keys() & ends[1].keys()
    if len(shared) > 1:
        return intervals.mean([ends[0][seed] - ends[1][seed] for seed in sorted(shared)])
    one = last_evaluation(group, key)
    other = last_evaluation(first, key)
    return intervals.difference(one, other) if one and other else None


def _told(gap: intervals.Interval) -> str:
    if not math.isfinite(gap.low + gap.high):
        return f"{gap.value:+.3f}, without an interval"
    found = "higher" if gap.low > 0 else "lower" if gap.high < 0 else "no difference shown"
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {found}"


def _page(groups: list[Group]) -> str:
    runs = [(group, run) for group in groups for run in group.runs]
    compared = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict(groups))
    charts = "".join(chart(panel) for panel in panels(groups))
    each = "".join(
        f'<li><i class="dot" style="background:{group.color}"></i><b>{html.escape(run.name)}</b> '
        f"{html.escape(run_page.verdict(run.config, run.rows))}</li>"
        for group, run in runs
    )
    several = any(len(group.runs) > 1 for group in groups)
    note = "Bands reach from the lowest seed to the highest. " if several else ""
    names = sorted({str(run.config.get("name", "run")) for _, run in runs})
    configs = {str(run.folder): run.config for _, run in runs}
    body = f"""<p class="summary">{html.escape(_summary(groups))}</p>
<div class="verdict">{compared}</div>
{_table(groups)}
<h2 class="section">Curves</h2><p class="note">{note}Training curves are trailing means.</p>
<div class="charts">{charts}{_positions(groups)}</div>
<h2 class="section">Settings that differ</h2>{_settings_table(groups)}
<h2 class="section">Run by run</h2><ul class="runs">{each}</ul>
{_details(runs)}"""
    title = (
        names[0]
        if len(names) == 1
        else f"{run_page.counted(len(groups), 'configuration')} compared"
    )
    return run_page.page(title, body, configs)


def _summary(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({str(run.config.get("seed")) for run in runs})
    return (
        f"{run_page.counted(len(runs), 'run')} of {run_page.counted(len(groups), 'configuration')} · seeds "
        f"{', '.join(seeds)} · {max(run.rows[-1]['step'] for run in runs)} steps"
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
        '<p class="note">Held-out: the last evaluation, with a 95 % interval (over seeds by '
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
        return tables.with_note(value, f"[{interval.low:.3f}, {interval.high:.3f}]")
    mean = _mean_at_end(group, quantity.key)
    return tables.MISSING if mean is None else quantity.format.format(mean)


def _mean_at_end(group: Group, key: str) -> float | None:
    """Mean over the last tenth of the steps, and over the runs."""
    values = [
        value
        for run in group.runs
        for _, value in finite(run_page.points_of(run_page.last_tenth(run.rows), key))
    ]
    return statistics.fmean(values) if values else None


def _interval(found: intervals.Interval) -> str:
    return f"{found.value:.3f}" + (
        f" [{found.low:.3f}, {found.high:.3f}]" if math.isfinite(found.low) else ""
    )


def _positions(groups: Sequence[Group]) -> str:
    """Of each configuration the last row of `gaps.jsonl`, over its runs."""
    curves = []
    for group in groups:
        total: dict[tuple[int, int], list[float]] = {}
        for rows in (metrics.read_gaps(run.folder) for run in group.runs):
            for bucket in rows[-1]["positions"] if rows else ():
                seen = total.setdefault((bucket["from"], bucket["to"]), [0, 0.0])
                seen[0], seen[1] = (
                    seen[0] + bucket["tokens"],
                    seen[1] + bucket["tokens"] * bucket["delta"],
                )
        curves.append(
            (
                group.label,
                group.color,
                [
                    {"from": start, "to": end, "delta": gaps / tokens}
                    for (start, end), (tokens, gaps) in sorted(total.items())
                ],
            )
        )
    return discrepancy.position_panel([curve for curve in curves if curve[2]])


def _settings_table(groups: Sequence[Group]) -> str:
    names = differing_settings([group.runs[0] for group in groups])
    if not names:
        return '<p class="note">None but the seed.</p>'
    rows = [
        [
            name,
            *(
                tables.Cell(html.escape(_short(_at(group.runs[0].config, name))), "setting")
                for group in groups
            ),
        ]
        for name in names
    ]
    header = ["setting", *(tables.with_dot(group.color, group.label) for group in groups)]
    return tables.html_table(header, rows)


def _details(runs: Sequence[tuple[Group, Run]]) -> str:
    """Sources and worst tokens of each run, folded but for the first that has some."""
    parts = []
    for _, run in runs:
        rows = metrics.read_gaps(run.folder)
        name = run.name
        body = discrepancy.source_table(discrepancy.read_diagnosis(run.folder)) + (
            discrepancy.worst_tokens_table(rows[-1]) if rows else ""
        )
        if body:
            parts.append(
                f"<details{'' if parts else ' open'}>"
                f"<summary>Mismatch of {html.escape(name)}</summary>{body}</details>"
            )
    return "".join(parts)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in SAME}


def _at(config: dict[str, Any], name: str) -> Any:
    return run_page.setting(config, *name.split("."))


def _short(value: Any) -> str:
    """A function by its own name, anything else as JSON."""
    if isinstance(value, str):
        return value.rsplit(".", 1)[-1] if value.startswith("dcmdp_jax.") else value
    return "–" if value is None else json.dumps(value, ensure_ascii=False)
