"""The sparse feed-forward of Qwen3-MoE: a softmax router, and experts that drop no token."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models.kernels.swiglu import Experts, in_tiles
from dcmdp_jax.models.quantized import Quantized, einsum, precision, round_activations

NORMAL = nn.initializers.normal(0.02)
TILE = 128  # rows of one expert multiplied together on a CPU, at most
LANES = 128  # of an accelerator's vector
# x [n, D] by w [E, F, D]: the last axis of each is summed over.
TURNED = jax.lax.RaggedDotDimensionNumbers(
    (((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def parameter(module: nn.Module, name: str, shape: tuple, axes: tuple, init=NORMAL):
    """Declare a parameter: its shape, the logical name of each axis, and how it starts."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


def route(
    x: jax.Array, router: jax.Array, config: ModelConfig, replayed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Top-k experts of each token and their gates.

        p = softmax(x @ router) over all E experts, in float32
        gates = top-k of p, divided by their sum if norm_topk_prob

    `replayed` [..., j] takes the place of the top k where it is not -1 (arXiv 2510.11370): the
    choice is given, gates and gradients are those of p. j may differ from k; a gate without an
    expert is 0. x [..., D], router [D, E] -> gates [..., k] float32, experts [..., k] int32, or
    max(j, k) of them.
    """
    probs = jax.nn.softmax(einsum("...d,de->...e", x, router, jnp.float32), axis=-1)
    if replayed is None:
        gates, experts = jax.lax.top_k(probs, config.experts_per_token)
    else:
        gates, experts = _replay(probs, replayed.astype(jnp.int32), config.experts_per_token)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


def _replay(probs: jax.Array, replayed: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    size = max(k, replayed.shape[-1])
    own = jax.lax.top_k(probs, size)[1]
    column = jnp.arange(size)
    given = jnp.pad(replayed, [(0, 0)] * (replayed.ndim - 1) + [(0, size - replayed.shape[-1])])
    free = replayed[..., :1] < 0
    experts = jnp.where(free | (column >= replayed.shape[-1]), own, given)
    used = column < jnp.where(free, k, replayed.shape[-1])
    return jnp.where(used, jnp.take_along_axis(probs, experts, axis=-1), 0), experts


def mixture(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: Experts,
    live: jax.Array | None = None,
    parts: int = 0,
) -> jax.Array:
    """`sum over k of gates_k * down_e(silu(gate_e x) * up_e x)`, e = experts_k: x [N, D], gates,
    experts [N, k] -> [N, D].

    Assignments are sorted by expert. Accelerators multiply them by `ragged_dot`; on a CPU, where
    that is ten times slower than the products it stands for, each expert's rows are cut into tiles,
    and tokens that are not `live` ([N] bool, None: all are) cost nothing. What comes back for those
    has no meaning. `parts` is `ModelConfig.expert_parts`.
    """
    # Summed in the order of k, which does not depend on the other tokens.
    return jnp.sum(
        expert_outputs(x, experts, weights, live, parts).astype(jnp.float32) * gates[..., None],
        axis=1,
    ).astype(x.dtype)


def expert_outputs(
    x: jax.Array,
    experts: jax.Array,
    weights: Experts,
    live: jax.Array | None = None,
    parts: int = 0,
) -> jax.Array:
    """Each assignment's row `down_e(silu(gate_e x) * up_e x)`: x [N, D], experts [N, k] -> [N, k,
    D].
    """
    live = jnp.ones(x.shape[:1], bool) if live is None else live
    return jax.lax.platform_dependent(
        x,
        experts,
        weights,
        live,
        cpu=_by_tiles,
        default=lambda x, experts, weights, live: _by_ragged_dot(x, experts, weights, parts),
    )


def _by_ragged_dot(x: jax.Array, experts: jax.Array, weights: Experts, parts: int = 0) -> jax.Array:
    """[N, k, D], each assignment's row.

    XLA keeps an argument [E, D, F] of which a device holds no whole vectors of F as [E, F, D], and
    a product that wants it otherwise copies every layer's, padded, before the loop over tokens:
    such weights are multiplied as they lie.
    """
    order = jnp.argsort(experts.reshape(-1))
    expert_of = experts.reshape(-1)[order]
    count = jax.tree.leaves(weights.gate)[0].shape[0]
    sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)

    def product(rows, w, turned=False):
        rows = round_activations(rows, w)
        w = w.dequantize() if isinstance(w, Quantized) else w
        rows = rows.astype(x.dtype)
        w = w.astype(x.dtype)
        how = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}
        if turned:
            return jax.lax.ragged_dot_general(
                rows, jnp.swapaxes(w, 1, 2), sizes, TURNED, **how
            ).astype(x.dtype)
        return jax.lax.ragged_dot(rows, w, sizes, **how).astype(x.dtype)

    turned = parts > 0 and weights.gate.shape[-1] // parts % LANES > 0
    rows = x[order // experts.shape[1]]
    rows = product(
        nn.silu(product(rows, weights.gate, turned)) * product(rows, weights.up, turned),
        weights.down,
    )
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def _by_tiles(x: jax.Array, experts: jax.Array, weights: Experts, live: jax.Array) -> jax.Array:
    """[N, k, D], each assignment's row; zero where a token is not live."""
    count = jax.tree.leaves(weights.gate)[0].shape[0]
    assigned = experts.size
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
    rows = (
        jnp.zeros((most * tile, x.shape[-1]), x.dtype)
        .at[place]
        .set(jnp.repeat(x, experts.shape[1], axis=0), mode="drop")
    )
    out = in_tiles(rows, weights, owner, held, jnp.sum(tiles), tile)
    return out.at[place].get(mode="fill", fill_value=0).reshape(*experts.shape, -1)
