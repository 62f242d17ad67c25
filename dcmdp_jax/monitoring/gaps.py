"""Where trainer and engine disagree in a step: by position in the completion, and at the worst
tokens.

`measure` runs inside the step's program and reduces its `[N, T]` arrays to a few numbers; `record`
turns them into JSON on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import constraint
from dcmdp_jax.losses import tails

WORST = 8  # completions whose worst token is recorded
BEFORE = 24  # tokens of context before it
AFTER = 8  # and after it


class Gaps(NamedTuple):
    """Delta summed by bucket of positions, and the worst token of each of K completions.

    The completions are those with the largest deltas; `delta` is -1 where nothing was measured.
    """

    sums: jax.Array  # [B] float32, of delta
    counts: jax.Array  # [B] int32, tokens
    delta: jax.Array  # [K] float32, largest first
    position: jax.Array  # [K] int32, in the completion
    trainer_logp: jax.Array  # [K] float32
    engine_logp: jax.Array  # [K] float32
    reward: jax.Array  # [K] float32, of the completion
    # [K, BEFORE + 1 + AFTER] int32, the token stands at BEFORE; -1 outside the completion
    context: jax.Array


def measure(
    old_logp: jax.Array,
    rollout_logp: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    reward: jax.Array,
) -> Gaps:
    """Returns the gaps of completions `[N, T]` with rewards `[N]`; see `constraint.delta`."""
    delta = constraint.delta(old_logp, rollout_logp, mask)
    worst = tails.worst_tokens(old_logp, rollout_logp, mask, k=WORST)
    around = worst.position[:, None] + jnp.arange(-BEFORE, AFTER + 1)
    inside = (around >= 0) & (around < delta.shape[1])
    near = worst.row[:, None], jnp.clip(around, 0, delta.shape[1] - 1)
    return Gaps(
        sums=_sum_by_bucket(jnp.sum(delta, axis=0)),
        counts=_sum_by_bucket(jnp.sum(mask & jnp.isfinite(rollout_logp), axis=0, dtype=jnp.int32)),
        delta=worst.delta,
        position=worst.position,
        trainer_logp=worst.old_logp,
        engine_logp=worst.rollout_logp,
        reward=reward[worst.row],
        context=jnp.where(inside & mask[near], tokens[near], -1),
    )


def edges(length: int) -> list[int]:
    """Returns the edges of the buckets of positions: 0, 8, 16, 32, ..., `length`."""
    return [0, *(edge for edge in tails.POSITION_EDGES if edge < length), length]


def record(gaps: Gaps, length: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Returns `gaps`, fetched to the host, as a JSON object.

    `positions` has a row for each bucket that has tokens and a finite gap, `worst` a row with
    decoded text for each worst token. Completions have at most `length` tokens.
    """
    ends = edges(length)
    positions = [
        {"from": start, "to": end, "tokens": int(count), "delta": float(total) / int(count)}
        for start, end, total, count in zip(ends, ends[1:], gaps.sums, gaps.counts)
        if count and math.isfinite(total)
    ]
    worst = []
    for k in range(len(gaps.delta)):
        if not gaps.delta[k] > 0:  # no gap, or nothing measured
            continue
        before, token, after = (
            [int(x) for x in part if x >= 0]
            for part in (
                gaps.context[k, :BEFORE],
                gaps.context[k, BEFORE : BEFORE + 1],
                gaps.context[k, BEFORE + 1 :],
            )
        )
        worst.append(
            {
                "position": int(gaps.position[k]),
                "token": token[0],
                "text": decode(token),
                "before": decode(before),
                "after": decode(after),
                "delta": float(gaps.delta[k]),
                "pi_train": math.exp(gaps.trainer_logp[k]),
                "pi_infer": math.exp(gaps.engine_logp[k]),
                "reward": float(gaps.reward[k]),
            }
        )
    return {"positions": positions, "worst": worst}


def _sum_by_bucket(by_position: jax.Array) -> jax.Array:
    ends = edges(len(by_position))
    return jnp.stack([jnp.sum(by_position[start:end]) for start, end in zip(ends, ends[1:])])
