"""Parts of a page: where trainer and engine disagree, by position, by source, at the worst tokens.

Each part shows a file of the run's folder: `gaps.jsonl` of training, `parity.json` of `dcmdp
parity`, `diagnose.json` of `dcmdp diagnose`.
"""

from __future__ import annotations

import html
import os
import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.monitoring import metrics, quantities
from dcmdp_jax.report import tables
from dcmdp_jax.report.line_chart import ENGINE, FAINT, NEUTRAL, Panel, Series, chart

# the fields of `parity.json` and `diagnose.json` that are shown
PARITY = {"weights": files.STRING, "context": files.OBJECT}
GAP = {
    "tokens": files.INTEGER,
    "delta": files.NUMBER_OR_NULL,
    "logp_diff_mean": files.NUMBER_OR_NULL,
    "logp_diff_max": files.NUMBER_OR_NULL,
    "k3": files.NUMBER_OR_NULL,
}
DIAGNOSIS = {"weights": files.STRING, "noise_floor": files.NUMBER_OR_NULL, "sources": files.LIST}
SOURCE = {"source": files.STRING, "setting": files.STRING}
ALONE = {"delta": files.NUMBER_OR_NULL, "std_error": files.NUMBER_OR_NULL}
LEFT_OUT = {"delta": files.NUMBER_OR_NULL}


def sections(workdir: str | os.PathLike) -> str:
    """Returns all parts whose file the folder has, as HTML.

    Raises ValueError if a file is damaged.
    """
    rows = metrics.read_gaps(workdir)
    parts = [
        _positions(rows),
        _parity_table(_read_parity(workdir)),
        source_table(read_diagnosis(workdir)),
        worst_tokens_table(rows[-1]) if rows else "",
    ]
    return "".join(parts)


def position_panel(curves: list[tuple[str, str, list[dict[str, Any]]]]) -> str:
    """Draws mean delta by bucket of positions, a curve for each (label, colour, `positions` of
    `gaps.record`).
    """
    buckets = {(bucket["from"], bucket["to"]) for _, _, positions in curves for bucket in positions}
    if not buckets:
        return ""
    order = sorted(buckets)
    series = []
    for label, color, positions in curves:
        points = [
            (order.index((bucket["from"], bucket["to"])), bucket["delta"]) for bucket in positions
        ]
        series.append(Series(label, color, points, marked=True))
    return chart(
        Panel(
            "Discrepancy by position in the completion",
            quantities.get("delta_mean").unit,
            series,
            names=tuple(
                f"{start}–{end - 1}" if end - start > 1 else str(start) for start, end in order
            ),
            axis="tokens before it in the completion",
            format=quantities.get("delta_mean").format,
        )
    )


def _positions(rows: list[dict[str, Any]]) -> str:
    """Draws the first and the last row of `gaps.jsonl`."""
    if not rows:
        return ""
    shown = [(NEUTRAL, rows[-1])]
    if len(rows) > 1:
        shown.insert(0, (FAINT, rows[0]))
    panel = position_panel(
        [(f"step {row['step']}", color, row["positions"]) for color, row in shown]
    )
    return f'<div class="charts section">{panel}</div>' if panel else ""


def _parity_table(record: dict[str, Any] | None) -> str:
    """`parity.json`: the discrepancy by length of the context, prompt included."""
    if not record:
        return ""
    title = f"Discrepancy by length of context, prompt included ({record['weights']})"
    columns = ("delta", "logp_diff_mean", "logp_diff_max", "k3")
    return f'<h2 class="section">{html.escape(title)}</h2>' + tables.html_table(
        ["context", "tokens", "mean delta", "mean |Δ log π|", "largest", "k3"],
        [
            [name, f"{gap['tokens']:,}", *(_number(gap[column]) for column in columns)]
            for name, gap in record["context"].items()
        ],
    )


