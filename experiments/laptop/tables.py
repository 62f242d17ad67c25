"""The tables of RESULTS.md, from one STUDY.csv for each study.

Means are over seeds, each run's last evaluation; ± is half of a 95 % interval by Student's t.
"against GRPO" pairs runs of one seed, which start from the same parameters and see the same
prompts. A run has collapsed where the engine's policy ends with a lower pass rate than it started
with, by more than the noise of the two evaluations.
"""

from __future__ import annotations

import csv
import math
import pathlib
import re
import statistics
from collections import defaultdict

from dcmdp_jax.evaluation import intervals

NOISE = 0.06  # of the difference of two rates over 512 samples: 1.96 sqrt(2 / 4 / 512)
HEAD = (
    "arm",
    "engine",
    "trainer",
    "engine against GRPO",
    "delta",
    "lambda",
    "entropy",
    "collapsed",
)


def read(folder: pathlib.Path, study: str) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Evaluations of each arm's seeds in order; an empty measure is nan."""
    found = defaultdict(lambda: defaultdict(list))
    with (folder / f"{study}.csv").open() as lines:
        for row in csv.DictReader(lines):
            values = {
                name: float(value or "nan")
                for name, value in row.items()
                if name not in ("study", "arm")
            }
            found[row["arm"]][int(row["seed"])].append(values)
    return {arm: dict(seeds) for arm, seeds in found.items()}


def last(runs: dict[int, list[dict[str, float]]], measure: str) -> dict[int, float]:
    return {seed: rows[-1][measure] for seed, rows in runs.items()}


def spread(values: list[float]) -> str:
    """Mean and half of its 95 % interval; of one value, itself; nan if one was not measured."""
    if any(map(math.isnan, values)):
        return "nan"
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    middle, low, _ = intervals.mean(values)
    return f"{middle:.2f} ± {middle - low:.2f}"


def against(runs: dict, control: dict) -> str:
    """Paired difference of the engine's pass rate, and in how many pairs it is positive."""
    mine = last(runs, "reward_eval_infer")
    other = last(control, "reward_eval_infer")
    pairs = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    return f"{spread(pairs)} ({sum(pair > 0 for pair in pairs)} of {len(pairs)})" if pairs else ""


def collapsed(runs: dict) -> str:
    ended = [
        rows[-1]["reward_eval_infer"] < rows[0]["reward_eval_infer"] - NOISE
        for rows in runs.values()
    ]
    return f"{sum(ended)} of {len(ended)}"


def line(name: str, runs: dict, control: dict | None) -> tuple[str, ...]:
    """One row of a table."""
    delta, multiplier, entropy = (
        statistics.fmean(last(runs, m).values()) for m in ("delta_mean", "multiplier", "entropy")
    )
    return (
        name,
        spread([*last(runs, "reward_eval_infer").values()]),
        spread([*last(runs, "reward_eval_train").values()]),
        against(runs, control) if control and control is not runs else "",
        f"{delta:.2g}",
        f"{multiplier:.2g}",
        f"{entropy:.2g}",
        collapsed(runs),
    )


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def arms(arms_: dict, control: str = "grpo", suffix: str = "") -> str:
    """A table of all arms whose names end in `suffix`, against the arm `control`."""
    return markdown(
        HEAD,
        [
            line(name.removesuffix(suffix), runs, arms_.get(control + suffix))
            for name, runs in arms_.items()
            if name.endswith(suffix)
        ],
    )


def floors(folder: pathlib.Path) -> str:
    arms_ = read(folder, "floors")
    rows = [
        (
            name,
            spread_small([*last(runs, "delta_mean").values()]),
            f"{statistics.fmean(last(runs, 'reward_eval_infer').values()):.3f}",
            f"{statistics.fmean(last(runs, 'reward_eval_train').values()):.3f}",
        )
        for name, runs in arms_.items()
    ]
    return markdown(
        ("engine", "floor of delta, five starts", "pass rate, engine", "pass rate, trainer"), rows
    )


def spread_small(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1e} ({min(values):.1e} to {max(values):.1e})"


