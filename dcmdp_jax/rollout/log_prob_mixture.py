"""Completions whose log-probs are of something else than the others', as where one of several
engines is set differently, or has older weights.

The rule. A completion of 8 tokens or more is odd if
    - another reading leaves at most half of its mean |difference|, and at most 0.2 nats; the mean
      of the differences is over 3 of its standard errors. Fitted temperatures are left aside, and
      it is the same reading for all odd completions; or
    - half of its tokens differ by more than 0.1 nats, their mean by more than 0.2, and it differs
      by more than 4 times as much as the quarter of completions with the smallest gaps, each gap
      over the mean of 1 - p of its tokens: a coarse engine differs where the policy is unsure.
There are three odd completions and a tenth of all, at least, and the others are explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcmdp_jax.rollout import log_prob_readings
from dcmdp_jax.rollout.log_prob_readings import Reading
from dcmdp_jax.rollout.log_prob_values import BROAD, ROUND_OFF

NUMERICAL = 0.2  # nats that an engine's number formats explain
TOKENS = 8  # of a completion, at least
HALF = 1 / 2
STANDARD_ERRORS = 3.0
TIMES = 4.0
UNSURE = 0.01  # mean of 1 - p of a completion whose gap is not round-off's
LEAST = 3  # odd completions
LEAST_SHARE = 0.1


class Odd(NamedTuple):
    """The completions that are odd."""

    completions: tuple[int, ...]
    judged: int  # completions with enough tokens
    reading: Reading | None  # that explains them; None if none does


def odd_completions(
    differences: Sequence[tuple[Reading, np.ndarray]],
    best: np.ndarray,
    trainer: np.ndarray,
    lengths: Sequence[int],
) -> Odd | None:
    """Returns the completions that the best reading of all does not explain, or None.

    Args:
      differences: each reading, and its reported less trainer's log-probs [tokens].
      best: those of the best reading.
      trainer: the trainer's log-probs of the stated distribution [tokens].
      lengths: tokens of each completion.
    """
    ends = np.cumsum(lengths)[:-1]
    rows = np.split(np.abs(best), ends)
    judged = [i for i, row in enumerate(rows) if np.isfinite(row).sum() >= TOKENS]
    means = np.array([np.nanmean(rows[i]) for i in judged])
    found = [
        (reading, _explained(rows, np.split(np.abs(difference), ends), judged))
        for reading, difference in differences
        if not log_prob_readings.is_fitted(reading)
    ]
    reading, odd = max(found, key=lambda item: means[item[1]].sum())
    if _are_enough(odd, means):
        return Odd(tuple(np.array(judged)[odd].tolist()), len(judged), reading)
    broad = np.array([np.nanmean(rows[i] > BROAD) for i in judged])
    doubt = np.split(np.where(np.isfinite(best), -np.expm1(trainer), np.nan), ends)  # 1 - p
    unsure = np.array([np.nanmean(doubt[i]) for i in judged])
    relative = means / np.maximum(unsure, UNSURE)
    known = relative[unsure > UNSURE]
    quarter = np.quantile(known, 0.25) if len(known) else np.inf
    odd = (relative > TIMES * quarter) & (means > NUMERICAL) & (broad >= HALF)
    if _are_enough(odd, means):
        return Odd(tuple(np.array(judged)[odd].tolist()), len(judged), None)
    return None


def _explained(best: list, rival: list, judged: list[int]) -> np.ndarray:
    """Returns which of the completions `judged` the rival explains, and `best` does not."""
    return np.array([_is_better(best[i], rival[i]) for i in judged], bool)


def _is_better(best: np.ndarray, rival: np.ndarray) -> bool:
    both = np.isfinite(best) & np.isfinite(rival)
    if both.sum() < TOKENS or best[both].mean() <= ROUND_OFF:
        return False
    gain = best[both] - rival[both]
    standard_error = gain.std(ddof=1) / np.sqrt(both.sum())
    left = rival[both].mean()
    return bool(
        left <= min(NUMERICAL, HALF * best[both].mean())
        and gain.mean() > STANDARD_ERRORS * standard_error
    )


def _are_enough(odd: np.ndarray, means: np.ndarray) -> bool:
    """Whether so many are odd that it is no chance, and the others are explained."""
    count = int(odd.sum())
    if count < max(LEAST, LEAST_SHARE * len(odd)) or count == len(odd):
        return False
    return bool(means[~odd].mean() <= NUMERICAL)
