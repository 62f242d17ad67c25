"""What do the seeds of smollm2.py and the pilots before them add up to? Makes the tables and the
picture of RESULTS.md anew, after copying what the seeds' runs left, if named.

Command:  python experiments/language/summary.py [runs/language]
Hardware: any; needs matplotlib (pip install 'dcmdp-jax[report]')
Time:     1 s
Result:   two tables of RESULTS.md, and experiments/language/plots/seeds.svg
"""

from __future__ import annotations

import csv
import math
import pathlib
import re
import statistics
import sys

from smollm2 import CONFIG

from dcmdp_jax.evaluation import intervals
from dcmdp_jax.monitoring import metrics

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "RESULTS.md"
CSV = HERE / "results" / "seeds.csv"
PILOTS = HERE / "results" / "pilots.csv"
MEASURES = (
    "reward",
    "delta_mean",
    "multiplier",
    "entropy",
    "prob_diff_rollout_share",  # of the runs that have it
    "reward_eval_infer",
    "reward_eval_train",
)
LAST = 10  # steps over which delta is compared with its tolerance
NAMES = {"grpo": "without the constraint", "dcgrpo": "with it"}


def collect(study: pathlib.Path, path: pathlib.Path, steps: int) -> None:
    """Writes the metrics of every step of the finished runs of a study into a table, in the place
    of those that it has of the same arms and seeds.
    """
    found = {}
    if path.exists():
        with path.open() as lines:
            for row in csv.DictReader(lines):
                found.setdefault((row["arm"], row["seed"]), []).append(row)
    for folder in (path.parent for path in study.glob("*/s*/metrics.jsonl")):
        arm, seed = folder.parent.name, folder.name[1:]
        rows = metrics.read(folder)
        if len(rows) >= steps:
            found[arm, seed] = [
                {"arm": arm, "seed": seed, "step": row["step"]}
                | {name: f"{row[name]:.6g}" for name in MEASURES if row.get(name) is not None}
                for row in rows
            ]
    measured = {name for rows in found.values() for row in rows for name in row}
    columns = ["arm", "seed", "step", *(name for name in MEASURES if name in measured)]
    with path.open("w") as out:
        table = csv.DictWriter(out, columns, lineterminator="\n")
        table.writeheader()
        for run in sorted(found):
            table.writerows(found[run])


def read(path: pathlib.Path) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Returns the steps of each arm's seeds, in order; a measure that a step lacks is nan."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            values = {name: float(row.get(name) or "nan") for name in ("step", *MEASURES)}
            found.setdefault(row["arm"], {}).setdefault(int(row["seed"]), []).append(values)
    return found


def evaluations(rows: list[dict[str, float]], measure: str) -> list[tuple[float, float]]:
    """Returns (step, value) of the steps that have a value."""
    return [(row["step"], row[measure]) for row in rows if not math.isnan(row[measure])]


def last_delta(rows: list[dict[str, float]]) -> float:
    return statistics.fmean(row["delta_mean"] for row in rows[-LAST:])


def table(arms: dict[str, dict[int, list[dict[str, float]]]]) -> str:
    """Returns the table: a line for each seed, and the means, with their 95 % intervals from three
    seeds on.
    """
    head = ["seed"]
    for name in NAMES.values():
        head += [f"delta {name}", "engine", "trainer"]
    head.append("lambda at first, lowest, highest, at last")
    lines = [head, ["---"] * len(head)]
    seeds = sorted(arms["grpo"].keys() & arms["dcgrpo"].keys())
    for seed in seeds:
        line = [str(seed)]
        for arm in NAMES:
            rows = arms[arm][seed]
            line.append(f"{last_delta(rows):.4f}")
            for measure in ("reward_eval_infer", "reward_eval_train"):
                course = evaluations(rows, measure)
                line.append(f"{course[0][1]:.2f} → {course[-1][1]:.2f}")
        course = [row["multiplier"] for row in arms["dcgrpo"][seed]]
        line.append(f"{course[0]:.3g}, {min(course):.3g}, {max(course):.3g}, {course[-1]:.3g}")
        lines.append(line)
    mean = ["mean"]
    for arm in NAMES:
        runs = [arms[arm][seed] for seed in seeds]
        mean.append(spread([last_delta(rows) for rows in runs], 4))
        for measure in ("reward_eval_infer", "reward_eval_train"):
            mean.append(spread([evaluations(rows, measure)[-1][1] for rows in runs], 2))
    lines.append([*mean, ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], digits: int) -> str:
    if len(values) < 3:
        return f"{statistics.fmean(values):.{digits}f}"
    middle, low, _ = intervals.mean(values)
    return f"{middle:.{digits}f} ± {middle - low:.{digits}f}"


