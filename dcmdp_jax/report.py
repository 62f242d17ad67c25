"""A run at a glance: `report.html` of its folder.

The page is one file without scripts or links: a verdict computed from the rows, the curves as inline SVG, a table, and
the resolved configuration. It reads `metrics.jsonl` and `config.json`, so it works on a run that is unfinished too.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from dcmdp_jax import metrics

ENGINE, TRAINER = "#d55e00", "#0072b2"  # the two policies, told apart by the colour-blind too
NEUTRAL, FAINT, INSIDE = "#334155", "#cbd5e1", "#009e73"


class Series(NamedTuple):
    label: str
    color: str
    points: list[tuple[int, float]]  # (step, value); a value that is not finite breaks the line
    width: float = 2.0
    marked: bool = False  # a dot on each point


class Panel(NamedTuple):
    title: str
    unit: str
    series: list[Series]
    tolerance: float | None = None  # drawn as a line, the region below it shaded


class Measure(NamedTuple):
    """A row of the table: which way is better, if either is."""

    key: str
    label: str
    best: Callable[..., Any] | None


MEASURES = (
    Measure("reward_eval_infer", "held-out reward, engine", max),
    Measure("reward_eval_train", "held-out reward, trainer", max),
    Measure("reward", "training reward", max),
    Measure("delta_mean", "mean delta", min),
    Measure("multiplier", "multiplier (lambda)", None),
    Measure("entropy", "entropy, nats per token", None),
    Measure("k3", "KL(engine ‖ trainer), nats per token", min),
    Measure("response_length", "response length, tokens", None),
    Measure("grad_norm", "gradient norm", None),
)


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into the run's folder and returns its path.

    Raises ValueError where the folder is no run's: no `config.json` or no `metrics.jsonl`.
    """
    config, rows = _load(workdir)
    path = pathlib.Path(workdir) / "report.html"
    path.write_text(_page(config, rows), encoding="utf-8")
    return path