def against_harmed(folder: pathlib.Path, study: str) -> str:
    """A study's arms against plain GRPO under the same engine (mismatch.py), and no mismatch at the
    same seeds.
    """
    control = read(folder, "mismatch")["int4-tensor"]
    none = {
        seed: rows for seed, rows in read(folder, "main")["none-0.0003"].items() if seed in control
    }
    arms_ = {"no mismatch": none, "GRPO": control} | read(folder, study)
    return markdown(HEAD, [line(name, runs, control) for name, runs in arms_.items()])


def confirmed(folder: pathlib.Path) -> str:
    """Paired differences from GRPO: on the seeds an arm was picked on, on confirm.py's own, and on
    both.
    """
    picked = read(folder, "multiplier") | read(folder, "tolerance")
    fresh = read(folder, "confirm")
    control = read(folder, "mismatch")["int4-tensor"] | fresh["grpo"]
    rows = [
        (
            name,
            *(
                against(runs, control)
                for runs in (picked[before], fresh[name], picked[before] | fresh[name])
            ),
        )
        for name, before in (
            ("tis", "tis"),
            ("signed", "signed-0.1"),
            ("penalty", "penalty-0.1"),
            ("penalty-dual", "penalty-c0.5"),
        )
    ]
    return markdown(
        ("engine against GRPO", "seeds 0 to 2, picked on", "seeds 3 to 7", "all eight"), rows
    )


def sources(folder: pathlib.Path) -> str:
    """One source of mismatch at a time, against none at the same seeds; by the gap at the first
    step, stale weights last.
    """
    main_ = read(folder, "main")
    arms_ = read(folder, "mismatch") | {"int4": main_["grpo-0.0003"], "none": main_["none-0.0003"]}
    first = {
        name: statistics.fmean(rows[0]["delta_mean"] for rows in runs.values())
        for name, runs in arms_.items()
    }
    head = (
        "engine",
        "delta at step 1",
        "engine's policy",
        "trainer's policy",
        "engine against none",
        "delta at the end",
        "gap of stale weights at the end",
        "collapsed",
    )
    rows = []
    for name in sorted(arms_, key=lambda name: (name.startswith("stale"), first[name])):
        runs = arms_[name]
        shown = line(name, runs, main_["none-0.0003"])
        stale = statistics.fmean(last(runs, "gap_staleness").values())
        rows.append(
            (
                name,
                f"{first[name]:.1e}",
                shown[1],
                shown[2],
                shown[3],
                shown[4],
                "" if stale != stale else f"{stale:.2g}",
                shown[7],
            )
        )
    return markdown(head, rows)


def shares(folder: pathlib.Path, study: str) -> str:
    """The distorted kind's share at the start and the end of a study's runs, and the gap of the two
    kinds of symbol.
    """
    with (folder / "shares.csv").open() as lines:
        found = defaultdict(lambda: defaultdict(list))
        for row in csv.DictReader(lines):
            if row["study"] == study:
                values = {name: float(row[name]) for name in row if name not in ("study", "arm")}
                found[row["arm"]][int(row["seed"])].append(values)
    room_ = read(folder, study)
    head = (
        "arm",
        "pass rate, engine",
        "share, start",
        "share, end",
        "change against GRPO",
        "delta distorted, end",
        "delta others, end",
        "gain of the muted channel, end",
    )
    rows = []
    for arm, runs in found.items():
        control = found[f"{arm[0]}-grpo" if study == "room" else "grpo"]
        ends = {seed: r[-1]["share_trainer"] for seed, r in runs.items()}
        pairs = [ends[seed] - control[seed][-1]["share_trainer"] for seed in ends]
        gaps = [
            statistics.fmean(r[-1][name] for r in runs.values())
            for name in ("delta_distorted", "delta_others", "gain")
        ]
        rows.append(
            (
                arm,
                spread([*last(room_[arm], "reward_eval_infer").values()]),
                spread([r[0]["share_trainer"] for r in runs.values()]),
                spread([*ends.values()]),
                "" if arm.endswith("grpo") else spread(pairs),
                *(f"{gap:.2g}" for gap in gaps),
            )
        )
    return markdown(head, rows)


