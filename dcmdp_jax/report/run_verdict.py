"""What happened in a run, in sentences computed from its rows."""

from __future__ import annotations

import math
import statistics

from dcmdp_jax.monitoring import metrics, quantities
from dcmdp_jax.report.line_chart import finite
from dcmdp_jax.report.run_data import (
    Config,
    Rows,
    counted,
    last_tenth,
    noise_of_evaluations,
    points_of,
    setting,
    tolerance_of,
)


def verdict(config: Config, rows: Rows) -> list[str]:
    """Returns the sentences about a run, in a paragraph for each of its topics."""
    if not rows:
        return ["No step was finished."]
    paragraphs = [
        _progress(config, rows),
        _rewards(config, rows),
        _cut_off(config, rows),
        _delta(config, rows),
        _multiplier(config, rows),
        _skipped(rows),
    ]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _skipped(rows: Rows) -> list[str]:
    """Says how many updates were left out."""
    skipped = rows[-1].get("skipped")
    if not skipped:
        return []
    were = "was" if skipped == 1 else "were"
    return [
        f"{counted(skipped, 'update')} {were} left out because the loss or its gradient was not "
        "finite."
    ]


def _progress(config: Config, rows: Rows) -> list[str]:
    """Says if the run stopped early, or made no update at all."""
    sentences = []
    last = rows[-1]["step"]
    total = config.get("steps", last)
    if last < total:
        sentences.append(f"The run stopped at step {last} of {total}.")
    epochs = setting(config, "algorithm", "epochs") or 1
    minibatches = setting(config, "algorithm", "minibatches") or 1
    skipped = rows[-1].get("skipped")
    if skipped and skipped == last * epochs * minibatches:
        sentences.append("Nothing was learnt: every update was left out.")
    return sentences


def _rewards(config: Config, rows: Rows) -> list[str]:
    """Says how each policy's held-out reward changed, or the training reward if nothing was held
    out.
    """
    sentences = []
    for key, owner in quantities.HELD_OUT:
        subject = f"Held-out reward of the {owner}'s policy"
        points = finite(points_of(rows, key))
        if len(points) == 1:
            step, value = points[0]
            sentences.append(f"{subject} was {value:.3f} at step {step}.")
        elif points:
            first, start = points[0]
            last, end = points[-1]
            change = "rose from" if end > start else "fell from"
            if abs(end - start) <= noise_of_evaluations(config):
                change = "stayed within sampling noise, from"
            sentences.append(
                f"{subject} {change} {start:.3f} (step {first}) to {end:.3f} (step {last})."
            )
    training = finite(points_of(rows, "reward"))
    if not sentences and training:
        sentences.append(
            f"Nothing was held out; the training reward went from {training[0][1]:.3f} to "
            f"{training[-1][1]:.3f}."
        )
    return sentences


def _cut_off(config: Config, rows: Rows) -> list[str]:
    """Says how many completions the length limit cut off at the end of the run."""
    shares = [share for _, share in finite(points_of(last_tenth(rows), "truncated"))]
    if not shares or not sum(shares):
        return []
    mean = statistics.fmean(shares)
    limit = setting(config, "rollout", "max_tokens")
    which = "All completions" if mean == 1 else f"{mean:.1%} of the completions"
    return [f"{which} were cut off by the limit of {limit} tokens {_over_last(len(shares))}."]


def _delta(config: Config, rows: Rows) -> list[str]:
    """Says if mean delta was within the tolerance, if it could not be measured, and if the
    tolerance can be met at all.
    """
    sentences = []
    tolerance = tolerance_of(config)
    deltas = [value for _, value in finite(points_of(rows, "delta_mean"))]
    at_end = [value for _, value in finite(points_of(last_tenth(rows), "delta_mean"))]
    if at_end and tolerance is not None:
        mean = statistics.fmean(at_end)
        inside = sum(value <= tolerance for value in deltas)
        sentences.append(
            f"Mean delta was {mean:.4g} {_over_last(len(at_end))}, "
            f"{'within' if mean <= tolerance else 'above'} the tolerance of {tolerance:g}; "
            f"{inside} of {counted(len(deltas), 'step')} ({inside / len(deltas):.0%}) "
            "lay inside it."
        )
    expected = sum("delta_mean" in row for row in rows)
    if len(deltas) < expected:
        sentences.append(
            f"Delta could be measured in {len(deltas)} of {counted(expected, 'step')}; in the "
            "others log-probs were not finite, or there was no token."
        )
    floor = metrics.floor_lower_bound(rows[0])
    if floor is not None and tolerance is not None and tolerance < floor:
        sentences.append(
            "The tolerance lies under the floor: with the weights that the run began with "
            f"mean delta was {rows[0]['delta_mean']:.4g}, at which no multiplier could "
            "have met it."
        )
    return sentences


def _multiplier(config: Config, rows: Rows) -> list[str]:
    """Says where lambda ended, and if its upper bound kept the constraint from being enforced in
    full.
    """
    points = finite(points_of(rows, "multiplier_next")) or finite(points_of(rows, "multiplier"))
    if not points:
        return []
    sentences = [f"After the last update the multiplier is {points[-1][1]:.4g}."]
    bound = setting(config, "constraint", "multiplier_max") or math.inf
    at_bound = sum(value >= bound * (1 - 1e-6) for _, value in points)  # the run clips in float32
    if at_bound:
        sentences.append(
            f"It stood at its upper bound of {bound:g} after {at_bound} of "
            f"{counted(len(points), 'step')}."
        )
    if saturated := rows[-1].get("saturated"):
        sentences.append(
            f"In the last {counted(saturated, 'step')} it was held there with delta above "
            "the tolerance: the constraint is not enforced in full."
        )
    return sentences


def _over_last(steps: int) -> str:
    return "at the last step" if steps == 1 else f"over the last {steps} steps"
