"""Attention over rows, whole or packed with several segments.

B rows, KV kv-heads, G q-heads for each of them, S positions, h head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import splash
from dcmdp_jax.models.quantized import einsum

BLOCK = 128  # positions of a tile of scores on a CPU: what is made for it stays in the core's cache
# the score of what is not looked at; finite, so that a tile without any score gives no NaN
LOW = -1e30


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`softmax(q k^T / sqrt(h)) v` with softmax in float32.

    q [B, KV, G, S, h], k, v [B, KV, T, h], mask broadcasts to [B, KV, G, S, T] and is true where q
    may look.
    """
    # Repeated for each q-head: small beside the scores, and on CPUs up to 1.7 times as fast.
    k, v = (jnp.broadcast_to(x[:, :, None], (*q.shape[:3], *x.shape[2:])) for x in (k, v))
    scores = einsum("bkgsh,bkgth->bkgst", q, k, q.dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return einsum("bkgst,bkgth->bkgsh", jax.nn.softmax(scores, axis=-1), v, q.dtype).astype(q.dtype)


def packed(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Causal `attention` within the segments of packed rows: q [B, KV, G, S, h], k, v [B, KV, S, h]
    -> q's shape.

    A segment is a run of equal `segment_ids` [B, S]; None: every row is one. On a TPU the splash
    kernel makes it where its
    shapes allow, on a GPU cuDNN's in bfloat16. On a CPU scores are made in tiles of `BLOCK`
    positions, and only those that
    some query may look at: memory grows with S, work with the sum of the segments' squares.
        Elsewhere scores are whole.
    """
    if segment_ids is None:
        segment_ids = jnp.ones((q.shape[0], q.shape[3]), jnp.int32)
    if splash.is_supported(q):
        return jax.lax.platform_dependent(
            q, k, v, segment_ids, tpu=splash.attention, default=_without_splash
        )
    return _without_splash(q, k, v, segment_ids)


def _without_splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    first = segment_starts(segment_ids)
    mesh = sharding.current_mesh()
    if mesh is None:
        return _on_one_device(q, k, v, first)
    if mesh.shape["sequence"] > 1:
        return _whole(q, k, v, first)
    queries = ("rows", "kv_heads", None, None, None)
    keys = ("rows", "kv_heads", None, None)
    return sharding.shard_map(_on_one_device, queries, keys, keys, ("rows", None), out=queries)(
        q, k, v, first
    )


def _on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    # cuDNN's version is asked for while tracing
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
        return _by_cudnn(q, k, v, first)
    return jax.lax.platform_dependent(q, k, v, first, cpu=_by_tiles, default=_whole)


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    rows, heads, group, size, width = q.shape
    flat = q.reshape(rows, heads * group, size, width).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        flat, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=_mask(first)[:, None], implementation="cudnn"
    )
    return out.swapaxes(1, 2).reshape(q.shape)


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Where in its row each position's segment begins: [B, S] int32."""
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return jax.lax.cummax(
        jnp.where(begins, jnp.arange(segment_ids.shape[1], dtype=jnp.int32), 0), axis=1
    )


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    return attention(q, k, v, _mask(first)[:, None, None])


def _mask(first: jax.Array) -> jax.Array:
    """[B, S, S], true where the query of a row may look at the key of a column."""
    index = jnp.arange(first.shape[1])
    return (index[:, None] >= index) & (index >= first[..., None])


def _by_tiles(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    size = q.shape[3]
    pad = -size % min(BLOCK, size)
    if pad:  # the positions that fill the last block are segments of their own
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
        own = jnp.broadcast_to(jnp.arange(size, size + pad, dtype=first.dtype), (len(first), pad))
        first = jnp.concatenate([first, own], axis=1)
    return _tiled(q, k, v, first)[..., :size, :]


@jax.custom_vjp
def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    return _forward(q, k, v, first)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple]:
    """Softmax by a running maximum and sum over a block of queries' tiles (arXiv 2205.14135)."""
    rows, heads, group, size, width = q.shape
    block = min(BLOCK, size)
    # [B, KV, h, S]: with few columns, products of a row-major pair are twice as fast
    keys = k.swapaxes(2, 3)

    def of_queries(n, out):
        at = n // (size // block), n % (size // block)
        x = _queries(q, at, block)
        looks = _looks(first, at, block, group)

        def tile(j, carry):
            top, total, mixed = carry
            scores = jnp.where(
                looks(j), einsum("kqh,kht->kqt", x, _columns(keys, at[0], j, block), q.dtype), LOW
            )
            new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            p = jnp.exp(scores - new)
            shrink = jnp.exp(top - new)
            values = einsum("kqt,kth->kqh", p, _rows(v, at[0], j, block), q.dtype)
            return new, total * shrink + jnp.sum(p, axis=-1, keepdims=True), mixed * shrink + values

        column = jnp.zeros((heads, group * block, 1), jnp.float32)
        start = column + LOW, column, jnp.zeros((heads, group * block, width), jnp.float32)
        top, total, mixed = jax.lax.fori_loop(
            first[at[0], at[1] * block] // block, at[1] + 1, tile, start
        )
        return _put(out[0], mixed / total, at, block), _put(out[1], top + jnp.log(total), at, block)

    empty = jnp.zeros_like(q), jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    out, log_total = jax.lax.fori_loop(0, rows * (size // block), of_queries, empty)
    return out, (q, k, v, first, out, log_total)


def _backward(kept: tuple, d_out: jax.Array) -> tuple:
    """Scores are made again, tile by tile; gradients of keys and values add up in place, heads'
    features first.
    """
    q, k, v, first, out, log_total = kept
    _, _, group, size, width = q.shape
    block = min(BLOCK, size)
    keys = k.swapaxes(2, 3)
    values = v.swapaxes(2, 3)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def of_queries(n, carry):
        dq, dk, dv = carry
        at = n // (size // block), n % (size // block)
        x = _queries(q, at, block)
        looks = _looks(first, at, block, group)
        dy, total, mean = (_queries(a, at, block, 1.0) for a in (d_out, log_total, inner))

        def tile(j, carry):
            dx, dk, dv = carry
            scores = einsum("kqh,kht->kqt", x, _columns(keys, at[0], j, block), q.dtype)
            p = jnp.where(looks(j), jnp.exp(scores - total), 0.0)
            d_scores = p * (
                einsum("kqh,kht->kqt", dy, _columns(values, at[0], j, block), q.dtype) - mean
            )
            dx = dx + einsum("kqt,kth->kqh", d_scores, _rows(k, at[0], j, block), q.dtype)
            dk = _add_columns(dk, einsum("kqh,kqt->kht", x, d_scores, q.dtype), at[0], j, block)
            return dx, dk, _add_columns(dv, einsum("kqh,kqt->kht", dy, p, q.dtype), at[0], j, block)

        begin = first[at[0], at[1] * block] // block
        dx, dk, dv = jax.lax.fori_loop(
            begin, at[1] + 1, tile, (jnp.zeros(x.shape, jnp.float32), dk, dv)
        )
        return _put(dq, dx * width**-0.5, at, block), dk, dv

    empty = jnp.zeros_like(q), *(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[0] * (size // block), of_queries, empty)
    return dq, dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype), None


_tiled.defvjp(_forward, _backward)


def _looks(first: jax.Array, at: tuple, block: int, group: int):
    """Of a block of queries: a function from the number of a block of keys to the mask [G * block,
    block] of their tile.
    """
    row, i = at
    index = jnp.arange(block)
    begin = jnp.tile(jax.lax.dynamic_slice(first, (row, i * block), (1, block))[0], group)[:, None]
    here = jnp.tile(i * block + index, group)[:, None]
    return lambda j: (j * block + index <= here) & (j * block + index >= begin)


def _queries(x: jax.Array, at: tuple, block: int, scale: float | None = None) -> jax.Array:
    """Block at[1] of row at[0], times 1 / sqrt(h) or `scale`: [B, KV, G, S, h] -> [KV, G * block,
    h].
    """
    _, heads, group, _, width = x.shape
    cut = jax.lax.dynamic_slice(x, (at[0], 0, 0, at[1] * block, 0), (1, heads, group, block, width))
    return cut.reshape(heads, group * block, width) * (width**-0.5 if scale is None else scale)


def _put(x: jax.Array, cut: jax.Array, at: tuple, block: int) -> jax.Array:
    """The inverse of `_queries`."""
    _, heads, group, _, width = x.shape
    return jax.lax.dynamic_update_slice(
        x,
        cut.reshape(1, heads, group, block, width).astype(x.dtype),
        (at[0], 0, 0, at[1] * block, 0),
    )


def _rows(x: jax.Array, row: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """[B, KV, S, h] -> [KV, block, h]."""
    return jax.lax.dynamic_slice(x, (row, 0, j * block, 0), (1, x.shape[1], block, x.shape[3]))[0]


def _columns(x: jax.Array, row: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """[B, KV, h, S] -> [KV, h, block]."""
    return jax.lax.dynamic_slice(x, (row, 0, 0, j * block), (1, x.shape[1], x.shape[2], block))[0]


def _add_columns(
    x: jax.Array, cut: jax.Array, row: jax.Array, j: jax.Array, block: int
) -> jax.Array:
    return jax.lax.dynamic_update_slice(
        x, (_columns(x, row, j, block) + cut)[None], (row, 0, 0, j * block)
    )
