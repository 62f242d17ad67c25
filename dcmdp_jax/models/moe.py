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

    x [N, D], router [D, E] -> gates [N, k] float32, experts [N, k] int32.
    """
    probs = jax.nn.softmax(einsum("nd,de->ne", x, router, jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(probs, config.experts_per_token)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


class Experts(NamedTuple):
    """SwiGLU matrices of E experts, arrays or `Quantized`."""

    gate: Any  # [E, D, F]
    up: Any  # [E, D, F]
    down: Any  # [E, F, D]


def mix(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: Experts, live: jax.Array | None = None) -> jax.Array:
    """`sum over k of gates_k * down_e(silu(gate_e x) * up_e x)`, e = experts_k: x [N, D], gates, experts [N, k] -> [N, D].

    Assignments are sorted by expert. Accelerators multiply them by `ragged_dot`; on a CPU, where that is ten times slower
    than the products it stands for, each expert's rows are cut into tiles, and tokens that are not `live` ([N] bool, None:
    all are) cost nothing. What comes back for those has no meaning.
    """
    live = jnp.ones(x.shape[:1], bool) if live is None else live
    rows = jax.lax.platform_dependent(
        x, experts, weights, live, cpu=_by_tiles, default=lambda x, experts, weights, live: _by_ragged_dot(x, experts, weights))
    # Summed in the order of k, which does not depend on the other tokens.
    return jnp.sum(rows.astype(jnp.float32) * gates[..., None], axis=1).astype(x.dtype)


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


def _by_tiles(x: jax.Array, experts: jax.Array, weights: Experts, live: jax.Array) -> jax.Array:
    """[N, k, D], each assignment's row; zero where a token is not live."""
    count, assigned = jax.tree.leaves(weights.gate)[0].shape[0], experts.size
    tile = min(max(1 << (assigned // count).bit_length(), 4), TILE)
    flat = jnp.where(live[:, None], experts, count).reshape(-1)  # expert `count` is nobody's
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=count)
    tiles = -(-sizes // tile)
    # Row j of the sorted assignments goes to the same place in its expert's run of whole tiles.
    first = jnp.cumsum(tiles) - tiles
    shift = first * tile - (jnp.cumsum(sizes) - sizes)
    most = -(-assigned // tile) + count
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(assigned) + shift[flat[order]])
    place = jnp.where(flat < count, place, most * tile)
    owner = jnp.repeat(jnp.arange(count), tiles, total_repeat_length=most)
    held = sizes[owner] - (jnp.arange(most) - first[owner]) * tile
    rows = jnp.zeros((most * tile, x.shape[-1]), x.dtype).at[place].set(
        jnp.repeat(x, experts.shape[1], axis=0), mode="drop")
    out = _tiled(rows, weights, owner, held, jnp.sum(tiles), tile)
    return out.at[place].get(mode="fill", fill_value=0).reshape(*experts.shape, -1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(x: jax.Array, weights: Experts, owner: jax.Array, held: jax.Array, count: jax.Array, tile: int) -> jax.Array:
    """The feed-forward of tile i of `x`, by expert owner[i], for the first `count` tiles; zero in the rest.

    Tile i holds `held[i]` rows. One that is half empty is multiplied as half a tile.
    """
    def one(i, out):
        rows, half = _cut(x, i, tile), tile // 2
        done = jax.lax.cond(
            held[i] <= half, lambda: jnp.pad(_forward(rows[:half], weights, owner[i]), ((0, tile - half), (0, 0))),
            lambda: _forward(rows, weights, owner[i]))
        return _put(out, done, i, tile)

    return jax.lax.fori_loop(0, count, one, jnp.zeros_like(x))


def _forward(rows: jax.Array, weights: Experts, e: jax.Array) -> jax.Array:
    rows = rounded(rows, weights.gate)
    gate = _dot(rows, expert(weights.gate, e, rows.dtype))
    up = _dot(rows, expert(weights.up, e, rows.dtype))
    return _dot(rounded(nn.silu(gate) * up, weights.down), expert(weights.down, e, rows.dtype))


def _tiled_forward(x, weights, owner, held, count, tile):
    return _tiled(x, weights, owner, held, count, tile), (x, weights, owner, count)


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
    return dx, dw, None, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _cut(x: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)


def _put(out: jax.Array, rows: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, rows, i * tile, 0)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum("nd,df->nf", x, w, x.dtype).astype(x.dtype)


class MoE(nn.Module):
    """Mixture of SwiGLU experts (see `mix`) behind the router (see `route`).

    Experts are `gate_proj`, `up_proj` [E, D, F] and `down_proj` [E, F, D]; `router` is [D, E].
    """

    config: ModelConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, live: jax.Array | None = None) -> jax.Array:
        """[B, S, D] -> [B, S, D]; live [B], see `mix`."""
        c = self.config
        wide = (c.num_experts, c.hidden_size, c.expert_size)
        # The softmax runs over every expert, so the router is not split along them.
        router = parameter(self, "router", (c.hidden_size, c.num_experts), ("embed", None))
        gate_proj = parameter(self, "gate_proj", wide, ("experts", "embed", "mlp"))
        up_proj = parameter(self, "up_proj", wide, ("experts", "embed", "mlp"))
        down_proj = parameter(self, "down_proj", (wide[0], wide[2], wide[1]), ("experts", "mlp", "embed"))
        tokens = x.reshape(-1, c.hidden_size)
        gates, experts = route(tokens, router, c)
        self.sow("routing", "experts", experts)
        live = None if live is None else jnp.repeat(live, x.shape[1])
        return mix(tokens, gates, experts, Experts(gate_proj, up_proj, down_proj), live).reshape(x.shape)
