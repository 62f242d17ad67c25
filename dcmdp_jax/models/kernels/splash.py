"""Attention over packed rows on a TPU: the splash kernel of `jax.experimental.pallas`, one shard of
rows and heads at a time.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dcmdp_jax import sharding

LANES = 128  # head size and row length are multiples of it, or the kernel does not apply
BLOCKS = (1024, 512, 256, 128)


def is_supported(q: jax.Array) -> bool:
    """Whether the kernel takes queries [R, KV, G, S, h]: its head size, and the positions of one
    device, fill whole lanes.
    """
    mesh = sharding.current_mesh()
    length = q.shape[3] // (mesh.shape["sequence"] if mesh else 1)
    return q.shape[-1] % LANES == 0 and length % LANES == 0


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """`softmax(q k^T / sqrt(h)) v` within segments, causal: q [R, KV, G, S, h], k, v [R, KV, S, h],
    segment_ids [R, S].

    Scores are float32 and never whole; q, k and v enter the products as they are. `interpret` runs
    the kernel anywhere.
    """
    mesh = sharding.current_mesh()
    splits = mesh.shape["sequence"] if mesh else 1
    made = _kernel(q.shape[2], q.shape[3], splits, interpret)

    def rows(made, q, k, v, q_segments, segments):
        one = jax.vmap(made, (0, 0, 0, None))  # over kv heads
        return jax.vmap(lambda q, k, v, a, b: one(q, k, v, kernel.SegmentIds(a, b)))(
            q, k, v, q_segments, segments
        )

    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    if mesh is None:
        return rows(made, q, k, v, segment_ids, segment_ids)
    return sharding.shard_map(
        rows,
        made.manual_sharding_spec(sharding.activation_sharding(None, "positions")),
        ("rows", "kv_heads", None, "positions", None),
        ("rows", "kv_heads", None, None),
        ("rows", "kv_heads", None, None),
        ("rows", "positions"),
        ("rows", None),
        out=("rows", "kv_heads", None, "positions", None),
    )(made, q, k, v, segment_ids, segment_ids)


def _kernel(group: int, length: int, splits: int, interpret: bool) -> kernel.SplashAttentionKernel:
    """The kernel of one kv head's `group` query heads, its queries split over `splits` devices."""
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
