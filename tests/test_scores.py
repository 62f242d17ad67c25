"""Figures of an evaluation against closed forms and enumeration."""

import itertools

import numpy as np
import pytest

from dcmdp_jax.evaluation import scores
from dcmdp_jax.evaluation.intervals import Interval


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    """Of n + 1 problems, with 0 to n right samples."""
    right = np.arange(n) < np.arange(n + 1)[:, None]
    for k in range(1, n + 1):
        enumerated = [
            np.mean([row[list(subset)].any() for subset in itertools.combinations(range(n), k)])
            for row in right
        ]
        np.testing.assert_allclose(scores.pass_at(right, k), enumerated, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_none_or_of_more_samples_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 4 samples"):
        scores.pass_at(np.ones((1, 4), bool), k)


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


@pytest.fixture
def two_problems():
    """Two problems, four samples; of three right ones in the first, one was cut off."""
    return scores.summary(
        scores.Samples(
            right=np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool),
            stopped=np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool),
            tokens=np.array([[10, 20, 99, 30], [40, 99, 99, 99]]),
            vote=np.array([[0, 0, 0, 1], [0, -1, -1, -1]]),
        )
    )


def test_the_figures_of_a_set(two_problems):
    values = {
        name: figure.value for name, figure in two_problems.items() if isinstance(figure, Interval)
    }
    assert values == pytest.approx(
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


def test_an_interval_is_over_problems(two_problems):
    assert two_problems["avg@4"][1:] == (0.0, 0.75), "of two problems a mean is one of three"


def test_lengths_are_over_samples(two_problems):
    assert (two_problems["tokens_median"], two_problems["tokens_max"]) == (69.5, 99)


def test_the_table_has_percentages_with_intervals(two_problems):
    header, row = scores.table({"aime24": {"problems": 2, "samples": 4, **two_problems}})
    assert header[:6] == ["set", "problems", "k", "avg", "completed", "pass@k"]
    assert row[:3] == ["aime24", "2", "4"]
    assert row[3:6] == ["37.5 [0.0, 75.0]", "25.0 [0.0, 50.0]", "50.0 [0.0, 100.0]"]


def test_powers_of_two_below_k():
    samples = scores.Samples(*(np.zeros((3, 6), kind) for kind in (bool, bool, int, int)))
    assert [name for name in scores.summary(samples) if name.startswith("pass")] == [
        "pass@1",
        "pass@2",
        "pass@4",
        "pass@6",
    ]
