"""The quantities of a run that people look at.

The terminal, the page of a run, the page that compares runs and the table of a study all show this
list. A metric that is not here is in `metrics.jsonl`, and on no page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Quantity(NamedTuple):
    """One metric, as people see it."""

    key: str  # in `metrics.jsonl`, and of a study's column
    name: str  # in a line on the terminal and in the header of a table
    title: str  # of its curve and its row in a table
    unit: str
    format: str  # of a value
    better: Callable[..., Any] | None = None  # `max` or `min`; None if neither end is better
    noisy: bool = True  # measured on one batch: a trailing mean is drawn where runs are compared
    headline: bool = True  # on the terminal and in the table that compares runs


HELD_OUT_ENGINE = "reward_eval_infer"
HELD_OUT_TRAINER = "reward_eval_train"
HELD_OUT = ((HELD_OUT_ENGINE, "engine"), (HELD_OUT_TRAINER, "trainer"))  # with whose policy it is

_REWARD = ("mean reward", "{:.3f}", max)
_SHARE = ("share of completions", "{:.1%}", max)
_SPREAD = ("standard deviation", "{:.3f}")
_SAMPLED = ("share of the sampled prompts", "{:.1%}")
_ROUNDS = ("rounds a step", "{:.3g}")
_FAILED = ("share of completions", "{:.2%}", min)
_GAP = "mean |π_train − π_infer|"
_K3 = "k3 estimate, nats per token"
_STOPPED = "share of tokens that clip or rejection stops"
_STALENESS = "mean |log π_now − log π_sampled|, nats"
QUANTITIES = (
    Quantity("reward", "reward", "Training reward", *_REWARD),
    Quantity(HELD_OUT_ENGINE, "held-out engine", "Held-out reward, engine", *_REWARD, noisy=False),
    Quantity(
        HELD_OUT_TRAINER, "held-out trainer", "Held-out reward, trainer", *_REWARD, noisy=False
    ),
    Quantity("delta_mean", "delta", "Mean delta", _GAP, "{:.4g}", min),
    Quantity(
        "multiplier", "lambda", "Lambda", "advantage per unit of delta", "{:.4g}", noisy=False
    ),
    Quantity("entropy", "entropy", "Entropy", "nats per token", "{:.3f}"),
    Quantity("k3", "k3", "KL(engine ‖ trainer)", _K3, "{:.3g}", min),
    Quantity("ref_kl", "ref KL", "KL(policy ‖ reference)", _K3, "{:.3g}", headline=False),
    Quantity("truncated", "cut off", "Cut off by the limit", "share of completions", "{:.1%}", min),
    Quantity("completed_rewarded", "completed and rewarded", "Completed and rewarded", *_SHARE),
    Quantity("reward_spread", "spread", "Reward spread in prompts", *_SPREAD, headline=False),
    Quantity("no_spread", "no spread", "Prompts without spread", *_SAMPLED, headline=False),
    Quantity("refills", "refills", "Rounds of further prompts", *_ROUNDS, headline=False),
    Quantity("reward_sampled", "sampled", "Reward before refills", *_REWARD, headline=False),
    Quantity("verifier_failed", "failed", "Verifier gave no reward", *_FAILED, headline=False),
    Quantity("response_length", "length", "Response length", "tokens", "{:.4g}", headline=False),
    Quantity("grad_norm", "gradient", "Gradient norm", "before clipping", "{:.3g}", headline=False),
    Quantity("clip_fraction", "clipped", "Clipped", _STOPPED, "{:.2%}", headline=False),
    Quantity("gap_staleness", "staleness", "Staleness", _STALENESS, "{:.3g}", min, headline=False),
)


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Quantity]:
    """Returns the list, and the training reward of each source of problems that rows name.

    The only source of all problems is left out: its reward is the training reward.
    """
    rows = list(rows)
    sources = sorted({key for row in rows for key in row if key.startswith("reward/")})
    if len(sources) == 1 and all(_is_training_reward(row, sources[0]) for row in rows):
        sources = []
    by_source = []
    for key in sources:
        source = key.removeprefix("reward/")
        by_source.append(Quantity(key, source, f"Training reward, {source}", *_REWARD))
    return [*QUANTITIES, *by_source]


def _is_training_reward(row: Mapping[str, Any], key: str) -> bool:
    """True if `row` has the same value under `key` as under "reward", up to round-off, or lacks one
    of them.
    """
    values = (row.get(key), row.get("reward"))
    if not all(isinstance(value, (int, float)) for value in values):
        return True
    return math.isclose(*values, rel_tol=1e-5, abs_tol=1e-6)


def get(key: str) -> Quantity:
    """Returns the quantity with this key."""
    return next(quantity for quantity in QUANTITIES if quantity.key == key)


def headline() -> list[Quantity]:
    """Returns the quantities for the terminal and for the table that compares runs, in order."""
    return [quantity for quantity in QUANTITIES if quantity.headline]
