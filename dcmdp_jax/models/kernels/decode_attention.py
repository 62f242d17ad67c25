"""Attention to a key-value cache in decoding, on a TPU: a kernel that reads of each slot the blocks
of positions that hold tokens, and no others.

A step of the grid is one such block; how many there are is known only when the program runs. The
softmax has a running maximum and sum (arXiv 2205.14135). B slots, KV kv-heads, G q-heads for each
of them, S positions, h head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.quantized import Quantized, einsum

LANES = 128  # the kernel needs a multiple of it as head size
LOW = -1e30  # the score of a masked position

SLOTS = ("rows", "kv_heads", None, None)


def is_supported(head_dim: int) -> bool:
    """Returns True if the kernel takes heads of that size."""
    return head_dim % LANES == 0


def attention(
    q: jax.Array,
    keys: jax.Array | Quantized,
    values: jax.Array | Quantized,
    lengths: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    *,
    positions: int = tiles.DECODE_POSITIONS,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `cache.attend` does: q [B, KV, G, h], keys, values [B, KV, S, h], lengths [B] ->
    [B, KV, G, h]. A length of S or more counts as S - 1.

    On a `mesh`, slots are split over its batch axes and kv-heads over tensor, as in the decode
    state. `positions` are those of a block, at most (see `block_positions`). `interpret` runs the
    kernel on any device.
    """
    on_shard = functools.partial(_on_shard, positions=positions, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return on_shard(q, keys, values, lengths)

    def on_mesh(q, keys, values, lengths):
        return sharding.shard_map(on_shard, SLOTS, SLOTS, SLOTS, ("rows",), out=SLOTS)(
            q, keys, values, lengths
        )

    return sharding.with_mesh(mesh, on_mesh)(q, keys, values, lengths)


def block_positions(
    heads: int, length: int, row_bytes: int, positions: int = tiles.DECODE_POSITIONS
) -> int:
    """Returns the positions of a block of a cache with `heads` kv-heads and `length` positions on
    one device; `row_bytes` are those of one position of one head.

    A block has at most `positions`, and fewer if its keys take more than `tiles.DECODE_BYTES`.
    """
    size = positions
    while size > LANES and size * row_bytes * heads // _parts(heads) > tiles.DECODE_BYTES:
        size //= 2
    return min(size, length)


def _parts(heads: int) -> int:
    """Returns into how many parts the heads are split: one for each of the two cores of a chip that
    has them (v4, v5p), if they divide.
    """
    return 2 if heads % 2 == 0 else 1


def _on_shard(
    q: jax.Array,
    keys: jax.Array | Quantized,
    values: jax.Array | Quantized,
    lengths: jax.Array,
    positions: int,
    interpret: bool,
) -> jax.Array:
    _, heads, group, width = q.shape
    length = keys.shape[2]
    held = heads // _parts(heads)
    (k, _), (v, _) = cached = _stored(keys), _stored(values)
    size = block_positions(heads, length, width * k.dtype.itemsize, positions)
    lengths = jnp.minimum(lengths, length - 1)
    slot, block, count = _live_blocks(lengths, size, -(-length // size))

    def at_slot(part, n, slot, block, lengths):
        return slot[n], part, 0, 0

    def at_block(part, n, slot, block, lengths):
        return slot[n], part, block[n], 0

    def at_scales(part, n, slot, block, lengths):
        return slot[n], part, 0, block[n]

    of_queries = pl.BlockSpec((None, held, group, width), at_slot)
    of_block = pl.BlockSpec((None, held, size, width), at_block)
    of_scales = pl.BlockSpec((None, held, 1, size), at_scales)
    specs = tuple((of_block, None if scale is None else of_scales) for _, scale in cached)
    state = pltpu.VMEM((held, group, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(_attend_to_block, size=size, is_ragged=length % size > 0),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(_parts(heads), count),
            in_specs=[of_queries, *specs],
            out_specs=of_queries,
            scratch_shapes=[state, state, pltpu.VMEM((held, group, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(slot, block, lengths, q, *cached)


def _stored(layer: jax.Array | Quantized) -> tuple[jax.Array, jax.Array | None]:
    """Returns the stored elements and their scale, [B, KV, 1, S], if they have one."""
    if isinstance(layer, Quantized):
        return layer.values, layer.scale.swapaxes(2, 3)
    return layer, None


def _live_blocks(
    lengths: jax.Array, size: int, blocks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the slot and the number of each block that holds a token, one slot after the other,
    and how many there are; the arrays have room for all, [B * blocks].
    """
    of_slot = lengths // size + 1
    room = len(lengths) * blocks
    slot = jnp.repeat(jnp.arange(len(lengths), dtype=jnp.int32), of_slot, total_repeat_length=room)
    first = jnp.cumsum(of_slot) - of_slot
    return slot, jnp.arange(room, dtype=jnp.int32) - first[slot], jnp.sum(of_slot)


def _attend_to_block(
    slot, block, lengths, q, keys, values, out, top, total, mixed, *, size: int, is_ragged: bool
) -> None:
    """Step n of the grid: adds block `block[n]` of slot `slot[n]` to the sums `total` [KV, G, 1] of
    the weights and `mixed` [KV, G, h] of the weighted values, which are relative to exp(`top`).

    `is_ragged`: the last block of a slot ends behind the cache, where it holds anything.
    """
    n = pl.program_id(1)
    first = block[n] * size
    length = lengths[slot[n]]

    @pl.when(first == 0)
    def start():
        top[...] = jnp.full_like(top, LOW)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    (k, k_scale), (v, v_scale) = (
        (stored[...], 1.0 if scale is None else scale[...]) for stored, scale in (keys, values)
    )
    scores = einsum("kgh,kth->kgt", q[...], k, q.dtype) * k_scale * q.shape[-1] ** -0.5
    attends = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) <= length
    scores = jnp.where(attends, scores, LOW)
    new_top = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_top)
    shrink = jnp.exp(top[...] - new_top)
    if is_ragged:
        place = first + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
        v = jnp.where(place <= length, v.astype(jnp.float32), 0)
    weighted = einsum("kgt,kth->kgh", jnp.where(attends, weights * v_scale, 0), v, q.dtype)
    top[...] = new_top
    total[...] = total[...] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    mixed[...] = mixed[...] * shrink + weighted

    @pl.when(first + size > length)
    def end():
        out[...] = (mixed[...] / total[...]).astype(out.dtype)
