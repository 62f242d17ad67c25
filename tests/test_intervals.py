"""Intervals against SciPy's and against their published example."""

import pytest
import scipy.stats

from dcmdp_jax import intervals


@pytest.mark.parametrize("right, count", [(0, 10), (3, 10), (10, 10), (301, 512), (512, 512)])
def test_wilson_is_scipys(right, count):
    found = intervals.wilson(right / count, count)
    known = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    assert found.value == right / count and found[1:] == pytest.approx(
        (known.low, known.high), abs=1e-12
    )


@pytest.mark.parametrize("values", [(0.1, 0.4), (0.5, 0.6, 0.9, 0.2), (1.0, 1.0, 1.0)])
def test_mean_is_students(values):
    found = intervals.mean(values)
    known = (
        scipy.stats.ttest_1samp(values, 0.0).confidence_interval()
        if len(set(values)) > 1
        else (1.0, 1.0)
    )
    assert found[1:] == pytest.approx(tuple(known), rel=1e-9)


def test_difference_is_newcombes_example():
    """56/70 - 48/80: 0.2000 with 0.0524 to 0.3339 (Newcombe 1998, method 10)."""
    found = intervals.difference(intervals.wilson(56 / 70, 70), intervals.wilson(48 / 80, 80))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: intervals.wilson(1.2, 3),
        lambda: intervals.wilson(0.2, 0),
        lambda: intervals.mean([1.0]),
    ],
)
def test_what_has_no_interval_is_refused(make):
    with pytest.raises(ValueError, match="at least"):
        make()
