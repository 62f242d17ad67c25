"""The sparse feed-forward of Qwen3-MoE: a softmax router, and experts that drop no token."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models.quantized import Quantized, einsum, expert, precision, rounded

NORMAL = nn.initializers.normal(0.02)
TILE = 128  # rows of one expert multiplied together on a CPU, at most


def parameter(module: nn.Module, name: str, shape: tuple, axes: tuple, init=NORMAL):
    """Declare a parameter: its shape, the logical name of each axis, and how it starts."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


def route(x: jax.Array, router: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Top-k experts of each token and their gates.

        p = softmax(x @ router) over all E experts, in float32
        gates = top-k of p, divided by their sum if norm_topk_prob

    x [..., D], router [D, E] -> gates [..., k] float32, experts [..., k] int32.
    """
    probs = jax.nn.softmax(einsum("...d,de->...e", x, router, jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(probs, config.experts_per_token)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


class Experts(NamedTuple):
    """SwiGLU matrices of E experts, arrays or `Quantized`."""

    gate: Any  # [E, D, F]
    up: Any  # [E, D, F]
    down: Any  # [E, F, D]


def mix(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: Experts) -> jax.Array:
    """`sum over k of gates_k * down_e(silu(gate_e x) * up_e x)`, e = experts_k: x [N, D], gates, experts [N, k] -> [N, D].

    Assignments are sorted by expert. Accelerators multiply them by `ragged_dot`; on a CPU, where that is ten times slower
    than the products it stands for, each expert's rows are cut into tiles.
    """
    # Summed in the order of k, which does not depend on the other tokens.
    return jnp.sum(assigned(x, experts, weights).astype(jnp.float32) * gates[..., None], axis=1).astype(x.dtype)


def assigned(x: jax.Array, experts: jax.Array, weights: Experts) -> jax.Array:
    """Each assignment's row `down_e(silu(gate_e x) * up_e x)`: x [N, D], experts [N, k] -> [N, k, D]."""
    return jax.lax.platform_dependent(x, experts, weights, cpu=_by_tiles, default=_by_ragged_dot)


def _by_ragged_dot(x: jax.Array, experts: jax.Array, weights: Experts) -> jax.Array:
    """[N, k, D], each assignment's row."""
    order = jnp.argsort(experts.reshape(-1))
    expert_of = experts.reshape(-1)[order]
    count = jax.tree.leaves(weights.gate)[0].shape[0]
    sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)

    def product(rows, w):
        rows, w = rounded(rows, w), w.dequantize() if isinstance(w, Quantized) else w
        y = jax.lax.ragged_dot(rows.astype(x.dtype), w.astype(x.dtype), sizes, precision=precision(x.dtype),
                               preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    rows = x[order // experts.shape[1]]
    rows = product(nn.silu(product(rows, weights.gate)) * product(rows, weights.up), weights.down)
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def _by_tiles(x: jax.Array, experts: jax.Array, weights: Experts) -> jax.Array:
    """[N, k, D], each assignment's row."""
    count, assigned = jax.tree.leaves(weights.gate)[0].shape[0], experts.size
    tile = min(max(1 << (assigned // count).bit_length(), 4), TILE)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=count)
    tiles = -(-sizes // tile)
    # Row j of the sorted assignments goes to the same place in its expert's run of whole tiles.
    shift = (jnp.cumsum(tiles) - tiles) * tile - (jnp.cumsum(sizes) - sizes)
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(assigned) + shift[flat[order]])
    most = -(-assigned // tile) + count
    owner = jnp.repeat(jnp.arange(count), tiles, total_repeat_length=most)
    rows = jnp.zeros((most * tile, x.shape[-1]), x.dtype).at[place].set(
        jnp.repeat(x, experts.shape[1], axis=0), unique_indices=True)
    return _tiled(rows, weights, owner, jnp.sum(tiles), tile)[place].reshape(*experts.shape, -1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(x: jax.Array, weights: Experts, owner: jax.Array, count: jax.Array, tile: int) -> jax.Array:
    """The feed-forward of tile i of `x`, by expert owner[i], for the first `count` tiles; zero in the rest."""
    def one(i, out):
        return _put(out, _forward(_cut(x, i, tile), weights, owner[i]), i, tile)

    return jax.lax.fori_loop(0, count, one, jnp.zeros_like(x))


def _forward(rows: jax.Array, weights: Experts, e: jax.Array) -> jax.Array:
    rows = rounded(rows, weights.gate)
    gate = _dot(rows, expert(weights.gate, e, rows.dtype))
    up = _dot(rows, expert(weights.up, e, rows.dtype))
    return _dot(rounded(nn.silu(gate) * up, weights.down), expert(weights.down, e, rows.dtype))


def _tiled_forward(x, weights, owner, count, tile):
    return _tiled(x, weights, owner, count, tile), (x, weights, owner, count)


def _tiled_backward(tile, kept, dy):
    """Gate and up are multiplied again; each expert's gradient is added up over its tiles, in place."""
    x, weights, owner, count = kept

    def one(i, carry):
        dx, dw = carry
        e = owner[i]
        _, pull = jax.vjp(lambda rows, w: _forward(rows, Experts(*(m[None] for m in w)), 0),
                          _cut(x, i, tile), Experts(*(m[e] for m in weights)))
        drows, dmatrices = pull(_cut(dy, i, tile))
        dw = Experts(*(total.at[e].add(d) for total, d in zip(dw, dmatrices)))
        return _put(dx, drows, i, tile), dw

    dx, dw = jax.lax.fori_loop(0, count, one, (jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, weights)))
    return dx, dw, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _cut(x: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)


def _put(out: jax.Array, rows: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, rows, i * tile, 0)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum("nd,df->nf", x, w, x.dtype).astype(x.dtype)
