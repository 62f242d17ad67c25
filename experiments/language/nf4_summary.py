"""What do the runs of nf4.py add up to? Makes the table of RESULTS.md anew, after copying what the
finished runs left, if named.

Command:  python experiments/language/nf4_summary.py [runs/language]
Hardware: any
Time:     1 s
Result:   a table of RESULTS.md
"""

from __future__ import annotations

import pathlib
import statistics
import sys

import nf4
import summary

CSV = summary.HERE / "results" / "nf4.csv"
STEPS = nf4.arm().steps
LAST = 8  # steps over which delta and entropy are averaged
Runs = dict[str, dict[int, list[dict[str, float]]]]


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
    for name in [arm for arm in nf4.STUDY.arms if arm in found]:
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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        summary.collect(pathlib.Path(sys.argv[1]) / "nf4", CSV, STEPS)
    page = summary.PAGE.read_text()
    summary.PAGE.write_text(summary.fill(page, {"nf4": table(summary.read(CSV))}))