def probes(folder: pathlib.Path, engine: str, kind: str) -> str:
    """What one step along each term's direction does to the gap; the null is the range of the
    random ones.
    """
    with (folder / "directions.csv").open() as lines:
        found = [
            row for row in csv.DictReader(lines) if (row["engine"], row["kind"]) == (engine, kind)
        ]
    sizes = sorted({row["size"] for row in found}, key=float)
    head = (
        "direction",
        "cosine of the gradient",
        *(
            f"{name}, s = {size}"
            for size in sizes
            for name in ("engine held", "quantized anew", "entropy")
        ),
    )
    names = [
        *dict.fromkeys(
            row["direction"] for row in found if not row["direction"].startswith("random")
        )
    ]
    rows = []
    for name in names:
        own = [row for row in found if row["direction"] == name]
        cells = [
            f"{100 * statistics.fmean(float(r[m]) for r in own if r['size'] == size):+.0f} %"
            for size in sizes
            for m in ("tv_frozen", "tv_requantized", "entropy")
        ]
        rows.append(
            (name, f"{statistics.fmean(float(r['cosine_to_ste']) for r in own):+.2f}", *cells)
        )
    cells = []
    for size in sizes:
        for m in ("tv_frozen", "tv_requantized", "entropy"):
            drawn = defaultdict(list)
            for row in found:
                if row["direction"].startswith("random") and row["size"] == size:
                    drawn[row["direction"]].append(float(row[m]))
            # over the starts, as the terms' are
            means = [statistics.fmean(values) for values in drawn.values()]
            cells.append(f"{100 * min(means):+.0f} to {100 * max(means):+.0f} %")
    return markdown(head, [*rows, ("random", "", *cells)])


def estimates(folder: pathlib.Path) -> str:
    """Cosine and length of each estimate of the gradient against the one on policy, over the
    starts.
    """
    with (folder / "estimators.csv").open() as lines:
        found = defaultdict(list)
        for row in csv.DictReader(lines):
            found[row["estimator"]].append((float(row["cosine"]), float(row["length"])))
    rows = [
        (
            name,
            *(
                f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                for values in zip(*pairs)
            ),
        )
        for name, pairs in found.items()
    ]
    return markdown(
        ("estimate", "cosine with the gradient on policy", "length over that one's"), rows
    )


def courses(folder: pathlib.Path, study: str) -> str:
    """Each run of a study, a row for each of its evaluations."""
    head = ("arm", "seed", "step", "engine's pass rate", "delta", "lambda", "entropy")
    rows = [
        (
            arm,
            str(seed),
            f"{row['step']:.0f}",
            f"{row['reward_eval_infer']:.2f}",
            *(f"{row[name]:.2g}" for name in ("delta_mean", "multiplier", "entropy")),
        )
        for arm, runs in read(folder, study).items()
        for seed, course in runs.items()
        for row in course
    ]
    return markdown(head, rows)


def served(folder: pathlib.Path, study: str) -> str:
    """A study's arms through a server, where the trainer's policy is not evaluated."""
    arms_ = read(folder, study)
    place = HEAD.index("trainer")
    rows = []
    for name, runs in arms_.items():
        cells = line(name, runs, arms_.get("grpo"))
        first = statistics.fmean(course[0]["delta_mean"] for course in runs.values())
        rows.append((*cells[:place], *cells[place + 1 :], f"{first:.2g}"))
    return markdown((*HEAD[:place], *HEAD[place + 1 :], "delta at step 1"), rows)


def tolerances(folder: pathlib.Path, study: str) -> dict[int, float]:
    """The tolerance that each seed of a study's arm `dcgrpo` measured at its start."""
    with (folder / "tolerances.csv").open() as lines:
        return {
            int(row["seed"]): float(row["tolerance"])
            for row in csv.DictReader(lines)
            if (row["study"], row["arm"]) == (study, "dcgrpo")
        }