def panels(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[Panel]:
    """The curves of a run; a panel without a single finite value is left out."""
    window = max(1, min(20, len(rows) // 10))
    reward = _points(rows, "reward")
    training = [Series("training batch", FAINT if window > 1 else NEUTRAL, reward, width=1.2)]
    if window > 1:
        training.append(Series(f"training, mean of {window} steps", NEUTRAL, _smoothed(reward, window)))
    # The trainer's line is the wider one, below: where the two policies agree both are seen.
    held_out = [Series("held-out, trainer", TRAINER, _finite(_points(rows, "reward_eval_train")), 3.6, True),
                Series("held-out, engine", ENGINE, _finite(_points(rows, "reward_eval_infer")), 1.6, True)]
    shown = [Panel("Reward", "mean reward", training + held_out),
             Panel("Discrepancy of probabilities", "mean |π_train − π_infer|", _curve(rows, "delta_mean", "mean delta"),
                   _tolerance(config)),
             Panel("Multiplier", "λ, advantage per unit of delta", _curve(rows, "multiplier", "lambda")),
             Panel("Entropy", "nats per token", _curve(rows, "entropy", "entropy")),
             Panel("KL(engine ‖ trainer)", "k3 estimate, nats per token", _curve(rows, "k3", "k3")),
             Panel("Response length", "tokens", _curve(rows, "response_length", "length"))]
    shown = [panel._replace(series=[s for s in panel.series if _finite(s.points)]) for panel in shown]
    return [panel for panel in shown if panel.series]


def verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What happened, in sentences computed from the rows."""
    if not rows:
        return "No step was finished."
    last, total = rows[-1]["step"], config.get("steps", rows[-1]["step"])
    said = [f"The run stopped at step {last} of {total}."] if last < total else []
    said += _reward_verdict(config, rows)
    tail = _finite(_points(rows[-max(1, len(rows) // 10):], "delta_mean"))
    tolerance, delta = _tolerance(config), [value for _, value in _finite(_points(rows, "delta_mean"))]
    if tail and tolerance is not None:
        mean, inside = statistics.fmean(value for _, value in tail), sum(value <= tolerance for value in delta)
        place = "within" if mean <= tolerance else "above"
        when = "at the last step" if len(tail) == 1 else f"over the last {len(tail)} steps"
        said.append(f"Mean delta was {mean:.4g} {when}, {place} the tolerance of {tolerance:g}; "
                    f"{inside} of {_count(len(delta), 'step')} ({inside / len(delta):.0%}) lay inside it.")
    said += _multiplier_verdict(config, rows)
    if skipped := rows[-1].get("skipped"):
        said.append(f"{_count(skipped, 'update')} left out because the gradient was not finite.")
    return " ".join(said)


def _reward_verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """One sentence on each policy's held-out reward, or on the training reward where nothing was held out."""
    said, prompts = [], _get(config, "eval", "prompts")
    # For rewards in [0, 1] the standard error of a mean over n prompts is at most 0.5 / sqrt(n), and sqrt(2) times that
    # for a difference; a change below two of them is called noise.
    noise = 2 * math.sqrt(2) * 0.5 / math.sqrt(prompts) if prompts else 0.0
    for key, owner in (("reward_eval_infer", "engine"), ("reward_eval_train", "trainer")):
        points = _finite(_points(rows, key))
        if len(points) == 1:
            said.append(f"Held-out reward of the {owner}'s policy was {points[0][1]:.3f} at step {points[0][0]}.")
        elif points:
            (first, start), (last, end) = points[0], points[-1]
            verb = "rose" if end > start else "fell"
            change = f"{verb} from" if abs(end - start) > noise else "stayed within sampling noise, from"
            said.append(f"Held-out reward of the {owner}'s policy {change} {start:.3f} (step {first}) to {end:.3f} "
                        f"(step {last}).")
    training = _finite(_points(rows, "reward"))
    if not said and training:
        said.append(f"Nothing was held out; the training reward went from {training[0][1]:.3f} to "
                    f"{training[-1][1]:.3f}.")
    return said


def _multiplier_verdict(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Where lambda ended, and whether its upper bound held it: then the constraint was not enforced in full."""
    points = _finite(_points(rows, "multiplier_next")) or _finite(_points(rows, "multiplier"))
    if not points:
        return []
    bound = _get(config, "constraint", "multiplier_max") or math.inf
    capped = sum(value >= bound * (1 - 1e-6) for _, value in points)  # the run clips in float32
    said = [f"After the last update the multiplier is {points[-1][1]:.4g}."]
    if capped:
        said.append(f"It stood at its upper bound of {bound:g} after {capped} of {_count(len(points), 'step')}.")
    return said


def _page(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    charts = "".join(_chart(panel) for panel in panels(config, rows))
    body = f"""<p class="summary">{html.escape(_summary(config))}</p>
<p class="verdict">{html.escape(verdict(config, rows))}</p>
<div class="charts">{charts}</div>
{_table(rows)}
<p>{html.escape(_cost(rows))}</p>"""
    return page(str(config.get("name", "run")), body, config)


def page(title: str, body: str, config: dict[str, Any]) -> str:
    """A page that stands alone: `body` is HTML, under the title and over the resolved configuration."""
    name, resolved = html.escape(title), html.escape(json.dumps(config, indent=2, ensure_ascii=False))
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
details{margin-top:1.5rem}summary{cursor:pointer}
pre{background:#f8fafc;padding:1rem;overflow-x:auto;font-size:.82rem;line-height:1.4}
"""


def _summary(config: dict[str, Any]) -> str:
    """One line of the settings that tell runs apart; what the configuration lacks is left out."""
    parts = (("{} steps", ("steps",)), ("{} engine", ("rollout", "precision", "weights")),
             ("{} prompts a step", ("data", "prompts_per_step")), ("{} samples a prompt", ("rollout", "samples")),
             ("up to {} tokens", ("rollout", "max_tokens")), ("learning rate {}", ("algorithm", "learning_rate")),
             ("tolerance {}", ("constraint", "tolerance")), ("dual learning rate {}", ("constraint", "dual_lr")),
             ("seed {}", ("seed",)))
    found = [(text, _get(config, *names)) for text, names in parts]
    return " · ".join(text.format(value) for text, value in found if value is not None)


def _table(rows: list[dict[str, Any]]) -> str:
    """First, best and last value of each measure, with the steps they belong to."""
    def cell(point: tuple[int, float] | None) -> str:
        return "<td>–</td>" if point is None else f"<td>{point[1]:.4g} <small>at {point[0]}</small></td>"

    lines = []
    for key, label, best in MEASURES:
        if points := _finite(_points(rows, key)):
            chosen = best(points, key=lambda point: point[1]) if best else None
            lines.append(f"<tr><td>{label}</td>{cell(points[0])}{cell(chosen)}{cell(points[-1])}</tr>")
    if not lines:
        return ""
    head = "<tr><th>quantity</th><th>first</th><th>best</th><th>last</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cost(rows: list[dict[str, Any]]) -> str:
    """Wall time and sampling speed, over the steps that have both."""
    timed = [(row["seconds"], row["tokens"]) for row in rows if row.get("seconds") and row.get("tokens") is not None]
    if not timed:
        return "No step was timed."
    seconds, tokens = (sum(column) for column in zip(*timed))
    typical = statistics.median(second for second, _ in timed)
    clock = f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return (f"{_count(len(timed), 'step')} took {clock} (median {typical:.3g} s); {tokens:,} tokens were sampled, "
            f"{tokens / seconds:,.0f} per second of the whole step.")


# The charts, as SVG in units of a 440 x 250 box.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 52, 14, 26, 36


def _chart(panel: Panel) -> str:
    steps = [step for series in panel.series for step, _ in series.points]
    left, right, ticks, tolerance = min(steps), max(steps), _value_ticks(panel), panel.tolerance
    bottom, top = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - left) / (right - left) if right > left else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - bottom) / (top - bottom)

    marks = [_band(tolerance, top, y)] if tolerance is not None else []
    marks += [f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>'
              f'<text x="{LEFT - 7}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in ticks]
    marks += [f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{s:g}</text>'
              for s in _step_ticks(left, right)]
    marks += [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>',
              f'<text x="0" y="13">{html.escape(panel.unit)}</text>']
    marks += [_line(series, x, y) for series in panel.series]
    title = html.escape(panel.title)
    return (f'<figure><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
            f'font-size="12" fill="#475569">{"".join(marks)}</svg>{_legend(panel)}</figure>')


def _band(tolerance: float, top: float, y: Callable[[float], float]) -> str:
    edge = min(tolerance, top)
    band = (f'<rect x="{LEFT}" y="{y(edge):.1f}" width="{WIDTH - LEFT - RIGHT}" height="{y(0) - y(edge):.1f}" '
            f'fill="{INSIDE}" fill-opacity="0.12"/>')
    line = (f'<path d="M{LEFT} {y(edge):.1f}H{WIDTH - RIGHT}" stroke="{INSIDE}" stroke-width="1.6" '
            f'stroke-dasharray="6 4"/>')
    return band + (line if tolerance <= top else "")


def _line(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The curve in pieces between gaps; a piece of one point is a dot."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for point in series.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    drawn = ["M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in piece) for piece in pieces if len(piece) > 1]
    dots = [point for piece in pieces if series.marked or len(piece) == 1 for point in piece]
    line = (f'<path d="{"".join(drawn)}" fill="none" stroke="{series.color}" stroke-width="{series.width}" '
            f'stroke-linejoin="round"/>') if drawn else ""
    radius = 1.5 + series.width / 2
    return line + "".join(
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="{radius}" fill="{series.color}"/>' for s, v in dots)


def _legend(panel: Panel) -> str:
    entries = [(series.label, series.color, series.width, "solid") for series in panel.series]
    if panel.tolerance is not None:
        entries.append((f"tolerance {panel.tolerance:g}, inside shaded", INSIDE, 2.0, "dashed"))
    if len(entries) == 1:
        return ""
    return '<div class="legend">' + "".join(
        f'<span><i style="border-top:{width}px {line} {color}"></i>{html.escape(label)}</span>'
        for label, color, width, line in entries) + "</div>"


def _value_ticks(panel: Panel) -> list[float]:
    """Round numbers, about five, that enclose zero, the values and, where it is not far above them, the tolerance."""
    values = [value for series in panel.series for _, value in _finite(series.points)]
    low, high = min(0.0, *values), max(0.0, *values)
    if panel.tolerance is not None and (panel.tolerance <= 3 * high or high == 0):  # further up it flattens the curve
        high = max(high, 1.1 * panel.tolerance)
    high = high if high > low else low + 1.0
    step = round_step((high - low) / 5)
    # Ten digits, not a number of decimals: the values of an exact engine are as small as 1e-14.
    return [float(f"{k * step:.10g}") for k in range(math.floor(low / step), math.ceil(round(high / step, 6)) + 1)]


def _step_ticks(first: int, last: int) -> list[int]:
    """Round step numbers within first..last; all of them where they are few."""
    gap = max(1, int(round_step((last - first) / 8))) if last > first else 1
    return [step for step in range(first, last + 1) if step % gap == 0]


def round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _load(workdir: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    return json.loads(path.read_text(encoding="utf-8")), metrics.read(workdir)


def _get(config: dict[str, Any], *names: str) -> Any:
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _tolerance(config: dict[str, Any]) -> float | None:
    found = _get(config, "constraint", "tolerance")
    return None if isinstance(found, dict) else found  # which the run is still to measure


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every row, nan where the value is missing or no number."""
    values = [(row["step"], row.get(key)) for row in rows]
    return [(step, float(value) if isinstance(value, (int, float)) else math.nan) for step, value in values]


def _curve(rows: list[dict[str, Any]], key: str, label: str) -> list[Series]:
    return [Series(label, NEUTRAL, _points(rows, key))]


def _finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _smoothed(points: list[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Mean of the finite values of the last `window` points."""
    means = []
    for i, (step, _) in enumerate(points):
        near = [value for _, value in _finite(points[max(0, i + 1 - window):i + 1])]
        means.append((step, statistics.fmean(near) if near else math.nan))
    return means


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
