"""Checks of the arguments of `losses` and `constraint`: a wrong dtype or shape is named.

They run when a function is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax.losses._numerics import measured, select

Array = jax.Array

_HALF = (jnp.bfloat16, jnp.float16)
_MASKS = (jnp.bool_, jnp.int32, jnp.float32)


def takes(function: Callable, name: str) -> bool:
    """True if a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


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
        raise TypeError(
            f"mask must be bool, int32 or float32, not {value.dtype}; cast it with .astype(bool)"
        )
    if value.shape != like.shape:
        raise ValueError(
            f"mask has shape {value.shape}; it must be {like.shape}, one entry per token"
        )
    return jnp.asarray(value) > 0


def policy_loss(logp: Any, old_logp: Any, adv: Any, m: Any) -> tuple[Array, Array, Array, Array]:
    """Checks the four arguments of a policy loss and zeroes what padding holds, so that arithmetic
    on it is safe.
    """
    logp, old_logp = tokens(logp=logp, old_logp=old_logp)
    m = mask(m, logp)
    return select(m, logp), select(m, old_logp), select(m, advantage(adv, logp)), m


def rollout_policy_loss(
    logp: Any, rollout_logp: Any, adv: Any, m: Any
) -> tuple[Array, Array, Array, Array]:
    """As `policy_loss`, for a loss against the sampler: tokens that it did not measure leave the
    mask.
    """
    logp, rollout_logp = tokens(logp=logp, rollout_logp=rollout_logp)
    return policy_loss(logp, rollout_logp, adv, measured(rollout_logp, mask(m, logp)))


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

    Raises ValueError on an id that is too large, unless the ids are traced.
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
    if value.size and not isinstance(value, jax.core.Tracer) and value.max() >= num_groups:
        raise ValueError(
            f"group holds the id {value.max()}, and ids of num_groups={num_groups} groups are 0 to "
            f"{num_groups - 1}; give another num_groups, or the id -1 to padded completions"
        )
    value = jnp.asarray(value)
    return jnp.where((value >= 0) & (value < num_groups), value, num_groups)


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
