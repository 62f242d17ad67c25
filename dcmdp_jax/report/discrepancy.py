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
        _parity(_read_parity(workdir)),
        sources(read_diagnosis(workdir)),
        worst(rows[-1]) if rows else "",
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


def _parity(found: dict[str, Any] | None) -> str:
    """`parity.json`: by position in the sequence, prompt included."""
    if not found:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{gap['tokens']:,}</td>"
        + "".join(
            f"<td>{_number(gap[key])}</td>"
            for key in ("delta", "logp_diff_mean", "logp_diff_max", "k3")
        )
        + "</tr>"
        for name, gap in found["positions"].items()
    )
    return (
        f'<h2 class="section">Discrepancy by position, prompt included ({html.escape(str(found["weights"]))})</h2>'
        '<div class="scroll"><table><thead><tr><th>position</th><th>tokens</th><th>mean delta</th>'
        f"<th>mean |Δ log π|</th><th>largest</th><th>k3</th></tr></thead><tbody>{cells}</tbody></table></div>"
    )


def sources(found: dict[str, Any] | None, of: str = "") -> str:
    """`diagnose.json`: each property of the engine alone, as bars."""
    if not found or not found["sources"]:
        return ""
    top = max(effect["alone"]["delta"] or 0.0 for effect in found["sources"]) or 1.0
    rows = "".join(
        f"<tr><td>{html.escape(effect['source'])} <small>{html.escape(effect['setting'])}</small></td>"
        f'<td class="bar"><i style="width:{100 * (effect["alone"]["delta"] or 0.0) / top:.1f}%;'
        f'background:{ENGINE if effect.get("left_out") else FAINT}"></i></td>'
        f"<td>{_number(effect['alone']['delta'])} ± {_number(effect['alone']['std_error'])}</td>"
        f"<td>{_number(effect['left_out']['delta']) if effect.get('left_out') else '–'}</td></tr>"
        for effect in found["sources"]
    )
    return (
        f'<h2 class="section">Discrepancy by source{html.escape(of)}</h2><p class="note">Mean delta with this property '
        f"of the engine alone, and what is left without it ({html.escape(str(found['weights']))}; noise floor "
        f"{_number(found['noise_floor'])}).</p>"
        '<div class="scroll"><table><thead><tr><th>source</th><th></th><th>alone</th><th>without</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def worst(row: dict[str, Any], of: str = "") -> str:
    """The worst tokens of a step in their context."""
    if not row["worst"]:
        return ""
    lines = "".join(
        f'<tr><td class="text">{_visible(token["before"])}<mark>{_visible(token["text"]) or "#%d" % token["token"]}</mark>'
        f"{_visible(token['after'])}</td><td>{token['position']:d}</td>"
        f"<td>{token['pi_train']:.3f}</td>"
        f"<td>{token['pi_infer']:.3f}</td><td>{token['delta']:.3f}</td><td>{token['reward']:g}</td></tr>"
        for token in row["worst"]
    )
    return (
        f'<h2 class="section">Worst tokens of step {row["step"]:d}{html.escape(of)}</h2>'
        '<p class="note">The largest gap of each of the completions that have the largest ones; ␣ is a space, ↵ a new '
        "line, #7 a token without text.</p>"
        '<div class="scroll"><table><thead><tr><th>token in its completion</th><th>position</th><th>π train</th>'
        f"<th>π infer</th><th>delta</th><th>reward</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )


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
    return "–" if value is None else f"{value:.2g}"
