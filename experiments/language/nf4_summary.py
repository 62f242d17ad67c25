"""What do the runs of nf4.py, nf4_rate.py, nf4_halves.py and cooled.py add up to? Makes their
tables of RESULTS.md and the picture anew, after copying what finished runs left, if named.

Command:  python experiments/language/nf4_summary.py [runs/language]
Hardware: any; needs matplotlib (pip install 'dcmdp-jax[report]')
Time:     5 s
Result:   five tables of RESULTS.md, and experiments/language/plots/nf4.svg
"""

from __future__ import annotations

import itertools
import math
import pathlib
import statistics
import sys

import cooled
import nf4
import nf4_halves
import nf4_rate
import summary

STUDIES = {"nf4": nf4.STUDY, "nf4_rate": nf4_rate.STUDY, "nf4_halves": nf4_halves.STUDY}
ARMS = (*nf4.STUDY.arms, *nf4_halves.STUDY.arms)  # in the order of the tables
LAST = 8  # steps over which delta and entropy are averaged
ENTROPIES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # edges, nats a token
FEWEST = 3  # batches of an arm between two edges, for a mean
NO_GAP = 1e-4  # delta of an engine that rounds nothing is below
COLORS = {
    "exact": "#64748b",
    "grpo": "#0072b2",
    "icepop": "#e69f00",
    "dcgrpo": "#d55e00",
    "signed": "#cc79a7",
    "penalty": "#009e73",
}
Runs = dict[str, dict[int, list[dict[str, float]]]]


def csv_of(study: str) -> pathlib.Path:
    """Returns the table of a study's steps."""
    return summary.HERE / "results" / f"{study}.csv"


def at_end(runs: dict[int, list[dict[str, float]]], measure: str) -> dict[int, float]:
    """Returns the last evaluation of each seed."""
    return {seed: summary.evaluations(rows, measure)[-1][1] for seed, rows in runs.items()}


