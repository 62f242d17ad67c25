"""Reported numbers that stand for no log-prob of their token: placeholders, fillings, roundings.

`log_prob_meaning.judge` leaves the first two out, and names all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

Ids = Sequence[Sequence[int]]

ROUND_OFF = 1e-4  # nats that float32 arithmetic explains
BROAD = 0.1  # nats; other weights move half of the tokens by more
PLACEHOLDER = -1000.0  # no log-prob of a sampled token is as low
LEAST_CONTEXTS = 3  # that share a number which is none of theirs
FILLING = 0.02  # share of the tokens, at least, that are filled
UNLIKELY = -1.0  # a token that a cut leaves alone, so that its log-prob is 0, is likelier


class LeftOut(NamedTuple):
    """Which tokens [tokens] have a number that is not their log-prob."""

    floor: np.ndarray  # a placeholder, or the least value that the engine reports
    filled: np.ndarray  # a constant in the place of what was not recorded, such as padding's

    @property
    def any(self) -> np.ndarray:
        """[tokens] bool."""
        return self.floor | self.filled


def left_out(prompts: Ids, tokens: Ids, values: np.ndarray, trainer: np.ndarray) -> LeftOut:
    """Returns what is left out of `values` [tokens], beside the `trainer`'s log-probs [tokens].

    A floor is -1000 or less, or a least value that three contexts share. A filling is a number of
    -0.1 or less that three contexts and one token in 50 share, or exactly 0 for as many tokens
    with a trainer's log-prob under -1. Neither is due to rounding.
    """
    floor = values <= PLACEHOLDER
    filled = np.zeros_like(floor)
    least_count = FILLING * len(values)
    unlikely = (values == 0) & (trainer < UNLIKELY)
    if unlikely.sum() >= least_count and _is_shared(unlikely, prompts, tokens):
        filled = (values == 0) & (trainer < -BROAD)
    others = np.isfinite(values) & ~floor & ~filled
    numbers, counts = np.unique(values[others], return_counts=True)
    if not len(numbers):
        return LeftOut(floor, filled)
    common = _most_frequent(numbers, counts)
    if grid(values[others & (values != common)])[0]:
        return LeftOut(floor, filled)
    is_least = others & (values == numbers[0])
    if numbers[0] < -ROUND_OFF and _is_shared(is_least, prompts, tokens):
        floor = floor | is_least
        common = _most_frequent(numbers[1:], counts[1:])
    is_common = others & (values == common)
    if is_common.sum() >= least_count and _is_shared(is_common, prompts, tokens):
        filled = filled | is_common
    return LeftOut(floor, filled)


def _most_frequent(numbers: np.ndarray, counts: np.ndarray) -> float:
    """Returns the most frequent of the numbers of -0.1 or less; NaN if there is none."""
    low = numbers <= -BROAD
    return numbers[low][np.argmax(counts[low])] if low.any() else np.nan


def _is_shared(found: np.ndarray, prompts: Ids, tokens: Ids) -> bool:
    """Whether the tokens that are `found` stand in three contexts or more: equal completions of one
    prompt have equal numbers.
    """
    ends = np.cumsum([len(row) for row in tokens])
    contexts = set()
    for at in np.flatnonzero(found):
        row = int(np.searchsorted(ends, at, side="right"))
        place = at - ends[row] + len(tokens[row])
        contexts.add((*prompts[row], *tokens[row][: place + 1]))
        if len(contexts) == LEAST_CONTEXTS:
            return True
    return False


def are_constant(rows: Sequence[np.ndarray]) -> bool:
    """Whether all tokens of each completion have one number, in three completions or more."""
    known = [row[np.isfinite(row)] for row in rows]
    long = [row for row in known if len(row) > 1]
    return len(long) >= LEAST_CONTEXTS and all(np.all(row == row[0]) for row in long)


def grid(values: np.ndarray) -> tuple[float, str]:
    """Returns the mean step of the grid that all values lie on, and its name; 0 if none."""
    if len(np.unique(values)) < 8:
        return 0.0, ""
    for digits in (0, 1, 2, 3):
        if np.all(np.abs(values * 10**digits - np.round(values * 10**digits)) < 1e-4):
            return 10.0**-digits, f"{digits} decimal places"
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 1e-6)))
    for name, dtype, bits in (("bfloat16", jnp.bfloat16, 7), ("float16", np.float16, 10)):
        if np.all(values == values.astype(dtype).astype(np.float64)):
            return float(np.mean(2.0 ** (exponent - bits))), name
    return 0.0, ""
