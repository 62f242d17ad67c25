"""What to do next about a run: for each sign of trouble in its rows a sentence that names the
settings to change and the section of the documentation that says more.
"""

from __future__ import annotations

import math
import statistics

from dcmdp_jax.monitoring import metrics, quantities
from dcmdp_jax.report.line_chart import finite
from dcmdp_jax.report.run_data import (
    Config,
    Rows,
    last_tenth,
    noise_of_evaluations,
    points_of,
    setting,
    tolerance_of,
)

SOLVED = 0.9  # mean reward from which most problems count as solved
CUT_OFF = 0.1  # share of completions from which their number is worth a change
COLLAPSED = 0.25  # of what entropy was at the start
ALIKE = 0.1  # of the spread of rewards of 0 and 1 with the same mean that chance alone hands out

UNDER_FLOOR = (
    "The tolerance is under the floor: measure the floor with dcmdp calibrate, and set "
    "constraint.tolerance above it (docs/troubleshooting.md#the-tolerance-is-under-the-floor)."
)
RISES_WITH_LAMBDA = (
    "Delta rises with lambda, and the constraint does not hold it: take more bits in "
    "rollout.precision, or a smaller algorithm.learning_rate "
    "(docs/troubleshooting.md#delta-rises-with-lambda)."
)
AT_BOUND = (
    "Lambda is at its bound with delta above the tolerance, so that the constraint is not enforced "
    "in full: make the gap smaller with more bits in rollout.precision or a smaller "
    "algorithm.learning_rate; if lambda overshot, lower constraint.dual_lr "
    "(docs/troubleshooting.md#lambda-at-its-bound)."
)
ENTROPY_COLLAPSED = (
    "Entropy collapsed, and a prompt's completions are nearly alike while problems are unsolved: "
    "set algorithm.entropy_coefficient, or raise rollout.temperature "
    "(docs/troubleshooting.md#entropy-falls-to-0-or-rises)."
)
ENTROPY_ROSE = (
    "The reward fell while entropy rose, as in runs that collapse: lower algorithm.learning_rate "
    "(docs/troubleshooting.md#entropy-falls-to-0-or-rises)."
)
CUT_OFF_ANSWERS = (
    "Many completions are cut off: raise rollout.max_tokens, or leave them out of the loss with "
    "algorithm.mask (docs/troubleshooting.md#answers-are-cut-off)."
)
ALL_ALIKE = (
    "All completions of a prompt earn the same, so that nothing is learnt: take easier problems in "
    "data.path, or more rollout.samples (docs/troubleshooting.md#reward-stays-0)."
)
ALL_SOLVED = (
    "All completions of a prompt earn the same because the problems are solved: take harder ones "
    "in data.path (docs/metrics.md#reward)."
)
SKIPPED = (
    "Updates were left out because they were not finite: lower algorithm.learning_rate in a "
    "--workdir of its own (docs/troubleshooting.md#updates-are-skipped)."
)
ENGINE_BEHIND = (
    "The engine's policy ends behind the trainer's: reconsider the correction in "
    "algorithm.surrogate (docs/which_correction.md#the-table), or take more bits in "
    "rollout.precision (docs/troubleshooting.md#held-out-engine-behind-held-out-trainer)."
)


def advice(config: Config, rows: Rows) -> list[str]:
    """Returns what to do next, the most urgent first; nothing if the rows show no sign of
    trouble.
    """
    if not rows:
        return []
    return [
        *_not_finite(rows),
        *_constraint(config, rows),
        *_policy(config, rows),
        *_completions(rows),
    ]


def _not_finite(rows: Rows) -> list[str]:
    """A single skipped update is harmless, unless it is the last one."""
    last = rows[-1]
    skipped = last.get("skipped") or 0
    before = (rows[-2].get("skipped") or 0) if len(rows) > 1 else 0
    return [SKIPPED] if skipped > 1 or skipped > before else []


def _constraint(config: Config, rows: Rows) -> list[str]:
    if not any(setting(config, "constraint", name) for name in ("shaping", "penalty")):
        return []  # lambda acts on nothing
    tolerance = tolerance_of(config)
    floor = metrics.floor_lower_bound(rows[0])
    found = []
    if floor is not None and tolerance is not None and tolerance < floor:
        found.append(UNDER_FLOOR)
    at_end = _mean_at_end(rows, "delta_mean")
    is_above = tolerance is not None and at_end > tolerance
    if is_above and _rises(rows, "delta_mean") and _rises(rows, "multiplier"):
        found.append(RISES_WITH_LAMBDA)
    elif rows[-1].get("saturated") and UNDER_FLOOR not in found:
        found.append(AT_BOUND)
    return found


def _policy(config: Config, rows: Rows) -> list[str]:
    found = []
    reward = _mean_at_end(rows, "reward")
    spread = _mean_at_end(rows, "reward_spread")
    entropy = _end_over_start(rows, "entropy")
    is_unsolved = 0 < reward < SOLVED
    if entropy < COLLAPSED and is_unsolved and spread < ALIKE * math.sqrt(reward * (1 - reward)):
        found.append(ENTROPY_COLLAPSED)
    elif spread == 0:
        found.append(ALL_SOLVED if reward >= SOLVED else ALL_ALIKE)
    # from the start on, or from the middle, where a run may be best
    spans = (rows, rows[len(rows) // 2 :])
    if any(_falls(span, "reward") and _rises(span, "entropy") for span in spans):
        found.append(ENTROPY_ROSE)
    ends = [finite(points_of(rows, key)) for key, _ in quantities.HELD_OUT]
    # trained through the engine's rounding, the trainer's own policy is nobody's
    if all(ends) and not setting(config, "algorithm", "quantize_aware"):
        engine, trainer = (points[-1][1] for points in ends)
        if 0 < noise_of_evaluations(config) < trainer - engine:
            found.append(ENGINE_BEHIND)
    return found


def _completions(rows: Rows) -> list[str]:
    return [CUT_OFF_ANSWERS] if _mean_at_end(rows, "truncated") >= CUT_OFF else []


def _values(rows: Rows, key: str) -> list[float]:
    return [value for _, value in finite(points_of(rows, key))]


def _mean_at_end(rows: Rows, key: str) -> float:
    """Returns the mean over the last tenth of the steps; nan, which no comparison holds for, if it
    has no finite value.
    """
    values = _values(last_tenth(rows), key)
    return statistics.fmean(values) if values else math.nan


def _end_over_start(rows: Rows, key: str) -> float:
    """Returns the mean over the last tenth divided by that over the first; nan if there is none."""
    start = _values(rows[: len(last_tenth(rows))], key)
    first = statistics.fmean(start) if start else 0.0
    return _mean_at_end(rows, key) / first if first else math.nan


def _rises(rows: Rows, key: str) -> bool:
    """True if the last third of the values lies above the first third by more than two standard
    errors of the difference; False of fewer than six values.
    """
    values = _values(rows, key)
    third = len(values) // 3
    if third < 2:
        return False
    start = values[:third]
    end = values[-third:]
    variance = (statistics.variance(start) + statistics.variance(end)) / third
    return statistics.fmean(end) - statistics.fmean(start) > 2 * math.sqrt(variance)


def _falls(rows: Rows, key: str) -> bool:
    return _rises(rows[::-1], key)
