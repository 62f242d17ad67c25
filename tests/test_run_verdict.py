"""The sentences about a run can be checked by hand."""

import math

import numpy as np
import pytest

from dcmdp_jax.report import run_data, run_verdict
from support.pages import CONFIG, ROWS


def verdict(config, rows):
    return " ".join(run_verdict.verdict(config, rows))


def test_a_verdict_by_hand():
    assert verdict(CONFIG, ROWS) == (
        "Held-out reward of the engine's policy rose from 0.250 (step 1) to 0.750 (step 4). "
        "Held-out reward of the trainer's policy stayed within sampling noise, from 0.375 (step 1) "
        "to 0.385 (step 4). "
        "Mean delta was 0.004 at the last step, within the tolerance of 0.01; 2 of 4 steps (50%) "
        "lay inside it. "
        "After the last update the multiplier is 0.125. It stood at its upper bound of 0.2 after 2 "
        "of 4 steps."
    )


@pytest.mark.parametrize(
    "end, says",
    [
        (0.25 + 0.0624, "stayed within"),
        (0.25 + 0.0626, "rose"),
        (0.25 - 0.0624, "stayed within"),
        (0.25 - 0.0626, "fell"),
    ],
)
def test_a_change_of_two_standard_errors_is_called_one(end, says):
    """2 sqrt(2) 0.5 / sqrt(512) = 0.0625."""
    rows = [ROWS[0], {"step": 4, "reward_eval_infer": end}]
    assert f"engine's policy {says}" in verdict(CONFIG, rows)


def test_a_multiplier_at_its_bound_in_float32_is_at_its_bound():
    config = CONFIG | {"constraint": {"multiplier_max": 0.7}}
    below = float(np.float32(0.7))  # 0.69999999
    rows = [{"step": 1, "multiplier": below}, {"step": 2, "multiplier": 0.69}]
    assert "upper bound of 0.7 after 1 of 2 steps" in verdict(config, rows)


def test_an_interruption_is_told_first():
    assert verdict(CONFIG | {"steps": 9}, ROWS).startswith("The run stopped at step 4 of 9.")


def test_a_delta_above_the_tolerance_is_told():
    rows = [*ROWS[:3], ROWS[3] | {"delta_mean": 0.02}]
    assert "above the tolerance of 0.01; 1 of 4 steps (25%)" in verdict(CONFIG, rows)


def test_skipped_updates_are_told():
    assert "1 update was left out" in verdict(CONFIG, [*ROWS[:3], ROWS[3] | {"skipped": 1}])


@pytest.mark.parametrize("skipped, told", [(7, False), (8, True)])
def test_a_run_that_skipped_every_update_learnt_nothing(skipped, told):
    config = CONFIG | {"algorithm": {"epochs": 1, "minibatches": 2}}
    sentences = verdict(config, [*ROWS[:3], ROWS[3] | {"skipped": skipped}])
    assert f"{skipped} updates were left out" in sentences
    assert ("Nothing was learnt: every update was left out." in sentences) == told


def test_a_delta_that_was_not_measured_is_told():
    sentences = verdict(CONFIG, [row | {"delta_mean": None} for row in ROWS])
    assert "Delta could be measured in 0 of 4 steps" in sentences
    assert "Mean delta" not in sentences


@pytest.mark.parametrize(
    "share, told",
    [
        (1.0, "All completions were cut off by the limit of 32 tokens at the last step."),
        (0.25, "25.0% of the completions were cut off by the limit of 32 tokens"),
    ],
)
def test_completions_cut_off_are_told(share, told):
    assert told in verdict(CONFIG, [row | {"truncated": share} for row in ROWS])


def test_no_completion_cut_off_is_not_told():
    assert "cut off" not in verdict(CONFIG, [row | {"truncated": 0.0} for row in ROWS])


def test_a_bound_that_holds_the_multiplier_is_told():
    sentences = verdict(CONFIG, [*ROWS[:3], ROWS[3] | {"saturated": 2}])
    assert "In the last 2 steps it was held there with delta above the tolerance" in sentences


@pytest.mark.parametrize("deviation, told", [(0.1, True), (0.15, False)])
def test_a_tolerance_under_the_floor_is_told(deviation, told):
    """0.03 - 3 deviation / sqrt(500) is 0.0166 or 0.0099, against a tolerance of 0.01."""
    sentences = verdict(CONFIG, [row | {"prob_diff_std": deviation} for row in ROWS])
    under = (
        "The tolerance lies under the floor: with the weights that the run began with "
        "mean delta was 0.03, at which no multiplier"
    )
    assert (under in sentences) == told


def test_smoothing_is_a_trailing_mean_over_finite_values():
    points = [(1, 2.0), (2, 4.0), (3, math.nan), (4, 9.0), (5, math.nan), (6, math.nan)]
    smooth = [value for _, value in run_data.smoothed(points, 2)]
    assert smooth[:5] == [2.0, 3.0, 4.0, 9.0, 9.0] and math.isnan(smooth[5])
