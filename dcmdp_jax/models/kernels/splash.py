"""Attention over packed rows on a TPU: the splash kernel of `jax.experimental.pallas`.

R rows, KV kv-heads, G q-heads for each of them, S positions, h head size.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dcmdp_jax import sharding

LANES = 128  # the kernel needs multiples of it as head size and as row length
BLOCKS = (1024, 512, 256, 128)


def is_supported(q: jax.Array) -> bool:
    """Returns True if the kernel takes queries [R, KV, G, S, h]: the head size and the number of
    positions of one device are multiples of `LANES`.
    """
    mesh = sharding.current_mesh()
    length = q.shape[3] // (mesh.shape["sequence"] if mesh else 1)
    return q.shape[-1] % LANES == 0 and length % LANES == 0


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns causal `softmax(q k^T / sqrt(h)) v` within segments: q [R, KV, G, S, h], k, v [R, KV,
    S, h], segment_ids [R, S] -> q's shape.

    Scores are float32 and exist a tile at a time; q, k and v are multiplied in their own dtype.
    `interpret` runs the kernel on any device.
    """
    mesh = sharding.current_mesh()
    splits = mesh.shape["sequence"] if mesh else 1
    of_head = _kernel(q.shape[2], q.shape[3], splits, interpret)

    def on_shard(of_head, q, k, v, q_segments, kv_segments):
        of_row = jax.vmap(of_head, (0, 0, 0, None))  # over kv-heads
        return jax.vmap(lambda q, k, v, *ids: of_row(q, k, v, kernel.SegmentIds(*ids)))(
            q, k, v, q_segments, kv_segments
        )

    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    if mesh is None:
        return on_shard(of_head, q, k, v, segment_ids, segment_ids)
    return sharding.shard_map(
        on_shard,
        of_head.manual_sharding_spec(sharding.activation_sharding(None, "positions")),
        ("rows", "kv_heads", None, "positions", None),
        ("rows", "kv_heads", None, None),
        ("rows", "kv_heads", None, None),
        ("rows", "positions"),
        ("rows", None),
        out=("rows", "kv_heads", None, "positions", None),
    )(of_head, q, k, v, segment_ids, segment_ids)


def _kernel(group: int, length: int, splits: int, interpret: bool) -> kernel.SplashAttentionKernel:
    """Returns the kernel of one kv-head and its `group` q-heads, with queries split over `splits`
    devices.
    """
    query = next(size for size in BLOCKS if length // splits % size == 0)
    key = next(size for size in BLOCKS if length % size == 0)
    blocks = kernel.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=min(key, 512),
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=min(key, 512),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length), shard_count=splits)] * group)
    return kernel.make_splash_mqa(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=splits, interpret=interpret
    )
