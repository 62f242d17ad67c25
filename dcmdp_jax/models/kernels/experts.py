"""Products of tokens with the matrices of their experts.

N tokens, D model, E experts of size F, k experts a token.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax.models.kernels import grouped_product, tiles
from dcmdp_jax.models.kernels.swiglu import Experts, tiled
from dcmdp_jax.models.quantized import Quantized, precision, round_input

LANES = 128  # elements in an accelerator's vector
# The formats of weights that XLA's `ragged_dot` multiplies by bfloat16 without a copy of them in
# another format, by kind of TPU.
FEW_BITS = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
AS_STORED = {
    "TPU v5 lite": FEW_BITS,
    "TPU v5": ("int8",),
    "TPU v6 lite": FEW_BITS,
    "TPU7x": FEW_BITS,
}
# x [n, D] by w [E, F, D], contracting the last axis of both
LAST_BY_LAST = jax.lax.RaggedDotDimensionNumbers(
    (((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def expert_outputs(
    x: jax.Array,
    experts: jax.Array,
    weights: Experts,
    active: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Returns `down_e(silu(gate_e x) * up_e x)` for each of a token's experts e: x [N, D], experts
    [N, k] -> [N, k, D].

    Assignments are sorted by expert. Accelerators multiply them by `ragged_dot`. `ragged_dot` is
    ten times slower than plain products on a CPU, so there each expert's rows are cut into tiles,
    and tokens that are not `active` ([N] bool, None: all are) cost nothing and get zeros. `mesh` is
    the one over whose tensor axis XLA splits F, None if the caller does not know.
    """
    active = jnp.ones(x.shape[:1], bool) if active is None else active
    return jax.lax.platform_dependent(
        x,
        experts,
        weights,
        active,
        cpu=_by_tiles,
        default=lambda x, experts, weights, active: _by_ragged_dot(x, experts, weights, mesh),
    )


def _by_ragged_dot(
    x: jax.Array, experts: jax.Array, weights: Experts, mesh: jax.sharding.Mesh | None
) -> jax.Array:
    """`expert_outputs` of all tokens.

    Weights with one scale an output channel, in a format of `AS_STORED`, are scaled after the
    product. Those that `grouped_product` takes are made whole in parts that a core holds. Others
    become a copy in `x`'s dtype, of one projection of a layer at a time.

    XLA stores an argument [E, D, F] as [E, F, D] if a device's part of F does not fill whole
    vectors, and a product that wants the other layout copies every layer's weights, padded, before
    the loop over tokens. Such weights are multiplied in the layout that they are stored in.
    """
    order = jnp.argsort(experts.reshape(-1))
    expert_of = experts.reshape(-1)[order]
    count = jax.tree.leaves(weights.gate)[0].shape[0]
    sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)
    shards = mesh.shape["tensor"] if mesh else 0
    is_bfloat16 = mesh is not None and x.dtype == jnp.bfloat16
    as_stored = AS_STORED.get(mesh.devices.flat[0].device_kind, ()) if is_bfloat16 else ()

    def product(rows, w, split, transposed=False):
        rows = round_input(rows, w).astype(x.dtype)
        scale = 1.0
        by_channel = isinstance(w, Quantized) and w.scale.shape[1] == 1 and is_bfloat16
        if not isinstance(w, Quantized):
            w = w.astype(x.dtype)
        elif by_channel and w.values.dtype.name in as_stored:
            scale = w.scale[expert_of, 0]
            w = w.values
        elif by_channel and grouped_product.is_supported(w.values.dtype.name, w.shape[1:], mesh):
            y = grouped_product.product(rows, w, sizes, mesh, split, transposed=transposed)
            return y.astype(x.dtype)
        else:
            w = w.dequantize().astype(x.dtype)
        options = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}
        if transposed:
            w = jnp.swapaxes(w, 1, 2)
            y = jax.lax.ragged_dot_general(rows, w, sizes, LAST_BY_LAST, **options)
        else:
            y = jax.lax.ragged_dot(rows, w, sizes, **options)
        return (y * scale).astype(x.dtype)

    transposed = shards > 0 and weights.gate.shape[-1] // shards % LANES > 0
    rows = x[order // experts.shape[1]]
    gate = product(rows, weights.gate, (None, "mlp"), transposed)
    up = product(rows, weights.up, (None, "mlp"), transposed)
    rows = product(nn.silu(gate) * up, weights.down, ("mlp", None))
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def _by_tiles(x: jax.Array, experts: jax.Array, weights: Experts, active: jax.Array) -> jax.Array:
    """`expert_outputs`; zero for tokens that are not active."""
    count = jax.tree.leaves(weights.gate)[0].shape[0]
    assignments = experts.size
    tile = min(max(1 << (assignments // count).bit_length(), 4), tiles.EXPERT_ROWS)
    # tokens that are not active go to expert `count`, which does not exist
    flat = jnp.where(active[:, None], experts, count).reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=count)
    num_tiles = -(-sizes // tile)  # [E]
    # Sorted assignment j goes to the same place within its expert's run of full tiles.
    first_tile = jnp.cumsum(num_tiles) - num_tiles
    shift = first_tile * tile - (jnp.cumsum(sizes) - sizes)
    max_tiles = -(-assignments // tile) + count
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(assignments) + shift[flat[order]])
    place = jnp.where(flat < count, place, max_tiles * tile)
    owner = jnp.repeat(jnp.arange(count), num_tiles, total_repeat_length=max_tiles)
    filled = sizes[owner] - (jnp.arange(max_tiles) - first_tile[owner]) * tile
    rows = jnp.zeros((max_tiles * tile, x.shape[-1]), x.dtype)
    rows = rows.at[place].set(jnp.repeat(x, experts.shape[1], axis=0), mode="drop")
    out = tiled(rows, weights, owner, filled, jnp.sum(num_tiles), tile)
    return out.at[place].get(mode="fill", fill_value=0).reshape(*experts.shape, -1)