def duals(folder: pathlib.Path, study: str) -> str:
    """Delta over its tolerance, and lambda, at each evaluation of the arm `dcgrpo`."""
    runs = read(folder, study)["dcgrpo"]
    limits = tolerances(folder, study)
    steps = [f"{row['step']:.0f}" for row in next(iter(runs.values()))]
    head = ("seed", "tolerance", *(f"delta / tolerance, {steps[0]}", *steps[1:]))
    head = (*head, *(f"lambda, {steps[0]}", *steps[1:]))
    rows = [
        (
            str(seed),
            f"{limits[seed]:.3g}",
            *(f"{row['delta_mean'] / limits[seed]:.2f}" for row in course),
            *(f"{row['multiplier']:.3f}" for row in course),
        )
        for seed, course in runs.items()
    ]
    return markdown(head, rows)


def binds(folder: pathlib.Path) -> str:
    """Mean delta of the last 80 steps and pass rate, without the constraint and with it; lambda."""
    found = read(folder, "binds")
    head = ("seed", "delta, grpo", "delta, dcgrpo", "lambda", "engine, grpo", "engine, dcgrpo")
    rows = []
    for seed, control in found["grpo"].items():
        constrained = found["dcgrpo"][seed]
        deltas = [
            statistics.fmean(row["delta_mean"] for row in course[-2:])  # 40 steps each
            for course in (control, constrained)
        ]
        rows.append(
            (
                str(seed),
                *(f"{delta:.4f}" for delta in deltas),
                f"{statistics.fmean(row['multiplier'] for row in constrained[-2:]):.2f}",
                *(f"{course[-1]['reward_eval_infer']:.2f}" for course in (control, constrained)),
            )
        )
    return markdown(head, rows)


def every(folder: pathlib.Path) -> dict[str, str]:
    """All tables by name; a study that has left none is missing."""
    plans = {
        "floors": lambda: floors(folder),
        "arms at 3e-4": lambda: arms(read(folder, "main"), suffix="-0.0003"),
        "arms at 1e-4": lambda: arms(read(folder, "main"), suffix="-0.0001"),
        "experts": lambda: arms(read(folder, "experts")),
        "multiplier": lambda: against_harmed(folder, "multiplier"),
        "confirm": lambda: arms(read(folder, "confirm")),
        "confirmed": lambda: confirmed(folder),
        "tolerance": lambda: against_harmed(folder, "tolerance"),
        "sources": lambda: sources(folder),
        "split": lambda: against_harmed(folder, "split"),
        "room": lambda: shares(folder, "room"),
        "binds": lambda: binds(folder),
        "room_harmed": lambda: arms(read(folder, "room_harmed")),
        "shares, harmed": lambda: shares(folder, "room_harmed"),
        **{
            f"{engine}, {kind}": lambda engine=engine, kind=kind: probes(folder, engine, kind)
            for engine in ("int4", "fp8")
            for kind in ("gradient", "signs")
        },
        "estimators": lambda: estimates(folder),
        "batch": lambda: against_harmed(folder, "batch"),
        "sgd": lambda: arms(read(folder, "sgd")),
        "long": lambda: arms(read(folder, "long")),
        "real_engine": lambda: courses(folder, "real_engine"),
        "llama_cpp_q4": lambda: served(folder, "llama_cpp_q4"),
        "llama_cpp_q4, dual": lambda: duals(folder, "llama_cpp_q4"),
    }
    needs = {
        "arms at 3e-4": "main",
        "arms at 1e-4": "main",
        "sources": "mismatch",
        "room": "shares",
        "shares, harmed": "shares",
        "confirmed": "confirm",
        "llama_cpp_q4, dual": "tolerances",
        **{name: "directions" for name in plans if name.startswith(("int4, ", "fp8, "))},
    }
    return {
        name: plan()
        for name, plan in plans.items()
        if (folder / f"{needs.get(name, name)}.csv").is_file()
    }


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between `<!-- table NAME -->` and `<!-- end -->` made anew. Raises
    ValueError on an unknown name.
    """

    def made(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(
                f"no study has left the table {match[1]!r}; there are {', '.join(tables)}"
            )
        return f"<!-- table {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)
