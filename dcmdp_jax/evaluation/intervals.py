"""95 % confidence intervals: of a pass rate, of a mean over problems or seeds, of a difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """An estimate and the bounds of its interval."""

    value: float
    low: float
    high: float


def wilson(rate: float, count: int) -> Interval:
    """Wilson's score interval of a rate over `count` independent answers that are right or wrong
    (JASA 22, 1927).

        (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Raises ValueError unless 0 <= rate <= 1 and count >= 1.
    """
    if not 0 <= rate <= 1 or count < 1:
        raise ValueError(
            "a pass rate must lie in [0, 1] and be over at least one prompt, "
            f"not {rate} over {count}"
        )
    square = Z * Z / count
    middle = rate + square / 2
    half = Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    # At 0 and 1 the bound is the rate itself; round-off may lie beyond it.
    low = min(rate, (middle - half) / (1 + square))
    high = max(rate, (middle + half) / (1 + square))
    return Interval(rate, low, high)


def mean(values: Sequence[float]) -> Interval:
    """Student's interval of a mean over independent runs: m ± t(n - 1) s / sqrt(n).

    Raises ValueError for fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError("an interval over seeds needs at least two runs")
    middle = statistics.fmean(values)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(middle, middle - half, middle + half)


def bootstrap(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over problems: the 2.5 and 97.5 % quantiles of the means of
    `draws` (a multiple of 1,000) samples of the problems with replacement.
    """
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(len(values), size=(1000, len(values)))].mean(axis=1)
        for _ in range(draws // 1000)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_rate(values: np.ndarray) -> Interval:
    """`bootstrap` of rates in [0, 1]; Wilson's interval if all are 0 or all are 1, where every
    bootstrap sample has the same mean.
    """
    interval = bootstrap(values)
    if interval.low == interval.high in (0.0, 1.0):
        return wilson(interval.value, len(values))
    return interval


def difference(left: Interval, right: Interval) -> Interval:
    """The interval of left - right, for independent estimates, from their own intervals (Newcombe,
    Stat. Med. 17, 1998; Zou, Donner, 2008).

        d - sqrt((p - l)^2 + (u' - p')^2)   to   d + sqrt((u - p)^2 + (p' - l')^2)
    """
    gap = left.value - right.value
    below = math.hypot(left.value - left.low, right.high - right.value)
    above = math.hypot(left.high - left.value, right.value - right.low)
    return Interval(gap, gap - below, gap + above)
