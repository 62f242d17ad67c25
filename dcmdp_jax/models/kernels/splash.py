"""Attention over packed rows on a TPU: the splash kernel of `jax.experimental.pallas`.

R rows, KV kv-heads, G q-heads for each of them, S positions, h head size.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

from dcmdp_jax import limits, sharding
from dcmdp_jax.models.kernels import runs

LANES = 128  # the kernel needs multiples of it as head size and as row length
BLOCKS = (1024, 512, 256, 128)
POSITION_BITS = limits.MAX_SHARED_ROW.bit_length() - 1
NO_ID = -1  # of a key that no query attends to

QUERIES = ("rows", "kv_heads", None, "positions", None)
KEYS = ("rows", "kv_heads", None, None)


def is_supported(q: jax.Array) -> bool:
    """Returns True if the kernel takes queries [R, KV, G, S, h]: the head size and the number of
    positions of one device are multiples of `LANES`.
    """
    mesh = sharding.current_mesh()
    length = q.shape[3] // (mesh.shape["sequence"] if mesh else 1)
    return q.shape[-1] % LANES == 0 and length % LANES == 0


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns causal `softmax(q k^T / sqrt(h)) v` within segments: q [R, KV, G, S, h], k, v [R, KV,
    S, h], segment_ids [R, S] -> q's shape.

    With `prefix_ids` [R, S], a query also attends to an earlier segment: the one whose id is the
    query's prefix id, 0 for none. That segment has no prefix itself, every segment is one run of
    positions, and padding, id 0, attends to itself alone. Scores are float32 and exist a tile at a
    time; q, k and v are multiplied in their own dtype. `interpret` runs the kernel on any device.
    Raises ValueError if rows with `prefix_ids` are longer than 32,768 positions.
    """
    mesh = sharding.current_mesh()
    splits = mesh.shape["sequence"] if mesh else 1
    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    if prefix_ids is not None:
        return _with_prefixes(q, k, v, segment_ids, prefix_ids, splits, interpret)
    of_head = _kernel(q.shape[2], q.shape[3], splits, interpret)

    def on_shard(of_head, q, k, v, q_segments, kv_segments):
        of_row = jax.vmap(of_head, (0, 0, 0, None))  # over kv-heads
        return jax.vmap(lambda q, k, v, *ids: of_row(q, k, v, kernel.SegmentIds(*ids)))(
            q, k, v, q_segments, kv_segments
        )

    if mesh is None:
        return on_shard(of_head, q, k, v, segment_ids, segment_ids)
    of_head_spec = of_head.manual_sharding_spec(sharding.activation_sharding(None, "positions"))
    ids = ("rows", "positions"), ("rows", None)
    return sharding.shard_map(on_shard, of_head_spec, QUERIES, KEYS, KEYS, *ids, out=QUERIES)(
        of_head, q, k, v, segment_ids, segment_ids
    )


def _kernel(group: int, length: int, splits: int, interpret: bool) -> kernel.SplashAttentionKernel:
    """Returns the kernel of one kv-head and its `group` q-heads, with queries split over `splits`
    devices.
    """
    mask = masks.MultiHeadMask([masks.CausalMask((length, length), shard_count=splits)] * group)
    return kernel.make_splash_mqa(
        mask,
        block_sizes=_block_sizes(length, splits, fused=True),
        head_shards=1,
        q_seq_shards=splits,
        interpret=interpret,
    )


def _block_sizes(length: int, splits: int, fused: bool) -> kernel.BlockSizes:
    """Returns the tiles of a row. `fused`: dq is computed with dk and dv, and exists for each block
    of keys until they are summed.
    """
    query = next(size for size in BLOCKS if length // splits % size == 0)
    key = next(size for size in BLOCKS if length % size == 0)
    return kernel.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=min(key, 512),
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=min(key, 512),
        block_q_dq=None if fused else query,
        block_kv_dq=None if fused else key,
        use_fused_bwd_kernel=fused,
    )


