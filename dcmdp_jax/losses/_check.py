"""Argument checks, masking, and the expressions of log-probabilities that float32 needs written
with care.

Every function here runs at trace time or is pure arithmetic, so it costs nothing beyond what the
caller needs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

_HALF = (jnp.bfloat16, jnp.float16)
_MASKS = (jnp.bool_, jnp.int32, jnp.float32)


def tokens(**arrays: Any) -> list[Array]:
    """Returns the named arrays as JAX arrays.

    Raises TypeError or ValueError, naming the array, if one is not float32 `[..., T]` of the shape
    of the first.
    """
    first = next(iter(arrays))
    for name, value in arrays.items():
        _floating(name, value)
        if value.ndim == 0:
            raise ValueError(f"{name} is a scalar; it must be an array whose last axis is tokens")
        if value.shape != arrays[first].shape:
            raise ValueError(
                f"{name} has shape {value.shape} but {first} has {arrays[first].shape}; "
                "they must agree"
            )
    return [jnp.asarray(value) for value in arrays.values()]


def advantage(value: Any, like: Array) -> Array:
    """Returns the advantage broadcast to `like`'s shape; it must be float32 `[..., T]` or `[...,
    1]`.
    """
    _floating("advantage", value)
    if value.shape not in (like.shape, like.shape[:-1] + (1,)):
        raise ValueError(
            f"advantage has shape {value.shape}; it must be {like.shape}, one per token, "
            f"or {like.shape[:-1] + (1,)}, one per completion"
        )
    return jnp.broadcast_to(jnp.asarray(value), like.shape)


def mask(value: Any, like: Array) -> Array:
    """Returns the mask as booleans (true where above zero); it must be bool, int32 or float32 of
    `like`'s shape.
    """
    if not hasattr(value, "dtype"):
        raise TypeError(f"mask must be a NumPy or JAX array, not {type(value).__name__}")
    if value.dtype not in _MASKS:
        raise TypeError(f"mask must be bool, int32 or float32, not {value.dtype}")
    if value.shape != like.shape:
        raise ValueError(
            f"mask has shape {value.shape}; it must be {like.shape}, one entry per token"
        )
    return jnp.asarray(value) > 0


def arguments(logp: Any, old_logp: Any, adv: Any, m: Any) -> tuple[Array, Array, Array, Array]:
    """Checks the four arguments of a policy loss and zeroes what padding holds, so that arithmetic
    on it is safe.
    """
    logp, old_logp = tokens(logp=logp, old_logp=old_logp)
    m = mask(m, logp)
    return select(m, logp), select(m, old_logp), select(m, advantage(adv, logp)), m


def rollout_arguments(
    logp: Any, rollout_logp: Any, adv: Any, m: Any
) -> tuple[Array, Array, Array, Array]:
    """As `arguments`, for a loss against the sampler: tokens that it did not measure leave the
    mask.
    """
    logp, rollout_logp = tokens(logp=logp, rollout_logp=rollout_logp)
    return arguments(logp, rollout_logp, adv, measured(rollout_logp, mask(m, logp)))


def clip_bounds(clip_low: float, clip_high: float) -> None:
    """Raises ValueError if the distances of a clip range below and above 1 make no sense."""
    if not 0 <= clip_low <= 1:
        raise ValueError(
            f"clip_low must be between 0 and 1, the distance below ratio 1, not {clip_low}"
        )
    if not clip_high >= 0:
        raise ValueError(
            f"clip_high must be at least 0, the distance above ratio 1, not {clip_high}"
        )


def groups(value: Any, like: Array, num_groups: int) -> Array:
    """Returns int32 group ids with every id outside [0, num_groups) moved to num_groups, where
    nothing reads it.
    """
    if not hasattr(value, "dtype"):
        raise TypeError(f"group must be a NumPy or JAX array, not {type(value).__name__}")
    if value.dtype != jnp.int32:
        raise TypeError(f"group must be int32, not {value.dtype}; cast it with .astype('int32')")
    if value.shape != like.shape or like.ndim != 1:
        raise ValueError(
            f"group has shape {value.shape} and the rewards {like.shape}; both must be [N]"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, not {num_groups}")
    value = jnp.asarray(value)
    return jnp.where((value >= 0) & (value < num_groups), value, num_groups)


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
    """exp(clip(logp - old_logp, -20, 20)) of log-probabilities that `arguments` has zeroed at
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
    certain token is 0 / 0.
    """
    q = jnp.exp(log_q)
    other_q = -jnp.expm1(log_q)
    other_p = -jnp.expm1(log_p)
    return q * (log_q - log_p) + other_q * jnp.log((other_q + 1e-8) / (other_p + 1e-8))


def pessimistic(
    ratio: Array, adv: Array, clip_low: float, clip_high: float, ratio_max: float = math.inf
) -> Array:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), with r no more than ratio_max where A is
    negative.

    Written as one clamp, since a positive advantage meets the upper bound alone and a negative one
    the lower.
    """
    lower = jnp.where(adv > 0, 0.0, 1 - clip_low)
    upper = jnp.where(adv > 0, 1 + clip_high, ratio_max)
    return -adv * bound(ratio, lower, upper)


def _floating(name: str, value: Any) -> None:
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be a NumPy or JAX array, not {type(value).__name__}")
    if value.dtype in _HALF and name.endswith("logp"):
        raise TypeError(
            f"{name} is {value.dtype}: rounding log-probs to bfloat16 alone makes a delta of about "
            "3e-4; cast the logits to float32 before the log-softmax"
        )
    if value.dtype != jnp.float32:
        raise TypeError(
            f"{name} must be float32, not {value.dtype}; cast it with .astype('float32')"
        )
