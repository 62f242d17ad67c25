"""The key-value cache of decoding: an array `[B, KV, S, h]` of keys and one of values per layer.

B slots, KV kv-heads, G q-heads for each of them, S positions, h head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.models.kernels import decode_attention, tiles
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import SCALED, Quantized, einsum, formats, quantize

DTYPES = formats("cache")

# [B, KV, S, h]; if it is `Quantized`, with a scale per position and kv-head, [B, KV, S, 1]
CacheLayer = jax.Array | Quantized


class Cache(NamedTuple):
    """Keys (rotated) and values, one `CacheLayer` per layer of the decoder."""

    keys: tuple[CacheLayer, ...]
    values: tuple[CacheLayer, ...]


def init(config: ModelConfig, slots: int, length: int, dtype: str = "") -> Cache:
    """Returns an empty cache of `slots` slots and `length` positions.

    `dtype` is one of `DTYPES`, or "" for the compute dtype. Raises ValueError for another.
    """
    dtype = dtype or ("bfloat16" if config.compute.bfloat16 else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"the cache cannot hold {dtype!r}; choose one of {', '.join(DTYPES)}")
    shape = (slots, config.num_kv_heads, length, config.head_dim)

    def layer() -> CacheLayer:
        zeros = jnp.zeros(shape, dtype)
        if dtype in SCALED:
            return Quantized(zeros, jnp.ones((*shape[:3], 1), jnp.float32))
        return zeros

    layers = range(config.num_layers)
    return Cache(tuple(layer() for _ in layers), tuple(layer() for _ in layers))


def insert(
    cache: Cache,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    slots: jax.Array,
    rows: jax.Array,
) -> Cache:
    """Copies row `rows[g]` of a prefill into the first P positions of slot `slots[g]`, in place if
    `cache` is donated.

    keys, values: per layer [N, KV, P, h]; slots, rows: [G] int32. Slots must differ. A slot number
    of B or more is dropped, so that G can be padded to a fixed size. Raises ValueError if P exceeds
    the cache's length.
    """
    prefix = keys[0].shape[2]
    length = cache.keys[0].shape[2]
    if prefix > length:
        raise ValueError(
            f"insert: a prefix of {prefix} positions does not fit a cache of {length}; lengthen "
            "the cache"
        )

    def copy(layer: CacheLayer, new: jax.Array) -> CacheLayer:
        return jax.tree.map(
            lambda old, new: old.at[slots, :, :prefix].set(
                new[rows], unique_indices=True, mode="drop"
            ),
            layer,
            _in_format(new, layer),
        )

    return Cache(tuple(map(copy, cache.keys, keys)), tuple(map(copy, cache.values, values)))


def write(layer: CacheLayer, new: jax.Array, lengths: jax.Array) -> CacheLayer:
    """Writes `new[b]` at position `lengths[b]` of slot b; a position outside the cache is dropped.

    layer [B, KV, S, h], new [B, KV, h], lengths [B] int32 -> [B, KV, S, h]. Float32 and int8 are
    written in place; on a CPU XLA converts a bfloat16 or float8 layer to float32 and back.
    """
    slots = jnp.arange(layer.shape[0])[:, None]
    heads = jnp.arange(layer.shape[1])
    # Heads are indexed, not sliced: otherwise a TPU transposes the whole cache and back.
    return jax.tree.map(
        lambda old, new: old.at[slots, heads, lengths[:, None]].set(
            new, unique_indices=True, mode="drop"
        ),
        layer,
        _in_format(new, layer),
    )


def prefix(cache: Cache, window: int, slots: jax.Array | None = None) -> Cache:
    """Returns a copy of the first `window` positions of `slots` [n] int32, or of every slot."""
    if slots is None:
        return jax.tree.map(lambda layer: layer[:, :, :window], cache)
    return jax.tree.map(lambda layer: layer[slots, :, :window], cache)


def restore_prefix(cache: Cache, part: Cache, slots: jax.Array | None = None) -> Cache:
    """Returns `cache` with the positions replaced that `part`, as `prefix` makes it, holds; in
    place if `cache` is donated. Slots must differ.
    """
    if slots is None:
        return jax.tree.map(
            lambda layer, new: jax.lax.dynamic_update_slice(layer, new, (0, 0, 0, 0)), cache, part
        )

    def restore(i: jax.Array, layer: jax.Array, new: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(new, i, 1)
        return jax.lax.dynamic_update_slice(layer, row, (slots[i], 0, 0, 0))

    # Slot by slot: a CPU converts a bfloat16 or float8 layer to float32 to scatter into it.
    return jax.lax.fori_loop(
        0,
        slots.shape[0],
        lambda i, cache: jax.tree.map(functools.partial(restore, i), cache, part),
        cache,
    )


def _in_format(new: jax.Array, layer: CacheLayer) -> CacheLayer:
    """Returns `new` [..., h] in the format of `layer`."""
    if isinstance(layer, Quantized):
        return quantize(new, layer.values.dtype, (-1,))
    return new.astype(layer.dtype)


def attend(
    q: jax.Array,
    keys: CacheLayer,
    values: CacheLayer,
    lengths: jax.Array,
    *,
    window: int,
    mesh: jax.sharding.Mesh | None = None,
    cpu_elements: int = tiles.CACHE_ELEMENTS,
) -> jax.Array:
    """Attention of one token per slot to positions 0..lengths[b]: `softmax(q k^T / sqrt(h)) v`,
    softmax in float32.

    q [B, KV, G, h], keys, values [B, KV, S, h], lengths [B] < `window` (static) -> [B, KV, G, h].
    Scales of quantized keys and values are applied to the scores and the weights. `mesh` is the one
    over which the cache is split, if any.

    A TPU reads the blocks of each slot that hold tokens, if the kernel takes the head size. A CPU
    reads the window, at most `cpu_elements` elements of keys at a time.
    """
    slots = q.shape[0]
    per_slot = q.shape[1] * window * q.shape[3]
    together = max(cpu_elements // per_slot, 1)

    def by_blocks(*args):
        # The barrier keeps the keys the left operand of the product, which then takes half the
        # time or less on a CPU.
        slot = functools.partial(_attend, window=window, barrier=jax.lax.optimization_barrier)
        if together >= slots:
            return jax.vmap(slot)(*args)
        return jax.lax.map(lambda slot_args: slot(*slot_args), args, batch_size=together)

    at_once = jax.vmap(functools.partial(_attend, window=window, barrier=lambda scores: scores))
    forms = {"cpu": by_blocks, "default": at_once}
    if decode_attention.is_supported(q.shape[3]):
        forms["tpu"] = functools.partial(decode_attention.attention, mesh=mesh)
    return jax.lax.platform_dependent(q, keys, values, lengths, **forms)


def _attend(
    q: jax.Array,
    keys: CacheLayer,
    values: CacheLayer,
    length: jax.Array,
    *,
    window: int,
    barrier: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """One slot: q [KV, G, h], keys, values [KV, S, h] -> [KV, G, h]."""
    (k, k_scale), (v, v_scale) = (_stored(layer, window) for layer in (keys, values))
    scores = (
        barrier(einsum("kth,kgh->ktg", k, q, q.dtype)).swapaxes(1, 2)
        * k_scale
        * q.shape[-1] ** -0.5
    )
    scores = jnp.where(jnp.arange(window) <= length, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1) * v_scale
    return einsum("kgt,kth->kgh", weights, v, q.dtype).astype(q.dtype)


def _stored(layer: CacheLayer, window: int) -> tuple[jax.Array, jax.Array | float]:
    """Returns the stored elements [KV, window, h] and their scale [KV, 1, window]."""
    if isinstance(layer, Quantized):
        return layer.values[:, :window], layer.scale[:, None, :window, 0]
    return layer[:, :window], 1.0
