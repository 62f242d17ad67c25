"""A diagnosis in words, as tables and as a page: what `dcmdp doctor` shows."""

from __future__ import annotations

import html
import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.report import discrepancy, html_page, tables
from dcmdp_jax.report.line_chart import ENGINE, FAINT, NEUTRAL
from dcmdp_jax.tools.doctor import CORRECTIONS, Diagnosis, Figures
from dcmdp_jax.tools.parity import GapStatistics

READINGS = 8  # of those tried that are shown
COMPARE = (
    "For comparison: DC-GRPO's tolerances are 0.0037 and 0.0050 (bfloat16 engines, 8B and 30B); "
    "on a model of 113 thousand parameters vLLM had a mean delta of 3.96e-4 in bfloat16 and of "
    "3.17e-8 in float32, and on SmolLM2-135M at temperature 0.7 of 0.0093 in bfloat16 "
    "(docs/doctor.md)."
)
METHOD = (
    "Delta is |π_train − π_infer| of a sampled token, |Δ log π| the difference of its log-probs, "
    "k3 an estimate of KL(engine || trainer). The trainer is the model folder, scored in one "
    "forward pass."
)
HEADER = ("tokens", "mean delta", "mean |dlogp|", "max |dlogp|", "k3", "outside 0.8..1.2")


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """Returns the verdict, its remedy, and what it rests on."""
    verdict = diagnosis.verdict
    lines = [
        f"Verdict: {verdict.name}",
        f"{capital(verdict.sentence)}.",
        f"Remedy: {verdict.remedy}." if verdict.remedy else "",
        f"Completions that differ from most, by number: {', '.join(map(str, diagnosis.odd))}."
        if diagnosis.odd
        else "",
        f"Decided on {verdict.tokens:,} tokens; {len(verdict.tried)} readings were tried.",
    ]
    return [line for line in lines if line]


def gap_lines(diagnosis: Diagnosis) -> list[str]:
    """Returns the size of the gap, and the tolerance that it calls for, in sentences."""
    figures = shown(diagnosis)
    lines = []
    if figures.calibration is not None:
        floor, error, tolerance, _ = map(float, figures.calibration)
        calls_for = (
            f"and calls for a tolerance of {tolerance:.3g}"
            if diagnosis.verdict.is_explained
            else "and no tolerance is suggested for a gap that is not explained"
        )
        lines.append(
            f"Mean delta{_once_read(diagnosis)} is {floor:.3g} ± {error:.1g} over "
            f"{diagnosis.completions:,} completions, {calls_for}."
        )
        lines.append(COMPARE)
    if figures.dropped:
        lines.append(f"{figures.dropped:,} tokens have no log-prob and are in no figure.")
    if diagnosis.recorded_trainer:
        engine, model = diagnosis.recorded_trainer
        lines.append(
            f"The trainer that wrote the file is {engine:.2g} nats from the engine and {model:.2g} "
            "from this model folder, in the mean of |dlogp|."
        )
    return lines


def shown(diagnosis: Diagnosis) -> Figures:
    """Returns the figures that the tables show: those of the reading that is left."""
    return diagnosis.read or diagnosis.stated


def text(diagnosis: Diagnosis) -> str:
    """Returns all of it for a terminal."""
    figures = shown(diagnosis)
    title = f"The gap{_once_read(diagnosis)}"
    parts = [
        "\n".join(verdict_lines(diagnosis)),
        "\n".join(gap_lines(diagnosis)),
        f"{title}, by length of context, prompt included\n"
        + tables.aligned_text([("context", *HEADER), *_rows(figures.by_context)]),
        f"{title}, by the engine's probability of the token\n"
        + tables.aligned_text([("probability", *HEADER), *_rows(figures.by_probability)]),
        "What corrections would do\n"
        + tables.aligned_text([_correction_header(diagnosis), *_corrections(diagnosis)], left=2),
    ]
    if figures.gaps["worst"]:
        parts.append(
            "Tokens with the largest delta, one of a completion\n"
            + tables.aligned_text([_WORST_HEADER, *map(_worst_row, figures.gaps["worst"])], left=1)
        )
    return "\n\n".join(parts)


