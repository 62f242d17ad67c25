"""Dynamic sampling (DAPO, arXiv 2503.14476): prompts whose completions all earn the same, and which
therefore have no advantages, give way to further prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dcmdp_jax.records import Scored


class Draw(NamedTuple):
    """The completions of a batch of prompts, from all processes."""

    scored: Scored  # arrays alone, see `arrays_of`
    sources: Sequence[str]  # [B], where each prompt comes from


def arrays_of(scored: Scored) -> Scored:
    """Returns the arrays of a scored rollout, without its problems and how it was sampled."""
    rollout = scored.rollout
    return scored._replace(
        rollout=rollout._replace(
            prompts=rollout.prompts._replace(examples=()),
            sampling=(),
            version=np.broadcast_to(np.int32(rollout.version), rollout.tokens.shape),
        )
    )


def has_spread(draw: Draw) -> np.ndarray:
    """Returns [B] bool: whether two completions of a prompt earned different rewards."""
    reward = draw.scored.reward.reshape(len(draw.sources), -1)
    return reward.max(axis=1) > reward.min(axis=1)


def replace_groups(batch: Draw, more: Draw) -> Draw:
    """Returns `batch` with the prompts of `more` that have spread in the places of its own that
    have none, both in order, as far as they last.
    """
    places = np.flatnonzero(~has_spread(batch))
    found = np.flatnonzero(has_spread(more))
    count = min(len(places), len(found))

    def replace(array: np.ndarray, other: np.ndarray) -> np.ndarray:
        by_prompt = (len(batch.sources), -1, *array.shape[1:])
        groups = array.reshape(by_prompt).copy()
        groups[places[:count]] = other.reshape(by_prompt)[found[:count]]
        return groups.reshape(array.shape)

    sources = list(batch.sources)
    for place, group in zip(places, found):
        sources[place] = more.sources[group]
    return Draw(jax.tree.map(replace, batch.scored, more.scored), sources)


class Round(NamedTuple):
    """What the metrics need of the draw of one round."""

    spread: np.ndarray  # [B] bool, see `has_spread`
    reward: float  # mean
    tokens: int  # sampled


def summary(draw: Draw) -> Round:
    """Returns what the metrics need of a draw, so that its arrays can be freed."""
    scored = draw.scored
    return Round(has_spread(draw), float(np.mean(scored.reward)), int(scored.rollout.lengths.sum()))


def measure(rounds: Sequence[Round], batch: Draw) -> dict[str, float]:
    """Returns the metrics of a batch that was put together from the draws of its rounds.

    - `refills`: rounds after the first.
    - `no_spread`: share of the sampled prompts whose completions all earned the same.
    - `unfilled`: share of the batch's prompts of which this is still so.
    - `reward_sampled`: mean reward of all that was sampled; that of the batch is nearer to the
      middle of the scale.
    - `tokens`: sampled in all rounds.
    """
    return {
        "refills": len(rounds) - 1,
        "no_spread": float(np.mean([~each.spread for each in rounds])),
        "unfilled": float(np.mean(~has_spread(batch))),
        "reward_sampled": float(np.mean([each.reward for each in rounds])),
        "tokens": sum(each.tokens for each in rounds),
    }