def pilots(path: pathlib.Path = PILOTS) -> str:
    """Returns the table of the pilots: a line each, delta of the first three steps and means over
    the last third.
    """
    runs: dict[str, list[dict[str, float]]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            runs.setdefault(row["pilot"], []).append(
                {name: float(row.get(name) or "nan") for name in MEASURES}
            )
    head = ("pilot", "steps", "delta at first", "delta", "lambda", "pass rate", "entropy")
    table = [head, ("---",) * len(head)]
    for name, rows in runs.items():
        last = rows[-(len(rows) // 3) :]
        first, delta, multiplier, reward, entropy = (
            statistics.fmean(row[measure] for row in part)
            for part, measure in (
                (rows[:3], "delta_mean"),
                (last, "delta_mean"),
                (last, "multiplier"),
                (last, "reward"),
                (last, "entropy"),
            )
        )
        table.append(
            (
                name,
                str(len(rows)),
                f"{first:.4f}",
                f"{delta:.4f}",
                f"{multiplier:.3g}",
                f"{reward:.2f}",
                f"{entropy:.2f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def fill(page: str, made: dict[str, str]) -> str:
    """Returns the page with each table between `<!-- NAME of smollm2 -->` and `<!-- end -->` made
    anew.
    """
    for name, table_ in made.items():
        page = re.sub(
            rf"<!-- {name} of smollm2 -->\n.*?<!-- end -->",
            lambda match, name=name, text=table_: (
                f"<!-- {name} of smollm2 -->\n\n{text}\n\n<!-- end -->"
            ),
            page,
            flags=re.DOTALL,
        )
    return page


def pyplot():
    """Returns matplotlib's pyplot, set to write SVGs that come out the same each time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "dcmdp",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt


def draw(arms: dict[str, dict[int, list[dict[str, float]]]], out: pathlib.Path) -> None:
    """Draws the pass rates, delta and lambda of every seed, and their means."""
    plt = pyplot()
    colors = {"grpo": "#0072b2", "dcgrpo": "#d55e00"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axis, measure, title in zip(
        axes,
        ("reward", "delta_mean", "multiplier"),
        ("pass rate of the sampled sentences", "delta", "lambda"),
        strict=True,
    ):
        for arm, name in NAMES.items():
            if measure == "multiplier" and arm == "grpo":
                continue
            courses = [[row[measure] for row in rows] for rows in arms[arm].values()]
            steps = range(1, CONFIG.steps + 1)
            for course in courses:
                axis.plot(steps, course, color=colors[arm], lw=0.7, alpha=0.35)
            means = [statistics.fmean(values) for values in zip(*courses, strict=True)]
            axis.plot(steps, means, color=colors[arm], lw=2, label=name)
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].set_ylim(0, 1)
    axes[1].axhline(CONFIG.constraint.tolerance, color="#334155", lw=1, ls="--", label="tolerance")
    axes[2].axhline(
        CONFIG.constraint.multiplier_max, color="#334155", lw=1, ls="--", label="its bound"
    )
    for axis in axes:
        axis.legend(frameon=False, loc="lower right")
    out.mkdir(exist_ok=True)
    figure.savefig(out / "seeds.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    CSV.parent.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        runs = pathlib.Path(sys.argv[1]) / "seeds"
        if not runs.is_dir():
            sys.exit(f"name the folder that holds seeds; there is no {runs}")
        collect(runs, CSV, CONFIG.steps)
    found = read(CSV)
    PAGE.write_text(fill(PAGE.read_text(), {"seeds": table(found), "pilots": pilots()}))
    draw(found, HERE / "plots")
