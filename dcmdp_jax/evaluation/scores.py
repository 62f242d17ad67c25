"""Figures of an evaluation: avg@k, pass@k, majority@k, with bootstrap intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcmdp_jax.evaluation.intervals import Interval, bootstrap, bootstrap_rate


class Samples(NamedTuple):
    """k samples of each of n problems."""

    right: np.ndarray  # [n, k] bool: the stated answer is right, even if the completion is cut off
    stopped: np.ndarray  # [n, k] bool: not cut off by the length limit
    tokens: np.ndarray  # [n, k] int
    vote: np.ndarray  # [n, k] int, as `votes` gives it


def summary(samples: Samples) -> dict[str, Interval | float]:
    """Returns the figures of one set by name; rates in [0, 1], lengths in tokens.

    `avg@k` is the share of right samples, `completed@k` of those that are right and not cut off;
    `pass@j` is given for k and the powers of two below it.
    """
    k = samples.right.shape[1]
    powers = [1 << i for i in range(k.bit_length()) if 1 << i < k]
    rates = {
        f"avg@{k}": samples.right.mean(axis=1),
        f"completed@{k}": (samples.right & samples.stopped).mean(axis=1),
    }
    rates |= {f"pass@{j}": pass_at(samples.right, j) for j in [*powers, k]}
    rates[f"majority@{k}"] = np.array(
        [majority(vote, right) for vote, right in zip(samples.vote, samples.right)]
    )
    rates["truncated"] = 1 - samples.stopped.mean(axis=1)
    rates["answered"] = (samples.vote >= 0).mean(axis=1)
    figures = {name: bootstrap_rate(values) for name, values in rates.items()}
    p10, median, p90 = np.quantile(samples.tokens, [0.1, 0.5, 0.9])
    return figures | {
        "tokens": bootstrap(samples.tokens.mean(axis=1)),
        "tokens_p10": float(p10),
        "tokens_median": float(median),
        "tokens_p90": float(p90),
        "tokens_max": float(samples.tokens.max()),
    }


def pass_at(right: np.ndarray, k: int) -> np.ndarray:
    """Returns for each problem the chance that at least one of k samples is right, [n] float64.

    Formula: 1 - C(samples - c, k) / C(samples, k), c right ones of `right` [n, samples]; in whole
    numbers, so it is exact for any k. Paper: Chen et al., arXiv 2107.03374. Under autodiff and in
    float32: `losses.advantages.pass_at_k`.

    Raises ValueError unless k is in 1..samples.
    """
    samples = right.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples")
    subsets = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(c), k) / subsets for c in right.sum(axis=1)])


def majority(vote: np.ndarray, right: np.ndarray) -> float:
    """Returns 1.0 if the most frequent answer is right; if several are equally frequent, the share
    of them that are right; 0.0 if no sample states an answer.

    `vote` [k] numbers the answers, -1 for none; `right` [k] bool.
    """
    counts = np.bincount(vote[vote >= 0])
    if not counts.size:
        return 0.0
    winners = np.flatnonzero(counts == counts.max())
    return float(np.mean([right[vote == winner].all() for winner in winners]))


def votes(
    answers: Sequence[str | None], right: Sequence[bool], equal: Callable[[str, str], bool]
) -> np.ndarray:
    """Numbers the different answers of a problem from 0 on, [k] int; -1 if a sample states none.

    All right answers are one; of wrong ones `equal` decides.
    """
    numbers = np.full(len(answers), -1)
    distinct: list[tuple[str, bool]] = []  # the first answer of each number, and if it is right
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        for number, (other, other_right) in enumerate(distinct):
            if other_right == right[i] and (other_right or equal(other, answer)):
                numbers[i] = number
                break
        else:
            numbers[i] = len(distinct)
            distinct.append((answer, right[i]))
    return numbers


def table(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns rows of cells: a header, then a line for each set, with percentages and their
    intervals.
    """
    header = ["set", "problems", "k", "avg", "completed", "pass@k", "majority", "truncated"]
    rows = [[*header, "answered", "tokens (median, p90)"]]
    for name, figures in summaries.items():
        k = figures["samples"]
        rates = (f"avg@{k}", f"completed@{k}", f"pass@{k}", f"majority@{k}")
        length = "{:.0f} ({:.0f}, {:.0f})".format(
            figures["tokens"][0], figures["tokens_median"], figures["tokens_p90"]
        )
        rows.append(
            [
                name,
                str(figures["problems"]),
                str(k),
                *(_percent(figures[rate]) for rate in (*rates, "truncated", "answered")),
                length,
            ]
        )
    return rows


def _percent(interval: Interval) -> str:
    value, low, high = (100 * x for x in interval)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
