"""Where the gap between trainer and sampler sits: quantiles, buckets, the worst tokens.

A mean near 0 hides a tail. Notation is that of `diagnostics`: D = old_logp - rollout_logp, delta =
|e^old_logp - e^rollout_logp|, float32 nats `[N, T]`, over measured tokens, without gradient. These
functions sort the batch, so call them now and then rather than each step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics

Array = jax.Array
Metrics = dict[str, Array]
LEVELS = (0.5, 0.9, 0.99, 0.999)
POSITION_EDGES = tuple(8 * 2**k for k in range(14))  # 8, 16, ..., 65536 tokens


class WorstTokens(NamedTuple):
    """The worst tokens of K completions, by descending delta.

    `delta` is -1 for a completion that has no measured token.
    """

    delta: Array  # [K] float32
    row: Array  # [K] int32, completion
    position: Array  # [K] int32, column of the completion
    old_logp: Array  # [K] float32, nats
    rollout_logp: Array  # [K] float32, nats


def quantiles(value: Array, mask: Array, *, levels: tuple[float, ...] = LEVELS) -> Array:
    """Quantiles over the tokens of the mask with linear interpolation, `[len(levels)]`. Sorts the
    batch.

    Formula: numpy.quantile(value[mask], levels)
    Needs: value [N, T], mask
    Default: levels 0.5, 0.9, 0.99, 0.999
    """
    (value,) = _arguments.tokens(value=value)
    mask = _arguments.mask(mask, value)
    ordered = jnp.sort(jnp.where(mask, jax.lax.stop_gradient(value), jnp.inf).reshape(-1))
    count = jnp.sum(mask)
    last = jnp.maximum(count - 1, 0)
    # Counted from the top, where float32 keeps its digits for the high levels.
    from_top = jnp.asarray([1.0 - level for level in levels], jnp.float32) * last
    step = jnp.floor(from_top).astype(jnp.int32)
    above = ordered[last - step]
    below = ordered[jnp.maximum(last - step - 1, 0)]
    return jnp.where(
        count > 0, above - (from_top - step) * jnp.where(above > below, above - below, 0.0), 0.0
    )


def quantiles_by_bucket(
    value: Array,
    bucket: Array,
    mask: Array,
    *,
    num_buckets: int,
    levels: tuple[float, ...] = LEVELS,
) -> Array:
    """`quantiles` within each bucket, `[num_buckets, len(levels)]`; 0 for an empty one. Sorts once
    per bucket.

    Formula: numpy.quantile(value[mask and bucket = b], levels) for b in [0, num_buckets)
    Needs: value [N, T], bucket int32 [N, T] from position_bucket or probability_bucket, mask,
        num_buckets
    Default: levels 0.5, 0.9, 0.99, 0.999
    """
    mask = _arguments.mask(mask, value)
    return jax.lax.map(
        lambda b: quantiles(value, mask & (bucket == b), levels=levels), jnp.arange(num_buckets)
    )


def position_bucket(mask: Array, *, edges: tuple[int, ...] = POSITION_EDGES) -> Array:
    """Bucket of each token by how many tokens of the mask precede it in its completion, int32 `[N,
    T]`.

    Formula: #{edges <= #{u < t: m_u}}, in 0..len(edges)
    Needs: mask
    Default: edges 8, 16, 32, ..., 65536 tokens
    """
    mask = _arguments.mask(mask, mask)
    before = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - mask
    return jnp.sum(before[..., None] >= jnp.asarray(edges, jnp.int32), axis=-1, dtype=jnp.int32)


def probability_bucket(
    rollout_logp: Array, mask: Array, *, edges: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99)
) -> Array:
    """Bucket of each token by the probability that the sampler gave it, int32 `[N, T]`; 0 where not
    measured.

    Formula: #{edges <= e^rollout_logp}, in 0..len(edges)
    Needs: rollout_logp, mask
    Default: edges 0.1, 0.5, 0.9, 0.99
    """
    (rollout_logp,) = _arguments.tokens(rollout_logp=rollout_logp)
    valid = _numerics.measured(rollout_logp, _arguments.mask(mask, rollout_logp))
    bounds = jnp.log(jnp.asarray(edges, jnp.float32))
    return jnp.sum(
        jnp.where(valid, rollout_logp, -jnp.inf)[..., None] >= bounds, axis=-1, dtype=jnp.int32
    )


def summary(old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Quantiles of |D| and of delta, and how much of the gap its worst tokens make. Sorts the batch
    three times.

    Formula: p50, p90, p99, p99.9 of |D| and of delta; sum of the largest 1 % of delta over the sum
        of all
    Needs: old_logp, rollout_logp, mask
    """
    old, rollout, gap, valid = _measured(old_logp, rollout_logp, mask)
    diff = jnp.abs(old - rollout)
    names = [f"p{100 * level:g}" for level in LEVELS]
    metrics = {f"delta_{name}": value for name, value in zip(names, quantiles(gap, valid))}
    metrics |= {f"logp_diff_{name}": value for name, value in zip(names, quantiles(diff, valid))}
    return metrics | {"delta_top_share": top_share(gap, valid)}


def top_share(value: Array, mask: Array, *, fraction: float = 0.01) -> Array:
    """How concentrated a non-negative quantity is: the share of its sum that its largest tokens
    hold. Sorts the batch.

    Formula: sum of the ceil(fraction #{m}) largest / sum of all; 0 where the sum is 0
    Needs: value >= 0 [N, T], mask
    Default: fraction 0.01
    """
    (value,) = _arguments.tokens(value=value)
    mask = _arguments.mask(mask, value)
    ordered = jnp.sort(_numerics.select(mask, jax.lax.stop_gradient(value)).reshape(-1))
    largest = jnp.arange(ordered.size) >= ordered.size - jnp.ceil(fraction * jnp.sum(mask))
    total = jnp.sum(ordered)
    return jnp.sum(_numerics.select(largest, ordered)) / jnp.where(total > 0, total, 1.0)


def worst_tokens(old_logp: Array, rollout_logp: Array, mask: Array, *, k: int = 16) -> WorstTokens:
    """The token of greatest delta in each of the k completions where that is greatest.

    Formula: top_k over n of max_t(delta_nt)
    Needs: old_logp, rollout_logp, mask, all [N, T]
    Default: k 16; K = min(k, N)
    """
    old, rollout, gap, valid = _measured(old_logp, rollout_logp, mask)
    gap = jnp.where(valid, gap, -1.0)
    worst, row = jax.lax.top_k(jnp.max(gap, axis=-1), min(k, len(gap)))
    position = jnp.argmax(gap[row], axis=-1).astype(jnp.int32)
    return WorstTokens(worst, row, position, old[row, position], rollout[row, position])


def _measured(
    old_logp: Array, rollout_logp: Array, mask: Array
) -> tuple[Array, Array, Array, Array]:
    """Both log-probs and delta, 0 where the token is not measured, and where it is."""
    old_logp, rollout_logp = jax.lax.stop_gradient(
        _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    )
    valid = _numerics.measured(rollout_logp, _arguments.mask(mask, rollout_logp))
    gap = jnp.abs(_numerics.probability_gap(old_logp, rollout_logp, valid))
    return _numerics.select(valid, old_logp), _numerics.select(valid, rollout_logp), gap, valid
