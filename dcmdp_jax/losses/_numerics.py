"""Masked arithmetic, and the expressions of log-probs that float32 needs written with care."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def select(mask: Array, x: Array, fill: float = 0.0) -> Array:
    """Returns x on the mask and `fill` elsewhere, so that padding reaches neither the value nor the
    gradient.
    """
    return jnp.where(mask, x, fill)


def measured(rollout_logp: Array, mask: Array) -> Array:
    """Returns the tokens of the mask whose sampler log-probability is finite; some engines report
    NaN for tokens of probability 1.
    """
    return mask & jnp.isfinite(rollout_logp)


def bound(x: Array, low: Array | float, high: Array | float) -> Array:
    """x between two bounds, with gradient 0 outside them; jnp.clip's derivative costs several
    passes more.
    """
    return jax.lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


def difference(a: Array, b: Array, mask: Array) -> Array:
    """a - b on the mask and 0 elsewhere, in nats, not clamped: a completion's log ratio sums these.

    For a ratio against the sampler, pass `measured(rollout_logp, mask)` as the mask.
    """
    return select(mask, a) - select(mask, b)


def clamped(log_ratio: Array) -> Array:
    """clip(log_ratio, -20, 20), with gradient 0 outside."""
    return bound(log_ratio, -20.0, 20.0)


def log_ratio(a: Array, b: Array, mask: Array) -> Array:
    """clip(a - b, -20, 20) on the mask, 0 elsewhere; the gradient is 0 outside mask and clamp."""
    return clamped(difference(a, b, mask))


def ratio(logp: Array, old_logp: Array) -> Array:
    """exp(clip(logp - old_logp, -20, 20)) of log-probabilities that `_arguments` has zeroed at
    padding.
    """
    return jnp.exp(clamped(logp - old_logp))


def row_sum(x: Array, mask: Array) -> Array:
    """Sum over the tokens of each row, `[..., 1]`."""
    return jnp.sum(select(mask, x), axis=-1, keepdims=True)


def row_mean(x: Array, mask: Array) -> Array:
    """Mean over the tokens of each row, `[..., 1]`; an empty row gives 0."""
    return row_sum(x, mask) / jnp.maximum(row_count(mask), 1)


def row_count(mask: Array) -> Array:
    """Tokens of each row, float32 `[..., 1]`: exact, and cheaper to sum than integers."""
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32)


def centred(x: Array, mask: Array) -> Array:
    """x less its mean over the mask, 0 elsewhere. Twice: of equal values the rounding of the first
    mean is all that is left.
    """
    count = jnp.maximum(jnp.sum(row_count(mask).astype(jnp.int32)), 1)
    x = select(mask, x)
    for _ in range(2):
        x = select(mask, x - jnp.sum(x) / count)
    return x


def exp_excess(x: Array) -> Array:
    """exp(x) - 1 - x without cancellation: the k3 estimator of a log ratio x. Finite x only."""
    small = jnp.abs(x) < 0.25
    y = jnp.where(small, x, 0.0)
    series = y * y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y / 5040)))))
    return jnp.where(small, series, jnp.expm1(x) - x)


def probability_gap(a: Array, b: Array, mask: Array) -> Array:
    """exp(a) - exp(b) without cancellation, for log-probabilities in nats; 0 outside the mask."""
    a = select(mask, a)
    b = select(mask, b)
    # not jnp.sign, whose 0 at a = b would take the gradient with it
    sign = jnp.where(a >= b, 1.0, -1.0)
    return sign * jnp.exp(jnp.maximum(a, b)) * -jnp.expm1(-sign * (a - b))


def binary_kl(log_q: Array, log_p: Array) -> Array:
    """KL(q || p) in nats of "this token or another".

    q log(q/p) + (1 - q) log((1 - q + 1e-8) / (1 - p + 1e-8)).
    1 - q is by expm1: the compiler folds the 1e-8 into a written 1, where float32 loses it, and a
    certain token is 0 / 0. It is 0 for a log-prob that rounding has left above 0.
    """
    q = jnp.exp(log_q)
    other_q = jnp.maximum(-jnp.expm1(log_q), 0.0)
    other_p = jnp.maximum(-jnp.expm1(log_p), 0.0)
    return q * (log_q - log_p) + other_q * jnp.log((other_q + 1e-8) / (other_p + 1e-8))
