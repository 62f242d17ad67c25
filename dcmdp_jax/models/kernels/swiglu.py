"""SwiGLU (arXiv 2002.05202), `down(silu(gate x) * up x)`, in tiles of rows that a CPU's last cache
holds.

N rows, D model, F feed-forward, E experts; a dense layer is one expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.quantized import Quantized, einsum, expert_matrix, project, round_activations

ROWS = 512  # of a tile of a dense layer
FEW = 128  # up to so many rows (decoding) are not tiled


class Experts(NamedTuple):
    """SwiGLU matrices of E experts, arrays or `Quantized`."""

    gate: Any  # [E, D, F]
    up: Any  # [E, D, F]
    down: Any  # [E, F, D]


def dense(x: jax.Array, gate: Any, up: Any, down: Any) -> jax.Array:
    """`down(silu(gate x) * up x)`: x [..., D], gate, up [D, F], down [F, D], arrays or `Quantized`
    -> [..., D].

    The backward pass keeps gate and up, and nothing else that is as wide.
    """
    if sharding.current_mesh():
        return jax.checkpoint(_close)(project(x, gate), project(x, up), down)
    if x.size <= FEW * x.shape[-1] or any(isinstance(w, Quantized) for w in (gate, up, down)):
        return _close(project(x, gate), project(x, up), down)
    return _dense(x.reshape(-1, x.shape[-1]), gate, up, down).reshape(x.shape)


def _close(gate: jax.Array, up: jax.Array, down: Any) -> jax.Array:
    return project(nn.silu(gate) * up, down)


@jax.custom_vjp
def _dense(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return _dense_forward(x, gate, up, down)[0]


def _dense_forward(x, *weights):
    def in_parts(x, *weights):
        made = _tiled_forward(*_one_expert(x, *weights))
        return tuple(a[: len(x)] for a in (made[0], *made[1][1:3]))

    y, gate, up = jax.lax.platform_dependent(
        x,
        *weights,
        cpu=in_parts,
        default=lambda x, *w: _forward(x, Experts(*(m[None] for m in w)), 0),
    )
    return y, (x, gate, up, weights)


def _dense_backward(kept, dy):
    def in_parts(x, gate, up, dy, *weights):
        padded, one, owner, _, count, rows = _one_expert(x, *weights)
        gate, up, dy = (_pad(a, len(padded)) for a in (gate, up, dy))
        dx, dw, *_ = _tiled_backward(rows, (padded, gate, up, one, owner, count), dy)
        return dx[: len(x)], *(d[0] for d in dw)

    def whole(x, gate, up, dy, *weights):
        dx, dw = _pull(x, gate, up, dy, Experts(*weights))
        return dx.astype(x.dtype), *(d.astype(w.dtype) for d, w in zip(dw, weights))

    x, gate, up, weights = kept
    return jax.lax.platform_dependent(x, gate, up, dy, *weights, cpu=in_parts, default=whole)


_dense.defvjp(_dense_forward, _dense_backward)


def _one_expert(x: jax.Array, *weights: jax.Array) -> tuple:
    """The arguments of `tiled` for a dense layer, in equal tiles of at most `ROWS` rows (but
    whole vectors).
    """
    tiles = -(-len(x) // ROWS)
    rows = -(-len(x) // tiles // 8) * 8
    return (
        _pad(x, tiles * rows),
        Experts(*(w[None] for w in weights)),
        jnp.zeros(tiles, jnp.int32),
        None,
        tiles,
        rows,
    )


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - len(x)), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def tiled(
    x: jax.Array,
    weights: Experts,
    owner: jax.Array,
    held: jax.Array | None,
    count: jax.Array,
    rows: int,
) -> jax.Array:
    """The feed-forward of tile i of `x` [N, D], `rows` rows, by expert owner[i], for the first
    `count` tiles; 0 in the rest.

    Tile i holds `held[i]` rows (None: all of them). One that is half empty is multiplied as half a
    tile.
    """

    def one(i, out):
        tile = _cut(x, i, rows)
        half = rows // 2
        e = _owner(weights, owner, i)
        if held is None:
            return _put(out, _forward(tile, weights, e)[0], i)
        return _put(
            out,
            jax.lax.cond(
                held[i] <= half,
                lambda: jnp.pad(_forward(tile[:half], weights, e)[0], ((0, rows - half), (0, 0))),
                lambda: _forward(tile, weights, e)[0],
            ),
            i,
        )

    return jax.lax.fori_loop(0, count, one, jnp.zeros_like(x))


def _tiled_forward(x, weights, owner, held, count, rows):
    def one(i, carry):
        made = _forward(_cut(x, i, rows), weights, _owner(weights, owner, i))
        return tuple(_put(whole, part, i) for whole, part in zip(carry, made))

    inner = jnp.zeros((len(x), weights.down.shape[1]), x.dtype)
    out, gate, up = jax.lax.fori_loop(0, count, one, (jnp.zeros_like(x), inner, inner))
    return out, (x, gate, up, weights, owner, count)


def _tiled_backward(rows, kept, dy):
    """Each expert's gradient adds up over its tiles, in place."""
    x, gate, up, weights, owner, count = kept

    def one(i, carry):
        dx, dw = carry
        e = _owner(weights, owner, i)
        cut = tuple(_cut(a, i, rows) for a in (x, gate, up, dy))
        d_rows, d_matrices = _pull(*cut, Experts(*(expert_matrix(w, e, x.dtype) for w in weights)))
        return _put(dx, d_rows, i), Experts(
            *(total.at[e].add(d.astype(total.dtype)) for total, d in zip(dw, d_matrices))
        )

    dx, dw = jax.lax.fori_loop(
        0, count, one, (jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, weights))
    )
    return dx, dw, None, None, None


