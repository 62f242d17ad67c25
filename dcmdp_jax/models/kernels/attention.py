"""Attention over rows of one segment, or of several packed segments.

B rows, KV kv-heads, G q-heads for each of them, S positions, h head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import runs, splash, tiles
from dcmdp_jax.models.quantized import einsum

# the score of a masked position; finite, so that a tile without any other gives no NaN
LOW = -1e30


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `softmax(q k^T / sqrt(h)) v`, softmax in float32.

    q [B, KV, G, S, h], k, v [B, KV, T, h]; mask broadcasts to [B, KV, G, S, T] and is True where a
    query attends to a key.
    """
    # Repeated for each q-head: small beside the scores, and on CPUs up to 1.7 times as fast.
    k, v = (jnp.broadcast_to(x[:, :, None], (*q.shape[:3], *x.shape[2:])) for x in (k, v))
    scores = einsum("bkgsh,bkgth->bkgst", q, k, q.dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return einsum("bkgst,bkgth->bkgsh", jax.nn.softmax(scores, axis=-1), v, q.dtype).astype(q.dtype)


def packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    prefix_ids: jax.Array | None = None,
    *,
    block: int = tiles.ATTENTION_POSITIONS,
) -> jax.Array:
    """Returns causal `attention` within the segments of packed rows, and of branches to the prefix
    that they continue: q [B, KV, G, S, h], k, v [B, KV, S, h] -> q's shape.

    A segment is a run of equal `segment_ids` [B, S]; None: every row is one. A query attends to
    itself, to the positions before it in its segment and, if its `prefix_ids` [B, S] is not 0, to
    the segment with that id. That is followed by its branches, one after the other. `prefix_ids`
    None: there are no branches. Padding, id 0, attends to itself alone.

    A TPU uses the splash kernel if its shapes allow, a GPU cuDNN's in bfloat16. A CPU computes
    scores in tiles of `block` positions, and only tiles with a pair that attends: memory grows with
    S, work with the sum of the segments' squares and, for each branch, its length times the
    prefix's. Otherwise the whole matrix of scores is computed.
    """
    if segment_ids is None:
        segment_ids = jnp.ones((q.shape[0], q.shape[3]), jnp.int32)
    ids = (segment_ids,) if prefix_ids is None else (segment_ids, prefix_ids)
    without_splash = partial(_without_splash, block=block)
    if splash.is_supported(q):
        return jax.lax.platform_dependent(
            q, k, v, *ids, tpu=splash.attention, default=without_splash
        )
    return without_splash(q, k, v, *ids)


class Spans(NamedTuple):
    """What each position of a row attends to: the positions from `segment_start` to itself, and
    those from `family_start` to before `prefix_stop`; [B, S] int32.

    A family is a prefix with its branches. For a segment that is no branch, the second span is
    empty. The last two are None if there are no branches at all.
    """

    segment_start: jax.Array
    family_start: jax.Array | None = None
    prefix_stop: jax.Array | None = None


def spans_of(segment_ids: jax.Array, prefix_ids: jax.Array | None = None) -> Spans:
    """Returns what the positions of packed rows attend to."""
    segment_start = runs.segment_starts(segment_ids)
    if prefix_ids is None:
        return Spans(segment_start)
    family = jnp.where(prefix_ids > 0, prefix_ids, segment_ids)
    # the branches of a prefix are a run of its id in `prefix_ids`, which begins behind the prefix
    return Spans(segment_start, runs.segment_starts(family), runs.run_starts(prefix_ids))


def _without_splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array | None = None,
    *,
    block: int,
) -> jax.Array:
    spans = spans_of(segment_ids, prefix_ids)
    on_one_device = partial(_on_one_device, block=block)
    mesh = sharding.current_mesh()
    if mesh is None:
        return on_one_device(q, k, v, spans)
    if mesh.shape["sequence"] > 1:
        return _dense(q, k, v, spans)
    queries = ("rows", "kv_heads", None, None, None)
    keys = ("rows", "kv_heads", None, None)
    return sharding.shard_map(on_one_device, queries, keys, keys, ("rows", None), out=queries)(
        q, k, v, spans
    )


