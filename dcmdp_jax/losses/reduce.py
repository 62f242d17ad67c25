"""Per-token values to one scalar.

Every function sums over the mask and divides by a count. The count is taken from the mask, or
passed in: under data parallelism or gradient accumulation pass the *global* count to every shard or
microbatch, and the partial results add up to the result of the global batch. If the mask is empty,
the result and its gradient are 0. Values of `x` outside the mask are not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics

Array = jax.Array


def token_mean(x: Array, mask: Array, *, count: Array | int | None = None) -> Array:
    """Mean over all tokens of the batch: long completions weigh more.

    Formula: sum_nt m x / sum_nt m
    Needs: x [..., T], mask
    Default: count = tokens of the mask
    Paper: DAPO, arXiv 2503.14476

    Args:
        x: float32 `[..., T]`.
        mask: `[..., T]`, bool, int32 or float32.
        count: tokens in the global batch, where this call sees a part of it.

    Raises:
        TypeError, ValueError: an argument has another dtype or shape.
    """
    x, mask = _checked(x, mask)
    return _ratio(jnp.sum(x), _tokens(mask) if count is None else count)


def token_sum(x: Array, mask: Array) -> Array:
    """Sum over all tokens of the batch.

    Formula: sum_nt m x
    Needs: x [..., T], mask

    Args and errors: as in `token_mean`.
    """
    return jnp.sum(_checked(x, mask)[0])


def sequence_mean_token_mean(x: Array, mask: Array, *, count: Array | int | None = None) -> Array:
    """Mean over completions of each completion's token mean: every completion weighs the same.

    Formula: 1/#{n: |o_n| > 0} sum_n 1/|o_n| sum_t m x
    Needs: x [..., T], mask
    Default: count = completions with a token in the mask
    Paper: GRPO, arXiv 2402.03300

    verl leaves empty rows out of the count, as here; TRL counts them: pass count = N for its value.

    Args:
        x: as in `token_mean`.
        mask: likewise.
        count: non-empty completions in the global batch, where this call sees a part of it.
    """
    x, mask = _checked(x, mask)
    return _ratio(jnp.sum(_numerics.row_mean(x, mask)), _rows(mask) if count is None else count)


def sequence_mean_token_sum(x: Array, mask: Array, *, count: Array | int | None = None) -> Array:
    """Mean over completions of each completion's token sum.

    Formula: 1/#{n: |o_n| > 0} sum_n sum_t m x
    Needs: x [..., T], mask
    Default: count = completions with a token in the mask
    Paper: PPO as written per trajectory, arXiv 1707.06347

    Arguments are those of `sequence_mean_token_mean`. With the GSPO loss this is LUSPO's length
    weighting (arXiv 2602.05261).
    """
    x, mask = _checked(x, mask)
    return _ratio(jnp.sum(x), _rows(mask) if count is None else count)


def constant(x: Array, mask: Array, *, normalizer: Array | float) -> Array:
    """Sum over all tokens divided by a constant, so that no length enters the weights.

    Formula: sum_nt m x / normalizer
    Needs: x [..., T], mask, normalizer
    Default: normalizer must be given; Dr. GRPO takes N x T_max
    Paper: Dr. GRPO, arXiv 2503.20783

    TRL divides by N x T_max with N counting empty rows; verl's seq-mean-token-sum-norm by non-empty
    rows x T_max.

    Args:
        x: as in `token_mean`.
        mask: likewise.
        normalizer: above zero, and of the global batch.

    Raises:
        ValueError: the normalizer is a number that is not above zero.
    """
    if not isinstance(normalizer, jax.Array) and not normalizer > 0:
        raise ValueError(f"normalizer must be above zero, not {normalizer}")
    return jnp.sum(_checked(x, mask)[0]) / normalizer


def _checked(x: Array, mask: Array) -> tuple[Array, Array]:
    (x,) = _arguments.tokens(x=x)
    mask = _arguments.mask(mask, x)
    return _numerics.select(mask, x), mask


def _tokens(mask: Array) -> Array:
    return jnp.sum(_numerics.row_count(mask).astype(jnp.int32))


def _rows(mask: Array) -> Array:
    return jnp.sum(jnp.any(mask, axis=-1))


def _ratio(total: Array, count: Array | int) -> Array:
    return total / jnp.maximum(count, 1)