tiled.defvjp(_tiled_forward, _tiled_backward)


def _forward(x: jax.Array, weights: Experts, e: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What expert e makes of rows [n, D]: [n, D]; and its gate and up, [n, F]."""
    x = round_activations(x, weights.gate)
    gate, up = (
        _product("nd,df->nf", x, expert_matrix(w, e, x.dtype)) for w in (weights.gate, weights.up)
    )
    inner = round_activations(nn.silu(gate) * up, weights.down)
    return _product("nf,fd->nd", inner, expert_matrix(weights.down, e, x.dtype)), gate, up


def _pull(
    x: jax.Array, gate: jax.Array, up: jax.Array, dy: jax.Array, w: Experts
) -> tuple[jax.Array, Experts]:
    """Gradients of a tile's rows and of its expert's matrices."""
    g = gate.astype(jnp.float32)
    u = up.astype(jnp.float32)
    share = nn.sigmoid(g)
    d_inner = einsum("nd,fd->nf", dy, w.down, x.dtype)
    d_gate = d_inner * u * share * (1 + g * (1 - share))
    d_up = d_inner * g * share
    dx = einsum("nf,df->nd", d_gate, w.gate, x.dtype) + einsum("nf,df->nd", d_up, w.up, x.dtype)
    return dx, Experts(
        einsum("nd,nf->df", x, d_gate, x.dtype),
        einsum("nd,nf->df", x, d_up, x.dtype),
        einsum("nf,nd->fd", g * share * u, dy, x.dtype),
    )


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum(spec, x, w, x.dtype).astype(x.dtype)


def _owner(weights: Experts, owner: jax.Array, i: jax.Array) -> Any:
    """Whose tile i is; known beforehand of a single expert, whose matrices are then not copied out."""
    return 0 if jax.tree.leaves(weights.gate)[0].shape[0] == 1 else owner[i]


def _cut(x: jax.Array, i: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * rows, rows)


def _put(out: jax.Array, rows: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, rows.astype(out.dtype), i * rows.shape[0], 0)
