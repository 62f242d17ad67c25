"""Figures of an evaluation against closed forms and enumeration."""

import itertools

import numpy as np
import pytest

from dcmdp_jax import intervals
from dcmdp_jax.evaluation import scores


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for k in range(1, n + 1):
        enumerated = [
            np.mean([min(subset) < c for subset in itertools.combinations(range(n), k)])
            for c in range(n + 1)
        ]
        np.testing.assert_allclose(scores.pass_at(np.arange(n + 1), n, k), enumerated, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 4 samples"):
        scores.pass_at(np.array([1]), 4, k)


@pytest.mark.parametrize(
    "vote, right, expected",
    [
        ([0, 0, 1], [1, 1, 0], 1),
        ([0, 1, 1], [1, 0, 0], 0),
        ([0, 1, -1], [1, 0, 0], 0.5),
        ([-1, -1, -1], [0, 0, 0], 0),
        ([-1, -1, 0], [0, 0, 1], 1),
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 0, 0], 1 / 3),
    ],
)
def test_majority_takes_the_most_frequent_answer(vote, right, expected):
    assert scores.majority(np.array(vote), np.array(right, bool)) == pytest.approx(expected)


def test_equal_answers_vote_together():
    answers = ["0.5", "2", None, "1/2", "2.0", "7", "02"]
    vote = scores.votes(
        answers,
        [a in ("0.5", "1/2") for a in answers],
        lambda one, other: float(one) == float(other),
    )
    np.testing.assert_array_equal(vote, [0, 1, -1, 0, 1, 2, 1])


def test_right_answers_are_one_answer_unasked_and_never_join_a_wrong_one():
    def equal(one, other):
        raise AssertionError("nothing to compare")

    np.testing.assert_array_equal(
        scores.votes(["a", "b", "c"], [True, True, False], equal), [0, 0, 1]
    )


def test_the_bootstrap_interval_is_the_binomial_one():
    values = np.repeat([0.0, 1.0], [280, 120])
    mean, low, high = scores.bootstrap(values)
    assert mean == 0.3
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.004) and high == pytest.approx(
        0.3 + half, abs=0.004
    )
    assert scores.bootstrap(np.full(7, 0.25)) == (0.25, 0.25, 0.25)
    assert scores.bootstrap(values) == scores.bootstrap(values)


def test_no_success_at_all_leaves_room_for_some():
    """Where the bootstrap has nothing to draw from, the interval is Wilson's."""
    for value, count in ((0.0, 30), (1.0, 40)):
        expected = intervals.wilson(value, count)
        np.testing.assert_allclose(
            scores.rate(np.full(count, value)), (value, expected.low, expected.high), atol=1e-4
        )
    assert scores.rate(np.array([0.0, 0.5])) == scores.bootstrap(np.array([0.0, 0.5]))


def test_summary_tells_right_from_right_and_complete():
    """Two problems, four samples; of three right ones in the first, one was cut off."""
    samples = scores.Samples(
        right=np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool),
        stopped=np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool),
        tokens=np.array([[10, 20, 99, 30], [40, 99, 99, 99]]),
        vote=np.array([[0, 0, 0, 1], [0, -1, -1, -1]]),
    )
    found = scores.summary(samples)
    means = {
        name: value.mean for name, value in found.items() if isinstance(value, scores.Interval)
    }
    assert means == pytest.approx(
        {
            "avg@4": 3 / 8,
            "completed@4": 2 / 8,
            "pass@1": 3 / 8,
            "pass@2": 1 / 2,
            "pass@4": 1 / 2,
            "majority@4": 1 / 2,
            "truncated": 4 / 8,
            "answered": 5 / 8,
            "tokens": 496 / 8,
        }
    )
    assert found["avg@4"][1:] == (0.0, 0.75)  # of two problems every mean is one of three
    assert found["tokens_max"] == 99 and found["tokens_median"] == 69.5
    rows = scores.table({"aime24": {"problems": 2, "samples": 4, **found}})
    assert rows[0][:6] == ("set", "problems", "k", "avg", "completed", "pass@k")
    assert rows[1][:6] == (
        "aime24",
        "2",
        "4",
        "37.5 [0.0, 75.0]",
        "25.0 [0.0, 50.0]",
        "50.0 [0.0, 100.0]",
    )


def test_powers_of_two_below_k():
    samples = scores.Samples(*(np.zeros((3, 6), kind) for kind in (bool, bool, int, int)))
    assert [name for name in scores.summary(samples) if name.startswith("pass")] == [
        "pass@1",
        "pass@2",
        "pass@4",
        "pass@6",
    ]