def write(diagnosis: Diagnosis, settings: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Writes the page and returns its path; `settings` are shown at its end."""
    figures = shown(diagnosis)
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in gap_lines(diagnosis))
    curves = [("as stated", NEUTRAL, diagnosis.stated.gaps["positions"])]
    if diagnosis.read:
        curves[0] = ("as stated", FAINT, diagnosis.stated.gaps["positions"])
        curves.append((diagnosis.verdict.name, ENGINE, diagnosis.read.gaps["positions"]))
    title = f"The gap{_once_read(diagnosis)}"
    body = "".join(
        [
            f'<p class="summary">{html.escape(" · ".join(map(str, settings.values())))}</p>'
            f"{html_page.verdict(verdict_lines(diagnosis), [])}{notes}",
            f'<div class="charts section">{discrepancy.position_panel(curves)}</div>',
            _section(f"{title}, by length of context, prompt included"),
            tables.html_table(["context", *HEADER], _rows(figures.by_context)),
            _section(f"{title}, by the engine's probability of the token"),
            tables.html_table(["probability", *HEADER], _rows(figures.by_probability)),
            _section("What corrections would do"),
            tables.html_table(_correction_header(diagnosis), _corrections(diagnosis)),
            _worst(figures),
            _readings(diagnosis),
            f"<p>{html.escape(METHOD)}</p>",
        ]
    )
    files.write_atomic(path, html_page.page("Engine against trainer", body, settings))
    return path


def capital(sentence: str) -> str:
    """Returns the sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def _once_read(diagnosis: Diagnosis) -> str:
    return " once that is fixed" if diagnosis.read else ""


def _section(title: str) -> str:
    return f'<h2 class="section">{html.escape(title)}</h2>'


def _rows(gaps: dict[str, GapStatistics]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{gap.tokens:,}",
            f"{gap.delta:.2e}",
            f"{gap.logp_diff_mean:.2e}",
            f"{gap.logp_diff_max:.2e}",
            f"{gap.k3:.2e}",
            f"{gap.clipped:.2%}",
        )
        for name, gap in gaps.items()
    ]


def _correction_header(diagnosis: Diagnosis) -> tuple[str, ...]:
    columns = ("as stated", "once fixed") if diagnosis.read else ("share",)
    return ("correction", "what", *columns)


def _corrections(diagnosis: Diagnosis) -> list[tuple[str, ...]]:
    figures = [diagnosis.stated, *([diagnosis.read] if diagnosis.read else [])]
    return [
        (name, what, *(f"{each.corrected[i]:.2%}" for each in figures))
        for i, (name, what, _) in enumerate(CORRECTIONS)
    ]


_WORST_HEADER = ("token in its completion", "position", "p train", "p engine", "delta")


def _worst_row(token: dict[str, Any]) -> tuple[str, ...]:
    before = token["before"][-24:]
    context = f"{before}[{token['text']}]{token['after'][:12]}"
    shown_text = context.replace("\n", "↵").replace("\t", "⇥")
    return (
        shown_text,
        f"{token['position']:d}",
        f"{token['pi_train']:.3f}",
        f"{token['pi_infer']:.3f}",
        f"{token['delta']:.3f}",
    )


def _worst(figures: Figures) -> str:
    if not figures.gaps["worst"]:
        return ""
    rows = [
        [discrepancy.token_in_context(token), *_worst_row(token)[1:]]
        for token in figures.gaps["worst"]
    ]
    return _section("Tokens with the largest delta") + tables.html_table(list(_WORST_HEADER), rows)


def _readings(diagnosis: Diagnosis) -> str:
    """The readings that were tried, the nearest first."""
    least: dict[str, float] = {}
    for tried in diagnosis.verdict.tried:
        least.setdefault(tried.reading.name, tried.error)
    nearest = list(least.items())[:READINGS]
    if "as stated" not in dict(nearest):
        nearest.append(("as stated", least["as stated"]))
    largest = max(error for _, error in nearest) or 1.0
    rows = [
        [
            name,
            tables.bar(min(error / largest, 1.0), ENGINE if name != "as stated" else FAINT),
            f"{error:.2g}",
        ]
        for name, error in nearest
    ]
    return _section("Readings that were tried, the nearest first") + tables.html_table(
        ["reading", "", "mean |difference|, nats"], rows
    )
