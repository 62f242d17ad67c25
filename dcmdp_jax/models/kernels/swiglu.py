"""SwiGLU (arXiv 2002.05202), `down(silu(gate x) * up x)`, in tiles of rows that fit a CPU's last
cache.

N rows, D model, F feed-forward, E experts; a dense layer is one expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.quantized import (
    Quantized,
    einsum,
    expert_matrix,
    project,
    round_input,
)


class Experts(NamedTuple):
    """SwiGLU matrices of E experts, arrays or `Quantized`."""

    gate: Any  # [E, D, F]
    up: Any  # [E, D, F]
    down: Any  # [E, F, D]


def dense(
    x: jax.Array,
    gate: Any,
    up: Any,
    down: Any,
    *,
    tile_rows: int = tiles.SWIGLU_ROWS,
    few_rows: int = tiles.SWIGLU_FEW_ROWS,
) -> jax.Array:
    """Returns `down(silu(gate x) * up x)`: x [..., D], gate, up [D, F], down [F, D], arrays or
    `Quantized` -> [..., D].

    The backward pass saves gate x and up x, and nothing else of that width. A CPU multiplies tiles
    of at most `tile_rows` rows; up to `few_rows` rows are not tiled.
    """
    if sharding.current_mesh():
        return jax.checkpoint(_down)(project(x, gate), project(x, up), down)
    rows = x.size // x.shape[-1]
    if rows <= few_rows or any(isinstance(w, Quantized) for w in (gate, up, down)):
        return _down(project(x, gate), project(x, up), down)
    return _dense(tile_rows, x.reshape(rows, -1), gate, up, down).reshape(x.shape)


def _down(gate: jax.Array, up: jax.Array, down: Any) -> jax.Array:
    return project(nn.silu(gate) * up, down)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(
    tile_rows: int, x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    return _dense_forward(tile_rows, x, gate, up, down)[0]


def _dense_forward(tile_rows, x, *weights):
    def by_tiles(x, *weights):
        out, (_, gate, up, *_) = _tiled_forward(*_as_one_expert(tile_rows, x, *weights))
        return tuple(a[: len(x)] for a in (out, gate, up))

    def at_once(x, *weights):
        return _forward(x, Experts(*(w[None] for w in weights)), 0)

    y, gate, up = jax.lax.platform_dependent(x, *weights, cpu=by_tiles, default=at_once)
    return y, (x, gate, up, weights)


def _dense_backward(tile_rows, residuals, dy):
    def by_tiles(x, gate, up, dy, *weights):
        padded, experts, owner, _, count, rows = _as_one_expert(tile_rows, x, *weights)
        gate, up, dy = (_pad(a, len(padded)) for a in (gate, up, dy))
        dx, dw, *_ = _tiled_backward(rows, (padded, gate, up, experts, owner, count), dy)
        return dx[: len(x)], *(d[0] for d in dw)

    def at_once(x, gate, up, dy, *weights):
        dx, dw = _backward(x, gate, up, dy, Experts(*weights))
        return dx.astype(x.dtype), *(d.astype(w.dtype) for d, w in zip(dw, weights, strict=True))

    x, gate, up, weights = residuals
    return jax.lax.platform_dependent(x, gate, up, dy, *weights, cpu=by_tiles, default=at_once)


_dense.defvjp(_dense_forward, _dense_backward)


def _as_one_expert(tile_rows: int, x: jax.Array, *weights: jax.Array) -> tuple:
    """Returns the arguments of `tiled` for a dense layer: equal tiles of at most `tile_rows` rows,
    rounded up to multiples of 8 (the processor's vectors).
    """
    num_tiles = -(-len(x) // tile_rows)
    rows = -(-len(x) // num_tiles // 8) * 8
    return (
        _pad(x, num_tiles * rows),
        Experts(*(w[None] for w in weights)),
        jnp.zeros(num_tiles, jnp.int32),
        None,
        num_tiles,
        rows,
    )


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - len(x)), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def tiled(
    x: jax.Array,
    weights: Experts,
    owner: jax.Array,
    filled: jax.Array | None,
    count: jax.Array,
    rows: int,
) -> jax.Array:
    """Returns the feed-forward of the first `count` tiles of `x` [N, D], `rows` rows each; that of
    tile i is by expert owner[i]. Other rows are 0.

    The first `filled[i]` rows of tile i are used (None: all). A tile that is at most half full is
    multiplied as half a tile.
    """

    def step(i, out):
        tile = _tile(x, i, rows)
        half = rows // 2
        e = _owner(weights, owner, i)
        if filled is None:
            return _write_tile(out, _forward(tile, weights, e)[0], i)
        y = jax.lax.cond(
            filled[i] <= half,
            lambda: jnp.pad(_forward(tile[:half], weights, e)[0], ((0, rows - half), (0, 0))),
            lambda: _forward(tile, weights, e)[0],
        )
        return _write_tile(out, y, i)

    return jax.lax.fori_loop(0, count, step, jnp.zeros_like(x))


def _tiled_forward(x, weights, owner, filled, count, rows):
    def step(i, carry):
        outputs = _forward(_tile(x, i, rows), weights, _owner(weights, owner, i))
        return tuple(_write_tile(a, tile, i) for a, tile in zip(carry, outputs, strict=True))

    inner = jnp.zeros((len(x), weights.down.shape[1]), x.dtype)
    out, gate, up = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(x), inner, inner))
    return out, (x, gate, up, weights, owner, count)


def _tiled_backward(rows, residuals, dy):
    """Adds up each expert's gradient over its tiles, in place."""
    x, gate, up, weights, owner, count = residuals

    def step(i, carry):
        dx, dw = carry
        e = _owner(weights, owner, i)
        tile = tuple(_tile(a, i, rows) for a in (x, gate, up, dy))
        own = Experts(*(expert_matrix(w, e, x.dtype) for w in weights))
        d_rows, d_own = _backward(*tile, own)
        dw = Experts(
            *(total.at[e].add(d.astype(total.dtype)) for total, d in zip(dw, d_own, strict=True))
        )
        return _write_tile(dx, d_rows, i), dw

    start = (jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, weights))
    dx, dw = jax.lax.fori_loop(0, count, step, start)
    return dx, dw, None, None, None


