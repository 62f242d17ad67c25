"""A run at a glance: `report.html` of its folder.

The page is one file without scripts or links: a verdict computed from the rows, the curves as
inline SVG, a table, and the resolved configuration. It reads `metrics.jsonl` and `config.json`, so
it works on a run that is unfinished too, and what `mismatch` finds. Several runs on one page:
`comparison`.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from dcmdp_jax import files, metrics, quantities
from dcmdp_jax.report import discrepancy, tables
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
from dcmdp_jax.run_record import RECORD_FILE, read_record

NUMBERS = (
    ("steps",),
    ("eval", "prompts"),
    ("constraint", "tolerance"),
    ("constraint", "multiplier_max"),
)


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into the run's folder and returns its path.

    Raises ValueError where the folder is no run's: no `config.json` or no `metrics.jsonl`.
    """
    config, rows = load(workdir)
    check_settings(config, workdir)
    path = pathlib.Path(workdir) / "report.html"
    files.write_atomic(path, _page(config, rows, discrepancy.sections(workdir)))
    return path


def panels(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[Panel]:
    """Returns the charts of a run: the rewards in one, every other quantity in its own.

    A curve or a chart without a finite value is left out.
    """
    charts = [Panel("Reward", "mean reward", _reward_curves(rows))]
    for quantity in quantities.QUANTITIES:
        if quantity.key in ("reward", quantities.HELD_OUT_ENGINE, quantities.HELD_OUT_TRAINER):
            continue
        curve = Series(quantity.name, NEUTRAL, points_of(rows, quantity.key))
        limit = tolerance_of(config) if quantity.key == "delta_mean" else None
        charts.append(Panel(quantity.title, quantity.unit, [curve], limit))
    charts = [
        panel._replace(series=[curve for curve in panel.series if finite(curve.points)])
        for panel in charts
    ]
    return [panel for panel in charts if panel.series]


def _reward_curves(rows: list[dict[str, Any]]) -> list[Series]:
    window = trailing_window(rows)
    reward = points_of(rows, "reward")
    if window == 1:
        training = [Series("training", NEUTRAL, reward, width=1.2)]
    else:
        training = [
            Series("training", FAINT, reward, width=1.2),
            Series(f"training, mean of {window} steps", NEUTRAL, smoothed(reward, window)),
        ]
    engine = quantities.get(quantities.HELD_OUT_ENGINE)
    trainer = quantities.get(quantities.HELD_OUT_TRAINER)
    # The trainer's line is the wider one, below: where the two policies agree both are seen.
    return [
        *training,
        Series(trainer.name, TRAINER, finite(points_of(rows, trainer.key)), 3.6, True),
        Series(engine.name, ENGINE, finite(points_of(rows, engine.key)), 1.6, True),
    ]


def verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What happened, in sentences computed from the rows."""
    if not rows:
        return "No step was finished."
    last = rows[-1]["step"]
    total = config.get("steps", rows[-1]["step"])
    said = [f"The run stopped at step {last} of {total}."] if last < total else []
    skipped = rows[-1].get("skipped") or 0
    updates = [setting(config, "algorithm", name) or 1 for name in ("epochs", "minibatches")]
    if skipped and skipped == last * math.prod(updates):
        said.append("Nothing was learnt: every update was left out.")
    said += _reward_verdict(config, rows) + _truncated_verdict(config, rows)
    tail = finite(points_of(last_tenth(rows), "delta_mean"))
    tolerance = tolerance_of(config)
    delta = [value for _, value in finite(points_of(rows, "delta_mean"))]
    if tail and tolerance is not None:
        mean = statistics.fmean(value for _, value in tail)
        inside = sum(value <= tolerance for value in delta)
        place = "within" if mean <= tolerance else "above"
        when = "at the last step" if len(tail) == 1 else f"over the last {len(tail)} steps"
        said.append(
            f"Mean delta was {mean:.4g} {when}, {place} the tolerance of {tolerance:g}; "
            f"{inside} of {counted(len(delta), 'step')} ({inside / len(delta):.0%}) lay inside it."
        )
    asked = sum("delta_mean" in row for row in rows)
    if len(delta) < asked:
        said.append(
            f"Delta could be measured in {len(delta)} of {counted(asked, 'step')}; in the "
            "others log-probs were not finite, or there was no token."
        )
    floor = metrics.floor_lower_bound(rows[0])
    if floor is not None and tolerance is not None and tolerance < floor:
        said.append(
            "The tolerance lies under the floor: with the weights that the run began with "
            f"mean delta was {rows[0]['delta_mean']:.4g}, at which no multiplier could "
            "have met it."
        )
    said += _multiplier_verdict(config, rows)
    if skipped:
        said.append(
            f"{counted(skipped, 'update')} left out because the loss or its gradient was not finite."
        )
    return " ".join(said)


def _reward_verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """One sentence on each policy's held-out reward, or on the training reward where nothing was
    held out.
    """
    said = []
    prompts = setting(config, "eval", "prompts")
    # For rewards in [0, 1] the standard error of a mean over n prompts is at most 0.5 / sqrt(n),
    # and sqrt(2) times that
    # for a difference; a change below two of them is called noise.
    noise = 2 * math.sqrt(2) * 0.5 / math.sqrt(prompts) if prompts else 0.0
    for key, owner in quantities.HELD_OUT:
        points = finite(points_of(rows, key))
        if len(points) == 1:
            said.append(
                f"Held-out reward of the {owner}'s policy was {points[0][1]:.3f} at step {points[0][0]}."
            )
        elif points:
            (first, start), (last, end) = points[0], points[-1]
            verb = "rose" if end > start else "fell"
            change = (
                f"{verb} from" if abs(end - start) > noise else "stayed within sampling noise, from"
            )
            said.append(
                f"Held-out reward of the {owner}'s policy {change} {start:.3f} (step {first}) to {end:.3f} "
                f"(step {last})."
            )
    training = finite(points_of(rows, "reward"))
    if not said and training:
        said.append(
            f"Nothing was held out; the training reward went from {training[0][1]:.3f} to "
            f"{training[-1][1]:.3f}."
        )
    return said


def _truncated_verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """How many completions the length limit cut off, over the last tenth of the steps."""
    shares = [share for _, share in finite(points_of(last_tenth(rows), "truncated"))]
    if not shares or not sum(shares):
        return []
    mean = statistics.fmean(shares)
    limit = setting(config, "rollout", "max_tokens")
    which = "All completions" if mean == 1 else f"{mean:.1%} of the completions"
    when = "at the last step" if len(shares) == 1 else f"over the last {len(shares)} steps"
    return [f"{which} were cut off by the limit of {limit} tokens {when}."]


def _multiplier_verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Where lambda ended, and whether its upper bound held it: then the constraint was not enforced
    in full.
    """
    points = finite(points_of(rows, "multiplier_next")) or finite(points_of(rows, "multiplier"))
    if not points:
        return []
    bound = setting(config, "constraint", "multiplier_max") or math.inf
    capped = sum(value >= bound * (1 - 1e-6) for _, value in points)  # the run clips in float32
    said = [f"After the last update the multiplier is {points[-1][1]:.4g}."]
    if capped:
        said.append(
            f"It stood at its upper bound of {bound:g} after {capped} of {counted(len(points), 'step')}."
        )
    if saturated := rows[-1].get("saturated"):
        said.append(
            f"In the last {counted(saturated, 'step')} it was held there with delta above "
            "the tolerance: the constraint is not enforced in full."
        )
    return said


def _page(config: dict[str, Any], rows: list[dict[str, Any]], gaps: str) -> str:
    charts = "".join(chart(panel) for panel in panels(config, rows))
    body = f"""<p class="summary">{html.escape(_summary(config))}</p>
<p class="verdict">{html.escape(verdict(config, rows))}</p>
<div class="charts">{charts}</div>
{_table(rows)}
{gaps}
<p>{html.escape(_cost(rows))}</p>"""
    return page(str(config.get("name", "run")), body, config)


def page(title: str, body: str, config: dict[str, Any]) -> str:
    """A page that stands alone: `body` is HTML, under the title and over the resolved
    configuration.
    """
    name = html.escape(title)
    resolved = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{STYLE}</style></head><body><main>
<h1>{name}</h1>{body}
<details><summary>Resolved configuration</summary><pre>{resolved}</pre></details>
</main></body></html>
"""


STYLE = """
body{margin:0;background:#fff;color:#1e293b;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1000px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1rem;margin:0}
.summary{color:#475569;margin:.2rem 0 1rem}
.verdict{background:#f1f5f9;border-left:4px solid #334155;margin:0 0 1.5rem;padding:.7rem 1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.6rem 1.5rem}
figure{margin:0}svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-top:.25rem;font-size:.82rem;color:#475569}
.legend i{display:inline-block;width:1.2em;vertical-align:middle;margin-right:.35em}
.scroll{overflow-x:auto;margin-top:1.8rem}.scroll svg{min-width:640px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}td small{color:#64748b}
@media(max-width:560px){table{font-size:.82rem}th,td{padding:.35rem .3rem}td small{display:block}
th:first-child,td:first-child{white-space:normal}}
.section{margin-top:2rem}.note{color:#64748b;font-size:.88rem;margin:.2rem 0 .4rem}
.verdict p{margin:.25rem 0}.runs{list-style:none;padding:0;font-size:.92rem}.runs li{margin:.5rem 0}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:14rem;font-family:ui-monospace,monospace;font-size:.85rem}
td.setting{white-space:normal;overflow-wrap:anywhere;min-width:6rem;font-size:.88rem;vertical-align:top}
mark{background:#fed7aa;padding:0 .1em}.bar{width:30%;min-width:6rem}.bar i{display:block;height:.7em}
.note+.scroll,h2+.scroll{margin-top:.4rem}
details{margin-top:1.5rem}summary{cursor:pointer}
pre{background:#f8fafc;padding:1rem;overflow-x:auto;font-size:.82rem;line-height:1.4}
"""


def _summary(config: dict[str, Any]) -> str:
    """One line of the settings that tell runs apart; what the configuration lacks is left out."""
    parts = (
        ("{} steps", ("steps",)),
        ("{} engine", ("rollout", "precision", "weights")),
        ("{} prompts a step", ("data", "prompts_per_step")),
        ("{} samples a prompt", ("rollout", "samples")),
        ("up to {} tokens", ("rollout", "max_tokens")),
        ("learning rate {}", ("algorithm", "learning_rate")),
        ("tolerance {}", ("constraint", "tolerance")),
        ("dual learning rate {}", ("constraint", "dual_lr")),
        ("seed {}", ("seed",)),
    )
    found = [(text, setting(config, *names)) for text, names in parts]
    return " · ".join(text.format(value) for text, value in found if value is not None)


def _table(rows: list[dict[str, Any]]) -> str:
    """First, best and last value of each quantity, with the steps they belong to."""
    lines = []
    for quantity in quantities.QUANTITIES:
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


def _cost(rows: list[dict[str, Any]]) -> str:
    """Wall time and sampling speed, over the steps that have both."""
    pairs = [(row.get("seconds") or 0.0, row.get("tokens")) for row in rows]
    timed = [
        (seconds, tokens)
        for seconds, tokens in pairs
        if 0 < seconds < math.inf and files.matches(tokens, files.NUMBER)
    ]
    if not timed:
        return "No step was timed."
    seconds, tokens = (sum(column) for column in zip(*timed))
    typical = statistics.median(second for second, _ in timed)
    clock = (
        f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
    )
    return (
        f"{counted(len(timed), 'step')} took {clock} (median {typical:.3g} s); {tokens:,} tokens were sampled, "
        f"{tokens / seconds:,.0f} per second of the whole step."
    )


def load(workdir: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = pathlib.Path(workdir) / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    return read_record(path.parent), metrics.read(workdir)


def check_settings(config: dict[str, Any], workdir: str | os.PathLike) -> None:
    """Raises ValueError where a setting that sentences and curves are computed from is no number,
    or below 0."""
    place = str(pathlib.Path(workdir) / "config.json")
    for names in NUMBERS:
        name = ".".join(names)
        value = setting(config, *names)
        to_be_measured = name == "constraint.tolerance" and isinstance(value, dict)
        if value is None or to_be_measured:
            continue
        files.check_fields({name: value}, {name: files.NUMBER}, place)
        if value < 0:
            raise ValueError(
                f"{place} has {name!r} = {value}, which must not be negative; correct it"
            )


def setting(config: dict[str, Any], *names: str) -> Any:
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def tolerance_of(config: dict[str, Any]) -> float | None:
    found = setting(config, "constraint", "tolerance")
    return None if isinstance(found, dict) else found  # which the run is still to measure


def points_of(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every row, nan where the value is missing or no number."""
    values = [(row["step"], row.get(key)) for row in rows]
    return [
        (step, float(value) if isinstance(value, (int, float)) else math.nan)
        for step, value in values
    ]


def last_tenth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the last tenth of the steps, at least one if there is one."""
    return rows[-max(1, len(rows) // 10) :]


def trailing_window(rows: Sequence[Any]) -> int:
    """Returns over how many steps the mean of a noisy curve is taken."""
    return max(1, min(20, len(rows) // 10))


def smoothed(points: list[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Mean of the finite values of the last `window` points."""
    means = []
    for i, (step, _) in enumerate(points):
        near = [value for _, value in finite(points[max(0, i + 1 - window) : i + 1])]
        means.append((step, statistics.fmean(near) if near else math.nan))
    return means


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
