"""An attribution in words, as a table, as a picture and as a page: what `dcmdp diagnose` shows."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.batches import sampling
from dcmdp_jax.config import Config
from dcmdp_jax.report import bar_chart, html_page, line_chart, tables
from dcmdp_jax.run.record import to_json
from dcmdp_jax.tools import parity
from dcmdp_jax.tools.diagnose import Attribution, Difference, Source, noise_floor

TRUSTED_REPLAY = 1e-5  # nats between what the engine reported and its replay
LEGEND = (
    "Orange: part of the engine. Blue: probes and staleness, which are not. Whisker: ± a standard "
    "error.",
    "Ring: the configured engine without that source. Shaded: the noise floor.",
)
METHOD = (
    "Delta is |π_train − π_infer| of a sampled token. Alone: the trainer against an engine that "
    "has this property and is exact otherwise; without: against the configured engine with this "
    "property made exact. All engines decode the same tokens, so the figures are paired; effects "
    "interact, and their shares need not add up. ± is a standard error over prompts. Clipped: "
    f"tokens whose probability ratio lies outside 1 ± {parity.CLIP} before any update."
)


def verdict(attribution: Attribution) -> str:
    """Returns the largest source of the gap, in sentences."""
    total = attribution.total.delta
    noise = noise_floor(attribution)
    measured = (
        f"Mean delta is {total:.2g} over {attribution.tokens:,} tokens; the noise floor is "
        f"{noise:.1g}."
    )
    if total <= 2 * noise:
        return f"{measured} The engine is exact up to the noise."
    first = next((source for source in attribution.sources if source.left_out), None)
    if first is None:
        return f"{measured} No property of the engine that can be switched explains it."
    return (
        f"{measured} The largest source is {first.name} ({first.setting}): alone it gives "
        f"{first.alone.delta:.2g} ({first.alone.delta / total:.0%}), and with it exact "
        f"{first.left_out.delta:.2g} is left."
    )


def notes(attribution: Attribution) -> list[str]:
    """Returns what the attribution leaves out, and how far its replay can be trusted."""
    names = {source.name for source in attribution.sources}
    error = attribution.replay_error
    trust = "." if error <= TRUSTED_REPLAY else ": smaller differences are not to be trusted."
    staleness = "Staleness is left out: there is no older checkpoint."
    if "staleness" in names:
        staleness = (
            "Staleness is no part of the total: delta is measured at the weights that sampled."
        )
    support = "The support is left out: every token can be drawn (top_k 0, top_p 1, min_p 0)."
    if "support" in names:
        support = (
            "The support is a part of the total here alone: a run and parity measure delta before "
            "the cut."
        )
    replayed = f"The replay repeats what the engine reported to within {error:.1g} nats{trust}"
    return [replayed, staleness, support]


def table(attribution: Attribution) -> list[tuple[str, ...]]:
    """Returns the figures as rows of text, the header first."""
    header = (
        "source",
        "setting",
        "delta alone",
        "share",
        "delta without",
        "mean |dlogp|",
        "max |dlogp|",
        "clipped",
    )
    total = attribution.total
    rows = [_row(Source("total", "as configured", total), total.delta)]
    for source in attribution.sources:
        rows.append(_row(source, total.delta if source.left_out else 0.0))
    for i, layer in enumerate(attribution.layers):
        rows.append(_row(Source(f"weights of layer {i}", attribution.layer_setting, layer)))
    rows += [_row(source) for source in attribution.noise]
    return [header, *rows]


def _row(source: Source, total: float = 0.0) -> tuple[str, ...]:
    """Returns a row of `table`; its share of `total` is empty if that is 0."""
    gap = source.alone
    return (
        source.name,
        source.setting,
        f"{gap.delta:.1e} ± {gap.std_error:.0e}",
        f"{gap.delta / total:.1%}" if total else "",
        f"{source.left_out.delta:.1e}" if source.left_out else "",
        f"{gap.logp_diff_mean:.1e}",
        f"{gap.logp_diff_max:.1e}",
        f"{gap.clipped:.2%}",
    )


def chart(attribution: Attribution) -> str:
    """Returns the mean deltas as SVG: by source, on a logarithmic scale, and by layer."""
    noise = noise_floor(attribution)
    total = Source("total", "as configured", attribution.total)
    bars = [_bar(total, line_chart.NEUTRAL)]
    for source in attribution.sources:
        bars.append(_bar(source, line_chart.ENGINE if source.left_out else line_chart.TRAINER))
    bars += [_bar(source, line_chart.FAINT) for source in attribution.noise]
    title = "Mean delta of each source alone (logarithmic)"
    charts = [bar_chart.Chart(title, bars, noise, True)]
    if attribution.layers:
        layers = [
            bar_chart.Bar(f"layer {i}", "", gap.delta, gap.std_error, line_chart.ENGINE)
            for i, gap in enumerate(attribution.layers)
        ]
        title = f"Mean delta with the weights of one layer alone: {attribution.layer_setting}"
        charts.append(bar_chart.Chart(title, layers, noise, False))
    return bar_chart.draw(charts, LEGEND)


def _bar(source: Source, color: str) -> bar_chart.Bar:
    gap = source.alone
    ring = source.left_out.delta if source.left_out else None
    return bar_chart.Bar(source.name, source.setting, gap.delta, gap.std_error, color, ring)


def write(attribution: Attribution, config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Writes diagnose.json, diagnose.svg and diagnose.html into `workdir`.

    Returns the page's path.
    """
    record = {
        "weights": attribution.origin,
        "precision": dataclasses.asdict(config.rollout.precision),
        "sampling": sampling(config.rollout)._asdict(),
        "tokens": attribution.tokens,
        "noise_floor": noise_floor(attribution),
        "total": attribution.total._asdict(),
        "sources": [_record(source) for source in attribution.sources],
        "noise": [_record(source) for source in attribution.noise],
        "layers": {
            "setting": attribution.layer_setting,
            "gaps": [gap._asdict() for gap in attribution.layers],
        },
        "replay_error": attribution.replay_error,
        "notes": notes(attribution),
    }
    files.write_json(workdir / "diagnose.json", record)
    picture = chart(attribution)
    files.write_atomic(workdir / "diagnose.svg", picture)
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in [METHOD, *notes(attribution)])
    body = (
        f'<p class="summary">{html.escape(attribution.origin)}</p>'
        f"{html_page.verdict([verdict(attribution)], [])}"
        f'<figure class="scroll" tabindex="0">{picture}</figure>'
        f"{_page_table(attribution)}{paragraphs}"
    )
    path = workdir / "diagnose.html"
    title = f"{config.name}: sources of the gap"
    files.write_atomic(path, html_page.page(title, body, to_json(config)))
    return path


def _record(source: Source) -> dict[str, Any]:
    return {
        "source": source.name,
        "setting": source.setting,
        "alone": source.alone._asdict(),
        "left_out": _as_dict(source.left_out),
    }


def _as_dict(difference: Difference | None) -> dict[str, float] | None:
    return difference._asdict() if difference else None


def _page_table(attribution: Attribution) -> str:
    """Returns `table` as HTML, with the setting below its source so that it is not too wide."""
    header, *rows = table(attribution)
    return tables.html_table(
        [header[0], *header[2:]],
        [
            [tables.with_note(source, setting, below=True), *cells]
            for source, setting, *cells in rows
        ],
    )