def source_table(record: dict[str, Any] | None) -> str:
    """`diagnose.json`: the discrepancy of each property of the engine alone, as bars."""
    if not record or not record["sources"]:
        return ""
    largest = max(effect["alone"]["delta"] or 0.0 for effect in record["sources"]) or 1.0
    rows = []
    for effect in record["sources"]:
        alone = effect["alone"]
        left_out = effect.get("left_out")
        rows.append(
            [
                tables.with_note(effect["source"], effect["setting"]),
                tables.bar((alone["delta"] or 0.0) / largest, ENGINE if left_out else FAINT),
                f"{_number(alone['delta'])} ± {_number(alone['std_error'])}",
                _number(left_out["delta"]) if left_out else tables.MISSING,
            ]
        )
    note = (
        "Mean delta with this property of the engine alone, and what is left without it "
        f"({record['weights']}; noise floor {_number(record['noise_floor'])})."
    )
    return (
        '<h2 class="section">Discrepancy by source</h2>'
        f'<p class="note">{html.escape(note)}</p>'
        + tables.html_table(["source", "", "alone", "without"], rows)
    )


def worst_tokens_table(row: dict[str, Any]) -> str:
    """The tokens of a step with the largest discrepancy, in their context."""
    if not row["worst"]:
        return ""
    rows = [
        [
            token_in_context(token),
            f"{token['position']:d}",
            f"{token['pi_train']:.3f}",
            f"{token['pi_infer']:.3f}",
            f"{token['delta']:.3f}",
            f"{token['reward']:g}",
        ]
        for token in row["worst"]
    ]
    header = ["token in its completion", "position", "π train", "π infer", "delta", "reward"]
    return (
        f'<h2 class="section">Worst tokens of step {row["step"]:d}</h2>'
        '<p class="note">The token with the largest gap of each completion, for the completions '
        "with the largest gaps; ␣ is a space, ↵ a new line, � a token that is no character, "
        "#7 one without text.</p>" + tables.html_table(header, rows)
    )


def token_in_context(token: dict[str, Any]) -> tables.Cell:
    """Returns a token of `gaps.record`, marked, between the texts before and after it."""
    text = _visible(token["text"]) or f"#{token['token']:d}"
    before = _visible(token["before"])
    after = _visible(token["after"])
    return tables.Cell(f"{before}<mark>{text}</mark>{after}", "text")


def read_diagnosis(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the run's `diagnose.json`; None if there is none.

    Raises ValueError if it is damaged.
    """
    record = _read(workdir, "diagnose.json")
    if record is None:
        return None
    place = str(pathlib.Path(workdir) / "diagnose.json")
    files.check_fields(record, DIAGNOSIS, place)
    for effect in record["sources"]:
        files.check_fields(effect, SOURCE, f"{place}: a source")
        source = f"{place}: source {effect['source']!r:.60}:"
        files.check_fields(effect.get("alone"), ALONE, f"{source} 'alone'")
        if effect.get("left_out") is not None:
            files.check_fields(effect["left_out"], LEFT_OUT, f"{source} 'left_out'")
    return record


def _read_parity(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the run's `parity.json`, as `read_diagnosis` does the other."""
    record = _read(workdir, "parity.json")
    if record is None:
        return None
    place = str(pathlib.Path(workdir) / "parity.json")
    files.check_fields(record, PARITY, place)
    for name, gap in record["context"].items():
        files.check_fields(gap, GAP, f"{place}: context {name!r:.60}")
    return record


def _read(workdir: str | os.PathLike, name: str) -> dict[str, Any] | None:
    path = pathlib.Path(workdir) / name
    if not path.is_file():
        return None
    try:
        return files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or write it again") from None


def _visible(text: str) -> str:
    """Returns a token's text, escaped, with signs for its blanks."""
    signs = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return html.escape(tables.visible(signs))


def _number(value: float | None) -> str:
    return tables.MISSING if value is None else f"{value:.2g}"
