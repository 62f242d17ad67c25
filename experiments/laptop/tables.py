"""The tables of RESULTS.md, from the studies' tables.

`python experiments/laptop/tables.py FOLDER` prints them all; FOLDER holds one STUDY.csv for each study (default: results/ here).
Means are over seeds, each run's last evaluation; ± is half of a 95 % interval by Student's t. "against GRPO" pairs runs of one
seed, which start from the same parameters and see the same prompts. A run has collapsed where the engine's policy ends with a
lower pass rate than it started with.
"""

from __future__ import annotations

import csv
import pathlib
import statistics
import sys
from collections import defaultdict

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees of freedom
HERE = pathlib.Path(__file__).parent
HEAD = ("arm", "engine", "trainer", "engine against GRPO", "delta", "lambda", "entropy", "collapsed")


def read(folder: pathlib.Path, study: str) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Evaluations of each arm's seeds in order; an empty measure is nan."""
    found = defaultdict(lambda: defaultdict(list))
    with (folder / f"{study}.csv").open() as lines:
        for row in csv.DictReader(lines):
            values = {name: float(value or "nan") for name, value in row.items() if name not in ("study", "arm")}
            found[row["arm"]][int(row["seed"])].append(values)
    return {arm: dict(seeds) for arm, seeds in found.items()}


def last(runs: dict[int, list[dict[str, float]]], measure: str) -> dict[int, float]:
    return {seed: rows[-1][measure] for seed, rows in runs.items()}


def spread(values: list[float]) -> str:
    """Mean and half of its 95 % interval; of a single value, itself."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.fmean(values):.2f} ± {T95[len(values) - 1] * statistics.stdev(values) / len(values)**0.5:.2f}"


def against(runs: dict, control: dict) -> str:
    """Paired difference of the engine's pass rate, and in how many pairs it is positive."""
    mine, other = last(runs, "engine"), last(control, "engine")
    pairs = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    return f"{spread(pairs)} ({sum(pair > 0 for pair in pairs)} of {len(pairs)})" if pairs else ""


def collapsed(runs: dict) -> str:
    ended = [rows[-1]["engine"] < rows[0]["engine"] for rows in runs.values()]
    return f"{sum(ended)} of {len(ended)}"


def line(name: str, runs: dict, control: dict | None) -> tuple[str, ...]:
    """One row of a table."""
    delta, multiplier, entropy = (statistics.fmean(last(runs, m).values()) for m in ("delta", "multiplier", "entropy"))
    return (name, spread([*last(runs, "engine").values()]), spread([*last(runs, "trainer").values()]),
            against(runs, control) if control and control is not runs else "", f"{delta:.2g}", f"{multiplier:.2g}",
            f"{entropy:.2g}", collapsed(runs))


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def arms(arms_: dict, control: str = "grpo", suffix: str = "") -> str:
    """A table of all arms whose names end in `suffix`, against the arm `control`."""
    return markdown(HEAD, [line(name.removesuffix(suffix), runs, arms_.get(control + suffix))
                           for name, runs in arms_.items() if name.endswith(suffix)])
