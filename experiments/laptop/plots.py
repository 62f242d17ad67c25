"""The pictures of RESULTS.md, from one STUDY.csv for each study; needs matplotlib."""

from __future__ import annotations

import pathlib
import statistics

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from tables import last, read, tolerances  # noqa: E402

from dcmdp_jax.evaluation import intervals  # noqa: E402

ENGINE = "#d55e00"
TRAINER = "#0072b2"
INK = "#334155"
FAINT = "#cbd5e1"
FORMS = {"abs": "#d55e00", "signed": "#0072b2", "penalty": "#009e73"}
LABELS = {
    "none": "no mismatch",
    "grpo": "GRPO",
    "tis": "TIS",
    "icepop": "IcePop",
    "dcgrpo": "DC-GRPO",
    "calibrated": "DC-GRPO, own c",
    "signed": "signed, 0.1",
    "penalty": "penalty, 0.1",
}
plt.rcParams.update(
    {
        "svg.hashsalt": "dcmdp",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#94a3b8",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def write(folder: pathlib.Path, out: pathlib.Path) -> None:
    out.mkdir(exist_ok=True)
    for name, draw in (
        ("arms", draw_arms),
        ("multiplier", draw_multiplier),
        ("tolerance", draw_tolerance),
        ("mismatch", draw_mismatch),
        ("llama_cpp_q4", draw_llama_cpp_q4),
    ):
        figure = draw(folder)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def draw_arms(folder):
    """Every seed's last held-out pass rate, both policies, at both learning rates."""
    arms = read(folder, "main")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, rate in zip(axes, ("0.0003", "0.0001")):
        names = [name for name in LABELS if f"{name}-{rate}" in arms]
        for place, name in enumerate(names):
            runs = arms[f"{name}-{rate}"]
            for measure, color, shift in (
                ("reward_eval_infer", ENGINE, -0.14),
                ("reward_eval_train", TRAINER, 0.14),
            ):
                values = list(last(runs, measure).values())
                axis.plot(
                    [place + shift] * len(values),
                    values,
                    "o",
                    color=color,
                    alpha=0.55,
                    markersize=4,
                    markeredgewidth=0,
                )
                axis.plot(
                    [place + shift - 0.11, place + shift + 0.11],
                    [statistics.fmean(values)] * 2,
                    color=color,
                    lw=2,
                )
        start = statistics.fmean(
            rows[0]["reward_eval_infer"] for runs in arms.values() for rows in runs.values()
        )
        axis.axhline(start, color=FAINT, lw=1, zorder=0)
        axis.set_xticks(
            range(len(names)), [LABELS[name] for name in names], rotation=30, ha="right"
        )
        axis.set_title(f"learning rate {rate[-1]}e-4", fontsize=10)
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("held-out pass rate at the end")
    axes[0].annotate(
        "start", (len(names) - 0.6, start), fontsize=8, va="bottom", ha="right", color="#64748b"
    )
    axes[1].plot([], [], "o", color=ENGINE, label="engine's policy (int4)")
    axes[1].plot([], [], "o", color=TRAINER, label="trainer's policy (float32)")
    axes[1].legend(frameon=False, loc="lower right")
    return figure


def draw_multiplier(folder):
    """Pass rate of the engine's policy against a fixed multiplier, three forms, where mismatch
    ruins GRPO.
    """
    grid = read(folder, "multiplier")
    harmed = read(folder, "mismatch")["int4-tensor"]
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for place, (form, color) in enumerate(FORMS.items()):
        points = {0.0: harmed} | {
            float(name.split("-")[1]): runs
            for name, runs in grid.items()
            if name.startswith(f"{form}-")
        }
        draw_points(
            axis, {x + 0.004 * (place - 1): runs for x, runs in sorted(points.items())}, form, color
        )
    draw_ceiling(axis, folder)
    axis.set_xlabel("multiplier, held fixed; 0 is GRPO")
    finish(axis)
    return figure


def draw_tolerance(folder):
    """Draws the engine's pass rate against the tolerance, in units of the floor at the start."""
    arms = read(folder, "tolerance")
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for form in ("abs", "penalty"):
        points = {
            float(name.split("-c")[1]): runs
            for name, runs in arms.items()
            if name.startswith(f"{form}-c") and name[len(form) + 2].isdigit()
        }
        draw_points(
            axis, dict(sorted(points.items())), f"{form}, adaptive, at most 0.3", FORMS[form]
        )
    harmed = statistics.fmean(
        last(read(folder, "mismatch")["int4-tensor"], "reward_eval_infer").values()
    )
    axis.axhline(harmed, color=INK, lw=1, ls="--", label="GRPO", zorder=0)
    draw_ceiling(axis, folder)
    axis.axvline(1.2, color=FAINT, lw=1, zorder=0)
    axis.set_xlabel("tolerance / floor at the start; 1.2 is the calibrated one")
    finish(axis)
    return figure


def draw_ceiling(axis, folder):
    none = statistics.fmean(last(read(folder, "main")["none-0.0003"], "reward_eval_infer").values())
    axis.axhline(none, color=FAINT, lw=1, label="no mismatch", zorder=0)


def draw_mismatch(folder):
    """What each source of mismatch does, against the gap that it makes."""
    arms = read(folder, "mismatch")
    main_ = read(folder, "main")
    arms = {name: runs for name, runs in arms.items() if not name.startswith("stale")}
    arms |= {"int4": main_["grpo-0.0003"], "none": main_["none-0.0003"]}
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, runs in arms.items():
        x = statistics.fmean(rows[0]["delta_mean"] for rows in runs.values())
        values = list(last(runs, "reward_eval_infer").values())
        axis.plot([max(x, 1e-4)] * len(values), values, "o", color=FAINT, markersize=3)
        axis.plot(max(x, 1e-4), statistics.fmean(values), "o", color=ENGINE, markersize=5)
        below = name in ("kv-fp8", "nf4")
        axis.annotate(
            name,
            (max(x, 1e-4), statistics.fmean(values)),
            xytext=(5, -10 if below else 3),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.set_xlabel("mean delta at the first step (none: 1e-8)")
    finish(axis, legend=False)
    return figure


def draw_llama_cpp_q4(folder):
    """Pass rate, delta and lambda with llama.cpp in Q4_0: each seed, and the means."""
    arms = read(folder, "llama_cpp_q4")
    colors = {"exact": INK, "grpo": TRAINER, "dcgrpo": ENGINE}
    names = {"exact": "no mismatch", "grpo": "GRPO", "dcgrpo": "DC-GRPO"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axis, measure, shown, title in zip(
        axes,
        ("reward_eval_infer", "delta_mean", "multiplier"),
        (("exact", "grpo", "dcgrpo"), ("grpo", "dcgrpo"), ("dcgrpo",)),
        ("held-out pass rate of the engine's policy", "delta", "lambda"),
        strict=True,
    ):
        for arm in shown:
            courses = [[row[measure] for row in rows] for rows in arms[arm].values()]
            steps = [row["step"] for row in arms[arm][0]]
            for course in courses:
                axis.plot(steps, course, color=colors[arm], lw=0.8, alpha=0.45)
            means = [statistics.fmean(values) for values in zip(*courses, strict=True)]
            axis.plot(steps, means, color=colors[arm], lw=2, label=names[arm])
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=10)
    for number, tolerance in enumerate(tolerances(folder, "llama_cpp_q4").values()):
        label = None if number else "tolerance of a seed"
        axes[1].axhline(tolerance, color=ENGINE, lw=0.8, ls="--", label=label, zorder=0)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="lower right")
    axes[1].legend(frameon=False, loc="lower left")
    return figure


def draw_points(axis, points, label, color):
    means = [statistics.fmean(last(runs, "reward_eval_infer").values()) for runs in points.values()]
    for x, runs in points.items():
        axis.plot(
            [x] * len(runs),
            list(last(runs, "reward_eval_infer").values()),
            "o",
            color=color,
            alpha=0.35,
            markersize=3.5,
            markeredgewidth=0,
        )
    ends = [list(last(runs, "reward_eval_infer").values()) for runs in points.values()]
    half = [
        intervals.mean(end).high - statistics.fmean(end) if len(end) > 2 else 0.0 for end in ends
    ]
    axis.errorbar(
        list(points), means, half, color=color, label=label, lw=1.6, elinewidth=0.9, capsize=2
    )


def finish(axis, legend=True):
    axis.set_ylim(0, 1)
    axis.set_ylabel("held-out pass rate of the engine's policy")
    if legend:
        axis.legend(frameon=False)