def table(found: Runs) -> str:
    """Returns the table: a line for each arm, means over its seeds; from three seeds on with 95 %
    intervals.
    """
    baseline = at_end(found["grpo"], "reward_eval_infer")
    head = ("arm", "seeds", "engine", "against GRPO", "trainer", "trainer less engine")
    lines = [(*head, "delta", "lambda", "entropy")]
    lines.append(("---",) * len(lines[0]))
    for name in [arm for arm in ARMS if arm in found]:
        runs = found[name]
        engine = at_end(runs, "reward_eval_infer")
        trainer = at_end(runs, "reward_eval_train")
        pairs = [engine[seed] - baseline[seed] for seed in engine.keys() & baseline.keys()]
        last = [row for rows in runs.values() for row in rows[-LAST:]]
        lines.append(
            (
                name,
                str(len(runs)),
                summary.spread(list(engine.values()), 2),
                summary.spread(pairs, 2) if name != "grpo" and pairs else "",
                summary.spread(list(trainer.values()), 2),
                summary.spread([trainer[seed] - engine[seed] for seed in engine], 2),
                *(
                    f"{statistics.fmean(row[measure] for row in last):.3g}"
                    for measure in ("delta_mean", "multiplier", "entropy")
                ),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seeds_table(found: Runs) -> str:
    """Returns the table of what the seeds did, in their order: pass rates at the first, the middle
    and the last evaluation, and delta at its highest and over the last steps.
    """
    head = ("arm", "engine at first", "halfway", "at last", "trainer halfway", "at last")
    lines = [(*head, "highest delta", "delta of the last eight steps", "of the last three")]
    lines.append(("---",) * len(lines[0]))
    for name in [arm for arm in ARMS if arm in found]:
        runs = [rows for _, rows in sorted(found[name].items())]
        engine = [summary.evaluations(rows, "reward_eval_infer") for rows in runs]
        trainer = [summary.evaluations(rows, "reward_eval_train") for rows in runs]
        deltas = [[row["delta_mean"] for row in rows] for rows in runs]
        rates = [[course[at][1] for course in engine] for at in range(3)]
        rates += [[course[at][1] for course in trainer] for at in (1, 2)]
        gaps = [[max(steps) for steps in deltas]]
        gaps += [[statistics.fmean(steps[-last:]) for steps in deltas] for last in (LAST, 3)]
        lines.append(
            (
                name,
                *(", ".join(f"{value:.2f}" for value in cell) for cell in rates),
                *(", ".join(f"{value:.3f}" for value in cell) for cell in gaps),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at_entropy(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Returns mean entropy and mean delta of the batches between each two edges of entropy; nan
    where they are too few.
    """
    means = []
    for low, high in itertools.pairwise(ENTROPIES):
        between = [row for row in rows if low <= row["entropy"] < high]
        if len(between) < FEWEST:
            means.append((math.nan, math.nan))
        else:
            entropy, delta = ([row[name] for row in between] for name in ("entropy", "delta_mean"))
            means.append((statistics.fmean(entropy), statistics.fmean(delta)))
    return means


def together(runs: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Returns the steps of all seeds."""
    return [row for rows in runs.values() for row in rows]


def entropy_table(found: Runs, untrained: list[dict[str, float]]) -> str:
    """Returns the table of delta at equal entropy: a line for each arm that has a gap."""
    edges = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(ENTROPIES)]
    lines = [["arm", *reversed(edges)], ["---"] * len(ENTROPIES)]
    arms = {arm: together(found[arm]) for arm in ARMS if arm in found}
    for name, rows in {"untrained, cooled": untrained, **arms}.items():
        if max(row["delta_mean"] for row in rows) < NO_GAP:
            continue
        means = [delta for _, delta in reversed(at_entropy(rows))]
        lines.append([name, *("" if math.isnan(mean) else f"{mean:.3f}" for mean in means)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: Runs, untrained: list[dict[str, float]], out: pathlib.Path) -> None:
    """Draws pass rate and delta of the sampled sentences, means over seeds, and delta at equal
    entropy.
    """
    plt = summary.pyplot()
    figure, (rate, delta, equal) = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained")
    for arm, color in COLORS.items():
        for axis, measure in ((rate, "reward"), (delta, "delta_mean")):
            courses = [[row[measure] for row in rows] for rows in found[arm].values()]
            means = [statistics.fmean(values) for values in zip(*courses, strict=True)]
            axis.plot(range(1, len(means) + 1), means, color=color, lw=1.6, label=arm)
        if arm != "exact":
            means = zip(*at_entropy(together(found[arm])), strict=True)
            equal.plot(*means, color=color, lw=1.6, marker=".")
    dots = equal.scatter(
        [row["entropy"] for row in untrained],
        [row["delta_mean"] for row in untrained],
        s=6,
        color="#94a3b8",
    )
    equal.legend([dots], ["untrained, cooled"], frameon=False, loc="lower left")
    tolerance = nf4.STUDY.arms["grpo"].constraint.tolerance
    line = delta.axhline(tolerance, color="#334155", lw=1, ls="--")
    delta.legend([line], ["tolerance"], frameon=False)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))
    equal.invert_xaxis()
    for axis, title, label in (
        (rate, "pass rate of the sampled sentences", "step"),
        (delta, "delta", "step"),
        (equal, "delta at equal entropy", "entropy of the policy, nats a token"),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
    out.mkdir(exist_ok=True)
    figure.savefig(out / "nf4.svg", metadata={"Date": None})
    plt.close(figure)


def tables() -> dict[str, str]:
    """Returns the tables of RESULTS.md by the names of their places."""
    made = {name: table(summary.read(csv_of(name))) for name in ("nf4", "nf4_rate")}
    nf4_runs = summary.read(csv_of("nf4"))
    halves = summary.read(csv_of("nf4_halves"))
    whole = {name: nf4_runs[name] for name in ("grpo", "dcgrpo")}
    made["nf4_halves"] = table(whole | halves)
    made["nf4_seeds"] = seeds_table(nf4_runs | halves)
    made["nf4_entropy"] = entropy_table(nf4_runs | halves, cooled.read())
    return made


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder = pathlib.Path(sys.argv[1])
        if not any((folder / name).is_dir() for name in STUDIES):
            sys.exit(
                f"name the folder that holds {', '.join(STUDIES)}; {folder} holds none of them"
            )
        for name, study in STUDIES.items():
            (steps,) = {arm.steps for arm in study.arms.values()}
            summary.collect(folder / name, csv_of(name), steps)
    summary.PAGE.write_text(summary.fill(summary.PAGE.read_text(), tables()))
    draw(summary.read(csv_of("nf4")), cooled.read(), summary.HERE / "plots")
