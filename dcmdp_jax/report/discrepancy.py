"""Where a run's trainer and engine disagree, as parts of its page: by position, by source, at the
worst tokens.

Each part shows a file of the run's folder, where it is there: `gaps.jsonl` of training,
`parity.json` of `dcmdp parity`, `diagnose.json` of `dcmdp diagnose`.
"""

from __future__ import annotations

import html
import os
import pathlib
from typing import Any

from dcmdp_jax import files, metrics
from dcmdp_jax.report import tables
from dcmdp_jax.report.line_chart import ENGINE, FAINT, NEUTRAL, Panel, Series, chart

TITLE = "Discrepancy by position in the completion"
GAP = {
    "tokens": files.INTEGER,
    "delta": files.NUMBER_OR_NULL,
    "logp_diff_mean": files.NUMBER_OR_NULL,
    "logp_diff_max": files.NUMBER_OR_NULL,
    "k3": files.NUMBER_OR_NULL,
}
DIAGNOSIS = {"weights": files.STRING, "noise_floor": files.NUMBER_OR_NULL, "sources": files.LIST}
ALONE = {"delta": files.NUMBER_OR_NULL, "std_error": files.NUMBER_OR_NULL}


def sections(workdir: str | os.PathLike) -> str:
    """All parts that the folder has something for, as HTML. Raises ValueError on a damaged file."""
    rows = metrics.read_gaps(workdir)
    parts = [
        _positions(rows),
        _parity_table(_read_parity(workdir)),
        source_table(read_diagnosis(workdir)),
        worst_tokens_table(rows[-1]) if rows else "",
    ]
    return "".join(parts)


def position_panel(curves: list[tuple[str, str, list[dict[str, Any]]]]) -> str:
    """Mean delta by bucket of positions, one curve for each (label, colour, `positions` of
    `gaps.record`).
    """
    ends = sorted(
        {(bucket["from"], bucket["to"]) for _, _, buckets in curves for bucket in buckets}
    )
    if not ends:
        return ""
    series = [
        Series(
            label,
            color,
            [(ends.index((bucket["from"], bucket["to"])), bucket["delta"]) for bucket in buckets],
            marked=True,
        )
        for label, color, buckets in curves
    ]
    names = tuple(f"{start}–{end - 1}" for start, end in ends)
    return chart(
        Panel(
            TITLE,
            "mean |π_train − π_infer|",
            series,
            names=names,
            axis="tokens before it in the completion",
        )
    )


def _positions(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    ends = [(NEUTRAL, rows[-1])] if len(rows) == 1 else [(FAINT, rows[0]), (NEUTRAL, rows[-1])]
    drawn = position_panel(
        [(f"step {row['step']}", color, row["positions"]) for color, row in ends]
    )
    return f'<div class="charts section">{drawn}</div>' if drawn else ""


def _parity_table(record: dict[str, Any] | None) -> str:
    """`parity.json`: the discrepancy by position in the sequence, prompt included."""
    if not record:
        return ""
    title = f"Discrepancy by position, prompt included ({record['weights']})"
    columns = ("delta", "logp_diff_mean", "logp_diff_max", "k3")
    return f'<h2 class="section">{html.escape(title)}</h2>' + tables.html_table(
        ["position", "tokens", "mean delta", "mean |Δ log π|", "largest", "k3"],
        [
            [name, f"{gap['tokens']:,}", *(_number(gap[column]) for column in columns)]
            for name, gap in record["positions"].items()
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
            _token_in_context(token),
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
        '<p class="note">The largest gap of each of the completions that have the largest ones; '
        "␣ is a space, ↵ a new line, #7 a token without text.</p>" + tables.html_table(header, rows)
    )


def _token_in_context(token: dict[str, Any]) -> tables.Cell:
    text = _visible(token["text"]) or f"#{token['token']:d}"
    before = _visible(token["before"])
    after = _visible(token["after"])
    return tables.Cell(f"{before}<mark>{text}</mark>{after}", "text")


def read_diagnosis(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """`diagnose.json` of the run, or None. Raises ValueError where it is damaged."""
    found = _read(workdir, "diagnose.json")
    place = str(pathlib.Path(workdir) / "diagnose.json")
    if found is None:
        return None
    files.check_fields(found, DIAGNOSIS, place)
    for effect in found["sources"]:
        files.check_fields(
            effect, {"source": files.STRING, "setting": files.STRING}, f"{place}: a source"
        )
        inside = f"{place}: source {effect['source']!r:.60}:"
        files.check_fields(effect.get("alone"), ALONE, f"{inside} 'alone'")
        if effect.get("left_out") is not None:
            files.check_fields(
                effect["left_out"], {"delta": files.NUMBER_OR_NULL}, f"{inside} 'left_out'"
            )
    return found


def _read_parity(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """`parity.json`, as `read_diagnosis` reads the other."""
    found = _read(workdir, "parity.json")
    place = str(pathlib.Path(workdir) / "parity.json")
    if found is None:
        return None
    files.check_fields(found, {"weights": files.STRING, "positions": files.OBJECT}, place)
    for name, gap in found["positions"].items():
        files.check_fields(gap, GAP, f"{place}: position {name!r:.60}")
    return found


def _read(workdir: str | os.PathLike, name: str) -> dict[str, Any] | None:
    path = pathlib.Path(workdir) / name
    if not path.is_file():
        return None
    try:
        return files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or write it again") from None


def _visible(text: str) -> str:
    return html.escape(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def _number(value: float | None) -> str:
    return tables.MISSING if value is None else f"{value:.2g}"