def _with_prefixes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array,
    splits: int,
    interpret: bool,
) -> jax.Array:
    """Returns `attention` of queries that are scaled, with `prefix_ids`.

    The kernel's mask is equality of an id of the query and one of the key, and a function of one
    number of the query and the key's position. A query may attend to two runs of positions: its
    prefix, and its own segment up to itself. So there are two copies of the keys, one after the
    other. Keys of segments without a prefix have an id in the first alone, other keys in the
    second alone: that of the prefix. Padding's are in the second, where a query attends to no key
    before its own segment. Every query attends to itself in one of them, so no softmax is empty.
    """
    length = q.shape[3]
    if length > limits.MAX_SHARED_ROW:
        raise ValueError(
            f"the TPU kernel takes rows of at most {limits.MAX_SHARED_ROW} positions with "
            f"prefix_ids, not {length}; leave prefix_ids out, with a prompt for each completion"
        )
    index = jnp.arange(length, dtype=jnp.int32)
    ids = jnp.where(prefix_ids > 0, prefix_ids, segment_ids)
    in_second = (prefix_ids > 0) | (segment_ids == 0)
    first_ids = jnp.where(in_second, NO_ID, ids)
    second_ids = jnp.where(in_second, ids, NO_ID)
    blocks = _block_sizes(length, splits, fused=False)

    def of_row(q, k, v, q_ids, own_run, kv_ids):
        of_head = _sparse_kernel(q_ids, own_run, kv_ids, blocks, interpret)
        k, v = (jnp.concatenate([x, x], axis=1) for x in (k, v))
        return jax.vmap(of_head, (0, 0, 0, None))(q, k, v, kernel.SegmentIds(q_ids, kv_ids))

    def on_shard(*arrays):  # a row at a time: each has other blocks to compute
        return jax.lax.map(lambda row: of_row(*row), arrays)

    arrays = (
        q,
        k,
        v,
        ids,
        (runs.segment_starts(segment_ids) << POSITION_BITS) + index,
        jnp.concatenate([first_ids, second_ids], axis=1),
    )
    if sharding.current_mesh() is None:
        return on_shard(*arrays)
    of_queries = ("rows", "positions")
    return sharding.shard_map(
        on_shard, QUERIES, KEYS, KEYS, of_queries, of_queries, ("rows", None), out=QUERIES
    )(*arrays)


def _sparse_kernel(
    q_ids: jax.Array,
    own_run: jax.Array,
    kv_ids: jax.Array,
    blocks: kernel.BlockSizes,
    interpret: bool,
) -> kernel.SplashAttentionKernel:
    """Returns the kernel of one kv-head and one row that computes only the blocks in which a query
    may attend to a key.

    `own_run` has the first position of a query's segment and, in its lowest bits, the query's own.
    `kv_ids` are those of both copies of the keys.
    """
    length = len(kv_ids) // 2
    size = blocks.block_kv
    first_key = jnp.arange(0, 2 * length, size)
    keys = kv_ids.reshape(-1, size)
    lowest = jnp.min(jnp.where(keys == NO_ID, jnp.iinfo(keys.dtype).max, keys), axis=1)
    highest = jnp.max(keys, axis=1)
    q_ids = q_ids[:, None]
    start, index = _positions(own_run[:, None])
    earliest = jnp.where(first_key < length, 0, start)
    position = first_key % length
    attends = (lowest <= q_ids) & (q_ids <= highest)
    attends &= (earliest < position + size) & (position <= index)
    active = jnp.any(attends.reshape(-1, blocks.block_q, len(first_key)), axis=1)
    active = active[None].astype(jnp.int32)

    def mask_info(block):
        return splash_attention_mask_info.MaskInfo(
            data_next=active * block,  # a run of blocks that are not computed fetches block 0 once
            mask_next=None,
            block_mask=active,
            partial_mask_blocks=None,
            q_sequence=own_run,
        )

    by_key_block = mask_info(jnp.arange(active.shape[2]))
    by_query_block = mask_info(jnp.arange(active.shape[1])[:, None])
    # make_splash_mqa takes no blocks that are known only when the program runs
    return kernel.SplashAttentionKernel(
        fwd_mask_info=by_key_block,
        dq_mask_info=by_key_block,
        dkv_mask_info=by_query_block,
        block_sizes=blocks,
        is_mqa=True,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=partial(_may_attend, length),
        interpret=interpret,
    )


def _may_attend(length: int, own_run: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the mask of queries and of keys, by their position in two copies of `length`."""
    start, index = _positions(own_run)
    return (key <= index) | ((key >= start + length) & (key <= index + length))


def _positions(own_run: jax.Array) -> tuple[jax.Array, jax.Array]:
    return own_run >> POSITION_BITS, own_run & ((1 << POSITION_BITS) - 1)
