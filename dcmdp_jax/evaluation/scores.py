"""What samples of problems say about a policy: avg@k, pass@k, majority@k, with bootstrap intervals
over problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # of the bootstrap
Z = 1.96  # 97.5 % quantile of the normal distribution


class Samples(NamedTuple):
    """k samples of each of n problems."""

    # [n, k] bool: the stated answer is right, whether or not the completion came to its end
    right: np.ndarray
    stopped: np.ndarray  # [n, k] bool: not cut off by the length limit
    tokens: np.ndarray  # [n, k] int
    # [n, k] int: number of the answer among the problem's different ones; -1 states none
    vote: np.ndarray


class Interval(NamedTuple):
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


def summary(samples: Samples) -> dict[str, Interval | float]:
    """The figures of one set, by name; rates in [0, 1], lengths in tokens.

    `avg@k` is the share of right samples, `completed@k` of those that are right and came to their
    end; `pass@j` is given for k and the powers of two below it.
    """
    k = samples.right.shape[1]
    powers = [1 << i for i in range(k.bit_length()) if 1 << i < k]
    problems = {
        f"avg@{k}": samples.right.mean(axis=1),
        f"completed@{k}": (samples.right & samples.stopped).mean(axis=1),
    }
    problems |= {f"pass@{j}": pass_at(samples.right.sum(axis=1), k, j) for j in [*powers, k]}
    problems[f"majority@{k}"] = np.array(
        [majority(*row) for row in zip(samples.vote, samples.right)]
    )
    problems["truncated"] = 1 - samples.stopped.mean(axis=1)
    problems["answered"] = (samples.vote >= 0).mean(axis=1)
    quantiles = np.quantile(samples.tokens, [0.1, 0.5, 0.9])
    lengths = {
        f"tokens_{name}": float(value) for name, value in zip(("p10", "median", "p90"), quantiles)
    }
    lengths["tokens_max"] = float(samples.tokens.max())
    return (
        {name: rate(values) for name, values in problems.items()}
        | {"tokens": bootstrap(samples.tokens.mean(axis=1))}
        | lengths
    )


def pass_at(right: np.ndarray, n: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, unbiased from `right` right ones of n: 1 -
    C(n - c, k) / C(n, k).

    Chen et al., Evaluating Large Language Models Trained on Code, 2021. Raises ValueError where k
    is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right])


def majority(vote: np.ndarray, right: np.ndarray) -> float:
    """1.0 where the most frequent answer is right; of answers equally frequent, the share that are
    right.

    `vote` [k] numbers the answers, -1 for none; 0.0 where there is none at all.
    """
    counts = np.bincount(vote[vote >= 0])
    if not counts.size:
        return 0.0
    return float(
        np.mean([right[vote == winner].all() for winner in np.flatnonzero(counts == counts.max())])
    )


def votes(
    answers: Sequence[str | None], right: Sequence[bool], equal: Callable[[str, str], bool]
) -> np.ndarray:
    """Numbers equal answers alike, [k] int; the right ones are one answer, None is -1."""
    found = np.full(len(answers), -1)
    kinds = []
    for i, answer in enumerate(answers):
        if answer is not None:
            same = (
                j
                for j, (kind, good) in enumerate(kinds)
                if good == right[i] and (good or equal(kind, answer))
            )
            found[i] = next(same, len(kinds))
            if found[i] == len(kinds):
                kinds.append((answer, right[i]))
    return found


def rate(values: np.ndarray) -> Interval:
    """`bootstrap` of rates in [0, 1]; where all n are 0, or all 1, it sees no spread, and Wilson's
    bound stands: z^2 / (n + z^2).
    """
    found = bootstrap(values)
    bound = Z**2 / (len(values) + Z**2)
    if found.low == found.high in (0.0, 1.0):
        return Interval(found.mean, max(found.low - bound, 0.0), min(found.high + bound, 1.0))
    return found


def bootstrap(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of one value a problem, and the 2.5 and 97.5 % quantiles of the means of problems drawn
    with replacement.
    """
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(len(values), size=(1000, len(values)))].mean(axis=1)
        for _ in range(draws // 1000)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def table(summaries: dict[str, dict]) -> list[tuple[str, ...]]:
    """Rows of cells, a heading first: a line a set, percentages with their intervals."""

    def cell(figures: dict, name: str) -> str:
        key = next(key for key in figures if key.split("@")[0] == name)
        mean, low, high = (100 * x for x in figures[key])
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    names = ("avg", "completed", "majority", "truncated", "answered")
    rows = [("set", "problems", "k", *names[:2], "pass@k", *names[2:], "tokens (median, p90)")]
    for name, figures in summaries.items():
        k = figures["samples"]
        most = f"pass@{figures['samples']}"
        first, second, *rest = (cell(figures, of) for of in names)
        rows.append(
            (
                name,
                str(figures["problems"]),
                str(k),
                first,
                second,
                cell({"pass": figures[most]}, "pass"),
                *rest,
                f"{figures['tokens'][0]:.0f} ({figures['tokens_median']:.0f}, {figures['tokens_p90']:.0f})",
            )
        )
    return rows