tiled.defvjp(_tiled_forward, _tiled_backward)


def _forward(x: jax.Array, weights: Experts, e: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns expert e's output [n, D] for rows [n, D], and its gate and up, [n, F]."""
    x = round_input(x, weights.gate)
    gate = _product("nd,df->nf", x, expert_matrix(weights.gate, e, x.dtype))
    up = _product("nd,df->nf", x, expert_matrix(weights.up, e, x.dtype))
    inner = round_input(nn.silu(gate) * up, weights.down)
    return _product("nf,fd->nd", inner, expert_matrix(weights.down, e, x.dtype)), gate, up


def _backward(
    x: jax.Array, gate: jax.Array, up: jax.Array, dy: jax.Array, w: Experts
) -> tuple[jax.Array, Experts]:
    """Returns the gradients of rows [n, D] and of their expert's matrices, [D, F] and [F, D]."""
    g = gate.astype(jnp.float32)
    u = up.astype(jnp.float32)
    sigmoid = nn.sigmoid(g)
    d_inner = einsum("nd,fd->nf", dy, w.down, x.dtype)
    d_gate = d_inner * u * sigmoid * (1 + g * (1 - sigmoid))
    d_up = d_inner * g * sigmoid
    dx = einsum("nf,df->nd", d_gate, w.gate, x.dtype) + einsum("nf,df->nd", d_up, w.up, x.dtype)
    return dx, Experts(
        einsum("nd,nf->df", x, d_gate, x.dtype),
        einsum("nd,nf->df", x, d_up, x.dtype),
        einsum("nf,nd->fd", g * sigmoid * u, dy, x.dtype),
    )


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum(spec, x, w, x.dtype).astype(x.dtype)


def _owner(weights: Experts, owner: jax.Array, i: jax.Array) -> Any:
    """Returns tile i's expert: a plain 0 if there is one, so that its matrices are not copied."""
    return 0 if jax.tree.leaves(weights.gate)[0].shape[0] == 1 else owner[i]


def _tile(x: jax.Array, i: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * rows, rows)


def _write_tile(out: jax.Array, tile: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, tile.astype(out.dtype), i * tile.shape[0], 0)
