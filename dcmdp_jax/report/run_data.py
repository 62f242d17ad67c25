"""What pages read of a run: its configuration, and the rows of its metrics as curves."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.report.line_chart import finite
from dcmdp_jax.run.record import RECORD_FILE, read_record

Config = dict[str, Any]  # as in config.json
Rows = list[dict[str, Any]]  # as in metrics.jsonl
Points = list[tuple[int, float]]  # (step, value)

NUMBERS = (  # settings that sentences and curves are computed from
    ("steps",),
    ("eval", "prompts"),
    ("constraint", "tolerance"),
    ("constraint", "multiplier_max"),
)


def load(workdir: str | os.PathLike) -> tuple[Config, Rows]:
    """Returns the configuration and the rows of a run.

    Raises ValueError if the folder is not a run's (it lacks `config.json` or `metrics.jsonl`), and
    if a file is damaged.
    """
    path = pathlib.Path(workdir) / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    config = read_record(path.parent)
    rows = metrics.read(workdir)
    _check_settings(config, path)
    return config, rows


def _check_settings(config: Config, path: pathlib.Path) -> None:
    """Raises ValueError if one of the settings `NUMBERS` is not a number, or is negative."""
    for names in NUMBERS:
        name = ".".join(names)
        value = setting(config, *names)
        to_be_measured = name == "constraint.tolerance" and isinstance(value, dict)
        if value is None or to_be_measured:
            continue
        files.check_fields({name: value}, {name: files.NUMBER}, str(path))
        if value < 0:
            raise ValueError(
                f"{path} has {name!r} = {value}, which must not be negative; correct it"
            )


def setting(config: Config, *names: str) -> Any:
    """Returns a nested setting; None if the configuration lacks it."""
    value = config
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def tolerance_of(config: Config) -> float | None:
    """Returns the tolerance; None if the run is still to measure it."""
    tolerance = setting(config, "constraint", "tolerance")
    return None if isinstance(tolerance, dict) else tolerance


def noise_of_evaluations(config: Config) -> float:
    """Returns the change of a held-out reward that chance can make: two standard errors of the
    difference of two evaluations; 0 if the number of their problems is not known.

    For rewards in [0, 1] the standard error of a mean over n prompts is at most 0.5 / sqrt(n), and
    sqrt(2) times that for a difference.
    """
    prompts = setting(config, "eval", "prompts")
    return 2 * math.sqrt(2) * 0.5 / math.sqrt(prompts) if prompts else 0.0


def points_of(rows: Rows, key: str) -> Points:
    """Returns a metric of every row; nan if the value is missing or not a number."""
    values = [(row["step"], row.get(key)) for row in rows]
    return [
        (step, float(value) if isinstance(value, (int, float)) else math.nan)
        for step, value in values
    ]


def last_tenth(rows: Rows) -> Rows:
    """Returns the rows of the last tenth of the steps, at least one if there is one."""
    return rows[-max(1, len(rows) // 10) :]


def trailing_window(rows: Sequence[Any]) -> int:
    """Returns over how many steps a trailing mean is taken."""
    return max(1, min(20, len(rows) // 10))


def smoothed(points: Points, window: int) -> Points:
    """Returns the means of the finite values of the last `window` points; nan if there is none."""
    means = []
    for i, (step, _) in enumerate(points):
        values = [value for _, value in finite(points[max(0, i + 1 - window) : i + 1])]
        means.append((step, statistics.fmean(values) if values else math.nan))
    return means


def counted(number: int, noun: str) -> str:
    """Returns "1 step", "2 steps" and so on."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
