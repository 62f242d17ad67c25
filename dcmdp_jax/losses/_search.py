"""Order statistics of a batch of tokens, of which only a few thousand are ever sorted."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array

_SAMPLE = 4096  # tokens that the first guess is made from
_CLOSE = 1024  # tokens that are sorted in the end


def highest(x: Array, number: int) -> Array:
    """The greatest elements of x, descending: those of the blocks whose greatest element is among
    the greatest.
    """
    blocks = x.reshape(-1, math.gcd(x.size, 64))
    _, where = jax.lax.top_k(jnp.max(blocks, axis=1), min(number, blocks.shape[0]))
    return jax.lax.top_k(blocks[where].reshape(-1), min(number, x.size))[0]


def greatest_cut(excess: Array, total: Array) -> Array:
    """The greatest x with sum{excess : excess <= x} < 0; the sum must be < 0 at x = 0, and `total`
    of all be >= 0.
    """
    low, below = _close_below(excess, total)
    after = -highest(jnp.where(excess > low, -excess, -jnp.inf), _CLOSE)
    last_of_ties = after < jnp.append(after[1:], -jnp.inf)
    fits = last_of_ties & (below + jnp.cumsum(after) < 0)
    return jnp.max(jnp.where(fits, after, low))


def _close_below(excess: Array, total: Array) -> tuple[Array, Array]:
    """A value with fewer than _CLOSE tokens from there to the cut, and its sum; or, with more ties
    than that, the cut.

    The bracket is of bits, which order the floats above 0. After the guesses the sum is
    interpolated, with the aim half of _CLOSE below the root, and every fourth step halves the
    bracket instead.
    """
    guesses = _bits(_guesses(excess))

    def far(state: tuple) -> Array:
        _, low, high, below, above = state
        return (above >= 0) & (high - low > 1) & (below <= (1 - _CLOSE) * _float(low))

    def step(state: tuple) -> tuple:
        i, low, high, below, above = state
        part = jnp.where(
            (i % 4 == 0) | (i > 16), 0.5, (-_CLOSE / 2 * _float(low) - below) / (above - below)
        )
        middle = jnp.where(i < 2, guesses[i % 2], low + (part * (high - low)).astype(jnp.int32))
        middle = jnp.clip(middle, low + 1, high - 1)
        here = jnp.sum(jnp.where(excess <= _float(middle), excess, 0.0))
        moved = (i + 1, middle, high, here, above)
        other = (i + 1, low, middle, below, here)
        return jax.tree.map(lambda x, y: jnp.where(here < 0, x, y), moved, other)

    # The sum at 0 is not known; -total stands for it until low moves, as it must: the loop does not
    # end with low at 0.
    start = jnp.int32(0), jnp.int32(0), _bits(jnp.max(excess)), -total, total
    _, low, _, below, _ = jax.lax.while_loop(far, step, start)
    return _float(low), below


def _guesses(excess: Array) -> Array:
    """Where a sample puts the cut, less and plus 1.5 standard deviations of its sum."""
    # An odd stride, so that the sample goes through all positions of the completions.
    ordered = jnp.sort(excess.reshape(-1)[:: excess.size // _SAMPLE | 1])
    sums = jnp.cumsum(ordered)
    noise = 1.5 * jnp.sqrt(jnp.sum(jnp.where(sums < 0, jnp.square(ordered), 0.0)))
    low = jnp.max(jnp.where(sums < -noise, ordered, 0.0), initial=0.0)
    high = jnp.min(jnp.where((ordered > 0) & (sums >= noise), ordered, jnp.inf))
    return jnp.stack([low, high])


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