def _on_one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, block: int
) -> jax.Array:
    # cuDNN checks while tracing that there is a GPU
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
        return _by_cudnn(q, k, v, spans)
    by_tiles = partial(_by_tiles, block=block)
    return jax.lax.platform_dependent(q, k, v, spans, cpu=by_tiles, default=_dense)


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    rows, heads, group, size, width = q.shape
    flat = q.reshape(rows, heads * group, size, width).swapaxes(1, 2)
    mask = _mask(spans)[:, None]
    out = jax.nn.dot_product_attention(
        flat, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask, implementation="cudnn"
    )
    return out.swapaxes(1, 2).reshape(q.shape)


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    return attention(q, k, v, _mask(spans)[:, None, None])


def _mask(spans: Spans) -> jax.Array:
    """Returns [B, S, S], True where the query of a row attends to the key of a column."""
    index = jnp.arange(spans.segment_start.shape[1])
    of_query = jax.tree.map(lambda x: x[..., None], spans)
    return (index[:, None] >= index) & _in_spans(index, of_query)


def _in_spans(key: jax.Array, spans: Spans) -> jax.Array:
    """True where a key is in one of a query's two spans, if it does not follow the query."""
    in_segment = key >= spans.segment_start
    if spans.family_start is None:
        return in_segment
    return in_segment | ((key >= spans.family_start) & (key < spans.prefix_stop))


def _by_tiles(q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, *, block: int) -> jax.Array:
    size = q.shape[3]
    block = min(block, size)
    pad = -size % block
    if pad:  # the positions that fill the last block are segments of their own
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q, k, v))
        own = jnp.arange(size, size + pad, dtype=spans.segment_start.dtype)
        own = jnp.broadcast_to(own, (len(spans.segment_start), pad))
        spans = jax.tree.map(lambda x: jnp.concatenate([x, own], axis=1), spans)
    return _tiled(block, q, k, v, spans)[..., :size, :]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(block: int, q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans) -> jax.Array:
    return _forward(block, q, k, v, spans)[0]


