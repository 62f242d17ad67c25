"""What the engine answers to the first held-out problems, at the first and the last evaluation."""

from __future__ import annotations

import html
import os
from typing import Any

from dcmdp_jax.monitoring import metrics
from dcmdp_jax.report import tables

LONGEST = 400  # characters of a text on a page
LINE = 60  # and on a line of a terminal
IN_TERMINAL = 4  # problems


def section(workdir: str | os.PathLike) -> str:
    """Returns the problems of `samples.jsonl` as HTML, each with its answers side by side, or one
    below the other on a narrow page; nothing if there is none.

    Raises ValueError if the file is damaged.
    """
    rows = _first_and_last(workdir)
    if not rows:
        return ""
    parts = []
    for problem in zip(*(row["samples"] for row in rows)):
        texts = [_text("problem", problem[0]["prompt"])]
        for row, sample in zip(rows, problem):
            caption = f"step {row['step']}, reward {_reward(sample)}"
            texts.append(_text(caption, sample["completion"]))
        parts.append(f'<div class="problem">{"".join(texts)}</div>')
    title = "Held-out problems and the engine's answers"
    return f'<h2 class="section">{html.escape(title)}</h2>{"".join(parts)}'


def lines(workdir: str | os.PathLike) -> list[str]:
    """Returns the same for a terminal, of fewer problems."""
    rows = _first_and_last(workdir)
    shown = []
    for problem in list(zip(*(row["samples"] for row in rows)))[:IN_TERMINAL]:
        shown.append(_shortened(problem[0]["prompt"].rpartition("\n")[2], LINE))
        for row, sample in zip(rows, problem):
            text = _shortened(" ".join(sample["completion"].split()), LINE)
            shown.append(f"  step {row['step']:<5} reward {_reward(sample):<4} {text}")
    return shown


def _first_and_last(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    rows = metrics.read_samples(workdir)
    return rows if len(rows) < 2 else [rows[0], rows[-1]]


def _text(caption: str, content: str) -> str:
    """Returns a text under its caption, read from right to left if it is so written."""
    shown = tables.text(_shortened(content, LONGEST))
    body = f'<p class="{shown.style}" dir="auto">{shown.html}</p>'
    if not shown.html:
        body = '<p class="note">(empty)</p>'
    return f'<div><p class="note">{html.escape(caption)}</p>{body}</div>'


def _reward(sample: dict[str, Any]) -> str:
    return tables.MISSING if sample["reward"] is None else f"{sample['reward']:g}"


def _shortened(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else text[: most - 1] + "…"
