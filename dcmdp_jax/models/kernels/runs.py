"""Where the segments of packed rows begin."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Returns the position in its row at which each position's segment begins: [B, S] int32.

    A position of padding, id 0, is a segment of its own. So padding attends to itself alone, and no
    block of it off the diagonal is computed.
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.where(segment_ids == 0, position, run_starts(segment_ids))


def run_starts(ids: jax.Array) -> jax.Array:
    """Returns the position at which each position's run of equal ids begins: [B, S] int32."""
    position = jnp.arange(ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    return jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
