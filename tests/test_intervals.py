"""Intervals against SciPy's and against their published example."""

import numpy as np
import pytest
import scipy.stats

from dcmdp_jax.evaluation import intervals


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


VALUES = np.repeat([0.0, 1.0], [280, 120])


def test_the_bootstrap_interval_is_the_binomial_one():
    interval = intervals.bootstrap(VALUES)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert interval == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.004)


def test_the_bootstrap_is_deterministic():
    assert intervals.bootstrap(VALUES) == intervals.bootstrap(VALUES)


def test_the_bootstrap_of_equal_values_is_their_value():
    assert intervals.bootstrap(np.full(7, 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("value, count", [(0.0, 30), (1.0, 40)])
def test_no_success_at_all_leaves_room_for_some(value, count):
    rates = np.full(count, value)
    assert intervals.bootstrap_rate(rates) == intervals.wilson(value, count)


def test_rates_that_differ_have_the_bootstrap_interval():
    rates = np.array([0.0, 0.5])
    assert intervals.bootstrap_rate(rates) == intervals.bootstrap(rates)


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
