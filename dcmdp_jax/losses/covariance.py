"""Policy losses with a special rule for the few tokens that drive the entropy down.

Such tokens have a large covariance between log-probability and advantage, cov = (A - mean A)(logp -
mean logp), means over the valid tokens of the batch given. Signature and shapes are those of
`policy`. `fraction` is of the valid tokens, and at least one token is treated: by `kl_cov` unless
it ties with the next, by `clip_cov` in expectation, if there is a candidate.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics

Array = jax.Array
stop = jax.lax.stop_gradient


def clip_cov(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    key: Array | None = None,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Array:
    """The clipped surrogate without a random few of the tokens of high covariance.

    Formula: L = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), 0 on the tokens drawn from
        cov_low < cov < cov_high
    Needs: logp, old_logp, advantage, mask
    Default: key made from old_logp, fraction 2e-4, cov_low 1.0, cov_high 5.0, clip_low 0.2,
        clip_high 0.2
    Paper: Clip-Cov, arXiv 2505.22617

    Tokens that the clip already stopped are not drawn. Each candidate is drawn by itself, with the
    chance that makes the expected number `fraction` of the valid tokens; verl draws exactly that
    number. The tokens drawn lose their gradient and stay in the denominator. `key` is a JAX random
    key, a new one for each step; the one made from old_logp is another for every batch, and the
    same where a run is repeated.
    """
    _check_fraction(fraction)
    _arguments.clip_bounds(clip_low, clip_high)
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    ratio = _numerics.ratio(logp, old_logp)
    clipped = _numerics.bound(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-ratio * advantage, -clipped * advantage)
    count = jnp.maximum(jnp.sum(_numerics.row_count(mask).astype(jnp.int32)), 1)
    cov = _covariance(logp, advantage, count)
    stopped = jnp.where(
        advantage > 0, ratio > 1 + clip_high, (advantage < 0) & (ratio < 1 - clip_low)
    )
    candidate = mask & ~stopped & (cov > cov_low) & (cov < cov_high)
    candidates = jnp.maximum(jnp.sum(_numerics.row_count(candidate)), 1)
    key = _key(old_logp) if key is None else key
    drawn = candidate & (_uniform(key, mask.shape) < jnp.maximum(fraction * count, 1) / candidates)
    return jnp.where(drawn, 0.0, loss)


def kl_cov(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    fraction: float = 2e-4,
    penalty: float = 1.0,
) -> Array:
    """The unclipped surrogate with a penalty on the log ratio of the tokens of highest covariance.

    Formula: L = -r A + penalty |logp - old_logp| 1[cov among the highest fraction], r = exp(logp -
        old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: fraction 2e-4, penalty 1.0
    Paper: KL-Cov, arXiv 2505.22617

    Tokens whose covariance ties across the boundary are left out.
    """
    _check_fraction(fraction)
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    log_ratio = _numerics.clamped(logp - old_logp)
    count = jnp.maximum(jnp.sum(_numerics.row_count(mask).astype(jnp.int32)), 1)
    cov = jnp.where(mask, _covariance(logp, advantage, count), -jnp.inf)
    highest, _ = jax.lax.top_k(cov.reshape(-1), min(cov.size, int(fraction * cov.size) + 2))
    bound = highest[jnp.maximum(jnp.floor(fraction * count), 1).astype(jnp.int32)]
    chosen = mask & (cov > bound)
    # JAX gives abs a slope of 1 at 0, where on-policy tokens are
    distance = log_ratio * stop(jnp.sign(log_ratio))
    return -advantage * jnp.exp(log_ratio) + _numerics.select(chosen, penalty * distance)


def _covariance(logp: Array, advantage: Array, count: Array) -> Array:
    """(A - mean A)(logp - mean logp) of arrays that are 0 at padding."""
    logp = stop(logp)
    return (advantage - jnp.sum(advantage) / count) * (logp - jnp.sum(logp) / count)


def _key(logp: Array) -> Array:
    """A random key of the bits of log-probs. Integers add alike in any order."""
    return jax.random.key(jnp.sum(jax.lax.bitcast_convert_type(stop(logp), jnp.uint32)))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, not {fraction}")


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in [0, 1) by mixing the token's number with bits of the key, a tenth of the cost of
    threefry.
    """
    seed = jax.random.bits(key, (2,), jnp.uint32)
    x = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) ^ seed[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * (seed[1] | 1)
    x = (x ^ (x >> 16)) * jnp.uint32(0xC2B2AE35)
    return (x >> 8).astype(jnp.float32) * 2.0**-24