def _forward(
    block: int, q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans
) -> tuple[jax.Array, tuple]:
    """Softmax by a running maximum and sum over a block of queries' tiles (arXiv 2205.14135)."""
    rows, heads, group, size, width = q.shape
    # [B, KV, h, S]: products of a row-major pair with few columns are twice as fast
    keys = k.swapaxes(2, 3)

    def query_block(n, carry):
        out, log_total = carry
        row = n // (size // block)
        i = n % (size // block)
        x = _query_block(q, row, i, block)
        attends = _attends(spans, row, i, block, group)

        def tile(j, carry):
            top, total, mixed = carry
            scores = einsum("kqh,kht->kqt", x, _columns(keys, row, j, block), q.dtype)
            scores = jnp.where(attends(j), scores, LOW)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            p = jnp.exp(scores - new_top)
            shrink = jnp.exp(top - new_top)
            values = einsum("kqt,kth->kqh", p, _rows(v, row, j, block), q.dtype)
            total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
            return new_top, total, mixed * shrink + values

        column = jnp.zeros((heads, group * block, 1), jnp.float32)
        start = column + LOW, column, jnp.zeros((heads, group * block, width), jnp.float32)
        top, total, mixed = _for_each_tile(spans, row, i, block, tile, start)
        out = _write_query_block(out, mixed / total, row, i, block)
        return out, _write_query_block(log_total, top + jnp.log(total), row, i, block)

    empty = jnp.zeros_like(q), jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    out, log_total = jax.lax.fori_loop(0, rows * (size // block), query_block, empty)
    return out, (q, k, v, spans, out, log_total)


def _backward(block: int, residuals: tuple, d_out: jax.Array) -> tuple:
    """Recomputes the scores, tile by tile. Gradients of keys and values add up in place, as [B, KV,
    h, S].
    """
    q, k, v, spans, out, log_total = residuals
    _, _, group, size, width = q.shape
    keys = k.swapaxes(2, 3)
    values = v.swapaxes(2, 3)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def query_block(n, carry):
        dq, dk, dv = carry
        row = n // (size // block)
        i = n % (size // block)
        x = _query_block(q, row, i, block)
        attends = _attends(spans, row, i, block, group)
        dy, total, mean = (
            _query_block(a, row, i, block, scale=1.0) for a in (d_out, log_total, inner)
        )

        def tile(j, carry):
            dx, dk, dv = carry
            scores = einsum("kqh,kht->kqt", x, _columns(keys, row, j, block), q.dtype)
            p = jnp.where(attends(j), jnp.exp(scores - total), 0.0)
            d_p = einsum("kqh,kht->kqt", dy, _columns(values, row, j, block), q.dtype)
            d_scores = p * (d_p - mean)
            dx = dx + einsum("kqt,kth->kqh", d_scores, _rows(k, row, j, block), q.dtype)
            dk = _add_columns(dk, einsum("kqh,kqt->kht", x, d_scores, q.dtype), row, j, block)
            dv = _add_columns(dv, einsum("kqh,kqt->kht", dy, p, q.dtype), row, j, block)
            return dx, dk, dv

        start = jnp.zeros(x.shape, jnp.float32), dk, dv
        dx, dk, dv = _for_each_tile(spans, row, i, block, tile, start)
        return _write_query_block(dq, dx * width**-0.5, row, i, block), dk, dv

    empty = jnp.zeros_like(q), *(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[0] * (size // block), query_block, empty)
    return dq, dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype), None


_tiled.defvjp(_forward, _backward)


def _for_each_tile(
    spans: Spans, row: jax.Array, i: jax.Array, block: int, tile: Callable, carry: Any
) -> Any:
    """Carries `carry` through `tile(j, carry)` for every block j of keys that block i of a row's
    queries attends to.

    Their segments and prefixes begin no earlier than those of the first query. So they are the
    blocks of its prefix, and all from its segment's first to block i.
    """
    first = spans.segment_start[row, i * block] // block
    if spans.family_start is None:
        return jax.lax.fori_loop(first, i + 1, tile, carry)
    first_of_prefix = spans.family_start[row, i * block] // block
    stop_of_prefix = jnp.minimum(-(-spans.prefix_stop[row, i * block] // block), first)
    skipped = first - jnp.maximum(stop_of_prefix, first_of_prefix)

    def numbered(n: jax.Array, carry: Any) -> Any:
        return tile(jnp.where(n < stop_of_prefix, n, n + skipped), carry)

    return jax.lax.fori_loop(first_of_prefix, i + 1 - skipped, numbered, carry)


def _attends(spans: Spans, row: jax.Array, i: jax.Array, block: int, group: int):
    """Returns, for block i of a row's queries, a function from the number of a block of keys to the
    mask [G * block, block] of their tile.
    """
    index = jnp.arange(block)

    def of_query(x):
        part = jax.lax.dynamic_slice(x, (row, i * block), (1, block))[0]
        return jnp.tile(part, group)[:, None]

    own = jax.tree.map(of_query, spans)
    query = jnp.tile(i * block + index, group)[:, None]
    return lambda j: (j * block + index <= query) & _in_spans(j * block + index, own)


def _query_block(
    x: jax.Array, row: jax.Array, i: jax.Array, block: int, scale: float | None = None
) -> jax.Array:
    """Returns block i of a row times 1 / sqrt(h), or `scale`: [B, KV, G, S, h] -> [KV, G * block,
    h].
    """
    _, heads, group, _, width = x.shape
    part = jax.lax.dynamic_slice(x, (row, 0, 0, i * block, 0), (1, heads, group, block, width))
    return part.reshape(heads, group * block, width) * (width**-0.5 if scale is None else scale)


def _write_query_block(
    x: jax.Array, part: jax.Array, row: jax.Array, i: jax.Array, block: int
) -> jax.Array:
    """Writes [KV, G * block, h] where `_query_block` reads it."""
    _, heads, group, _, width = x.shape
    part = part.reshape(1, heads, group, block, width).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, part, (row, 0, 0, i * block, 0))


def _rows(x: jax.Array, row: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """[B, KV, S, h] -> [KV, block, h]."""
    return jax.lax.dynamic_slice(x, (row, 0, j * block, 0), (1, x.shape[1], block, x.shape[3]))[0]


def _columns(x: jax.Array, row: jax.Array, j: jax.Array, block: int) -> jax.Array:
    """[B, KV, h, S] -> [KV, h, block]."""
    return jax.lax.dynamic_slice(x, (row, 0, 0, j * block), (1, x.shape[1], x.shape[2], block))[0]


def _add_columns(
    x: jax.Array, part: jax.Array, row: jax.Array, j: jax.Array, block: int
) -> jax.Array:
    """Adds [KV, h, block] where `_columns` reads it."""
    total = (_columns(x, row, j, block) + part)[None]
    return jax.lax.dynamic_update_slice(x, total, (row, 0, 0, j * block))
