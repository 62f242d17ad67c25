"""95 % confidence intervals of a pass rate, of a mean over seeds, and of the difference of two
estimates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
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
            f"a pass rate lies in [0, 1] and is over at least one prompt; {rate} over {count} is none"
        )
    square = Z * Z / count
    middle = rate + square / 2
    half = Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    # At 0 and 1 the bound is the rate itself; round-off may lie beyond it.
    return Interval(
        rate, min(rate, (middle - half) / (1 + square)), max(rate, (middle + half) / (1 + square))
    )


def mean(values: Sequence[float]) -> Interval:
    """Student's interval of a mean over independent runs: m ± t(n - 1) s / sqrt(n). Raises
    ValueError for fewer than two.
    """
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two runs")
    middle = statistics.fmean(values)
    half = (
        float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return Interval(middle, middle - half, middle + half)


def difference(one: Interval, other: Interval) -> Interval:
    """one - other, for independent estimates, from their own intervals (Newcombe, Stat. Med. 17,
    1998; Zou, Donner, 2008).

        d - sqrt((p - l)^2 + (u' - p')^2)   to   d + sqrt((u - p)^2 + (p' - l')^2)
    """
    gap = one.value - other.value
    return Interval(
        gap,
        gap - math.hypot(one.value - one.low, other.high - other.value),
        gap + math.hypot(one.high - one.value, other.value - other.low),
    )
