"""What the engine answers to the first held-out problems, at the first and the last evaluation."""

from __future__ import annotations

import os
from typing import Any

from dcmdp_jax.monitoring import metrics
from dcmdp_jax.report import tables

LONGEST = 400  # characters of a text on a page
LINE = 60  # and on a line of a terminal
IN_TERMINAL = 4  # problems


def section(workdir: str | os.PathLike) -> str:
    """Returns a table of `samples.jsonl` as HTML; nothing if there is none.

    Raises ValueError if the file is damaged.
    """
    rows = _first_and_last(workdir)
    if not rows:
        return ""
    header = ["problem"]
    for row in rows:
        header += [f"step {row['step']}", "reward"]
    lines = []
    for problem in zip(*(row["samples"] for row in rows)):
        cells = [tables.text(_shortened(problem[0]["prompt"], LONGEST))]
        for sample in problem:
            cells += [tables.text(_shortened(sample["completion"], LONGEST)), _reward(sample)]
        lines.append(cells)
    return '<h2 class="section">Held-out problems and the engine\'s answers</h2>' + (
        tables.html_table(header, lines)
    )


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


def _reward(sample: dict[str, Any]) -> str:
    return tables.MISSING if sample["reward"] is None else f"{sample['reward']:g}"


def _shortened(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else text[: most - 1] + "…"
