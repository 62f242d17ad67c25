"""The slotted key-value cache of decoding: one `[B, KV, S, h]` array per layer for keys and one for values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig


class Cache(NamedTuple):
    """Keys (rotated) and values of B slots, S positions each: one `[B, KV, S, h]` array per layer."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def init(config: ModelConfig, slots: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache of `slots` slots and `length` positions."""
    shape = (slots, config.num_kv_heads, length, config.head_dim)
    layers = range(config.num_layers)
    return Cache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def insert(
    cache: Cache, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...], slots: jax.Array, rows: jax.Array
) -> Cache:
    """Copy row `rows[g]` of a prefill into the first P positions of slot `slots[g]`, in place where `cache` is donated.

    keys, values: per layer [N, KV, P, h]; slots, rows: [G] int32. Slots must differ; a slot number of B or more is
    dropped, so that G can be padded to a fixed size. Raises ValueError when P exceeds the cache's length.
    """
    prefix, length = keys[0].shape[2], cache.keys[0].shape[2]
    if prefix > length:
        raise ValueError(f"insert: a prefix of {prefix} positions does not fit a cache of {length}; lengthen the cache")

    def copy(layer: jax.Array, rows_of_layer: jax.Array) -> jax.Array:
        update = rows_of_layer[rows].astype(layer.dtype)
        return layer.at[slots, :, :prefix].set(update, unique_indices=True, mode="drop")

    return Cache(tuple(map(copy, cache.keys, keys)), tuple(map(copy, cache.values, values)))


def write(layer: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """Put `new[b]` at position `lengths[b]` of slot b; a position outside the cache is dropped.

    layer [B, KV, S, h], new [B, KV, h], lengths [B] int32 -> [B, KV, S, h].
    """
    slots = jnp.arange(layer.shape[0])
    return layer.at[slots, :, lengths].set(new.astype(layer.dtype), unique_indices=True, mode="drop")
