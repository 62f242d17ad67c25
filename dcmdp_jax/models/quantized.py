"""Weights held in few bits, and the matrix products that accept them in place of an array.

Quantizer and container are written here, not taken from `qwix`: its products with float activations
dequantize the whole weight, a copy that XLA's CPU compiler keeps through a decode loop; its int8
product takes several times as long on a CPU as the plain one; and its `QArray` has no place for the
precision of what is multiplied with it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

# The largest value of each format. XLA keeps 4 bits in half a byte on accelerators and in a whole
# byte on CPUs.
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "nf4": 1.0}

# On a CPU this much of a weight becomes float at a time, so that the copy stays in the core's
# cache.
CHANNELS = 128  # output channels of a projection
TABLE_ROWS = 512  # of a table [V, D]
FEW_ROWS = 64  # activations up to which a product is as fast as its weight is read


def _normal_float() -> tuple[float, ...]:
    """The 16 levels of NormalFloat (arXiv 2305.14314, section 3), quantiles of a normal
    distribution, within [-1, 1].
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (
        [statistics.NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, n)[:-1]] for n in (9, 8)
    )
    return tuple(level / above[0] for level in sorted([*above, 0.0, *(-level for level in below)]))


NF4 = _normal_float()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array `values * scale`, symmetric.

    values: the array's shape; int8, int4, float8_e4m3fn, float8_e5m2, uint4 (places in `NF4`), or a
        float dtype.
    scale: float32, the same rank; an axis of n values has 1 scale, n, or n / group.
    activations: what a weight's products take in: int8 or float8_e4m3fn with one scale a row, or
        "", anything.
    """

    values: jax.Array
    scale: jax.Array
    activations: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> jax.Array:
        """`values * scale` in float32."""
        scale = self.scale
        for axis, (few, size) in enumerate(zip(scale.shape, self.shape)):
            if 1 < few < size:
                scale = jnp.repeat(scale, size // few, axis)
        return _numbers(self.values, jnp.float32) * scale


def quantize(
    w: jax.Array, dtype, contract_axes: tuple[int, ...], group: int = 0, activations: str = ""
) -> Quantized:
    """Round `w` to a format of `LARGEST`.

        scale = max |w| over what shares it / largest value of `dtype`,    values = w / scale,
        rounded to the nearest

    Args:
      contract_axes: negative, in order: the axes a matrix product contracts. The first of them
          begins the matrix.
      group: 0 one scale per output channel; -1 one per matrix; n > 0 one per n consecutive inputs
          of an output channel.

    What is zero throughout gets scale 1; what is not finite makes all that shares its scale NaN.
    Raises ValueError for another dtype, or a group that does not divide the inputs.
    """
    name = dtype if dtype == "nf4" else jnp.dtype(dtype).name
    if name not in LARGEST:
        raise ValueError(
            f"quantize: {name} is not one of {', '.join(LARGEST)}; cast with astype instead"
        )
    shape = w.shape
    scales = _scale_shape(shape, contract_axes, group)
    split = [n for few, size in zip(scales, shape) for n in (few, size // few)]
    w = w.astype(jnp.float32).reshape(split)
    scale = jnp.max(jnp.abs(w), axis=range(1, len(split), 2), keepdims=True) / LARGEST[name]
    scale = jnp.where(scale == 0, 1.0, scale)
    values = jnp.clip(w / scale, -LARGEST[name], LARGEST[name])
    if name == "nf4":
        between = jnp.asarray(
            [(low + high) / 2 for low, high in itertools.pairwise(NF4)], jnp.float32
        )
        values = jnp.searchsorted(between, values, method="compare_all").astype(jnp.uint4)
    else:
        values = (jnp.round(values) if name.startswith("int") else values).astype(name)
    return Quantized(values.reshape(shape), scale.reshape(scales), activations)


def _scale_shape(
    shape: tuple[int, ...], contract_axes: tuple[int, ...], group: int
) -> tuple[int, ...]:
    first = len(shape) + contract_axes[0]
    if group < 0:
        return shape[:first] + (1,) * (len(shape) - first)
    scales = list(shape)
    left = group or math.prod(shape[axis] for axis in contract_axes)
    for axis in reversed(contract_axes):
        part = math.gcd(left, shape[axis])
        scales[axis], left = shape[axis] // part, left // part
        if left > 1 and scales[axis] > 1:
            break
    if left > 1:
        raise ValueError(
            f"quantize: groups of {group} do not divide the inputs of a weight of shape {shape}; "
            "take a divisor, or 0 for one scale per output channel"
        )
    return tuple(scales)


def _numbers(values: jax.Array, dtype) -> jax.Array:
    if values.dtype != jnp.uint4:
        return values.astype(dtype)
    codes = values.astype(jnp.uint8)
    levels = NF4
    for bit in range(4):  # selects are vectorised and fused, a gather is neither
        odd = (codes >> bit) & 1 == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2])]
    return levels[0].astype(dtype)


# Products


def precision(dtype) -> jax.lax.Precision:
    """Float32 stays float32 on accelerators that would otherwise multiply it in fewer bits."""
    return (
        jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
    )


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """`einsum` of operands cast to `dtype`, accumulated and returned in float32."""
    return jnp.einsum(
        spec,
        x.astype(dtype),
        y.astype(dtype),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


def round_activations(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
    """`x` [..., I] as it enters a product with `w`, in its own dtype."""
    if not isinstance(w, Quantized) or not w.activations:
        return x
    return quantize(x, w.activations, (-1,)).dequantize().astype(x.dtype)


def product(x: jax.Array, w: jax.Array | Quantized, dtype, contract: int = 1) -> jax.Array:
    """The last `contract` axes of `x` times the first of `w`, in `dtype`: [..., *I], [*I, *O] ->
    [..., *O] float32.

    A `Quantized` weight is scaled after the product where a scale is an output channel's or the
    matrix's, before it where it is a group's. int8 activations times int8 or int4 weights are
    summed in int32.
    """
    if not isinstance(w, Quantized):
        if w.dtype.itemsize >= jnp.dtype(dtype).itemsize:
            return _dot(x.astype(dtype), w.astype(dtype), contract)
        w = Quantized(w, jnp.ones((1,) * w.ndim, jnp.float32))
    rows = x.shape[:-contract]
    channels = w.shape[contract:]
    scale = 1.0
    if w.activations:
        few = quantize(x, w.activations, tuple(range(-contract, 0)))
        x = few.values
        scale = few.scale.reshape(rows + (1,) * len(channels))

    def by_channels(x, w):
        flat = jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:contract]), -1), w)
        return _by_channels(x.reshape(math.prod(rows), -1), flat, dtype).reshape(rows + channels)

    whole = functools.partial(_scaled, dtype=dtype, contract=contract)
    return jax.lax.platform_dependent(x, w, cpu=by_channels, default=whole) * scale


def project(x: jax.Array, w: jax.Array | Quantized, contract: int = 1) -> jax.Array:
    """`product` in the dtype of `x`, and rounded to it."""
    return product(x, w, x.dtype, contract).astype(x.dtype)


def unembed(x: jax.Array, table: jax.Array | Quantized, dtype) -> jax.Array:
    """`x @ table^T` in `dtype`: [..., D], [V, D] -> [..., V] float32; a `Quantized` table has one
    scale a row.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = table
    if not isinstance(table, Quantized):
        if table.dtype.itemsize >= jnp.dtype(dtype).itemsize and rows.shape[0] > FEW_ROWS:
            return einsum("...d,vd->...v", x, table, dtype)
        few = Quantized(table, jnp.ones((1, 1), jnp.float32))
    y = jax.lax.platform_dependent(
        rows,
        few,
        cpu=functools.partial(_table_first, dtype=dtype),
        default=lambda x, t: (
            einsum("nd,vd->nv", x, _numbers(t.values, dtype), dtype) * t.scale[:, 0]
        ),
    )
    return y.reshape(*x.shape[:-1], -1)


def embed(table: jax.Array | Quantized, tokens: jax.Array, dtype) -> jax.Array:
    """Rows `tokens` of a table [V, D] in `dtype`."""
    rows = jax.tree.map(lambda a: a[tokens], table)
    return (rows.dequantize() if isinstance(rows, Quantized) else rows).astype(dtype)


def expert_matrix(w: jax.Array | Quantized, e: jax.Array, dtype) -> jax.Array:
    """The matrix of expert `e`, which may be traced, in `dtype`: [E, I, O] -> [I, O]."""
    one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, e, keepdims=False), w)
    return (one.dequantize() if isinstance(one, Quantized) else one).astype(dtype)


def _dot(x: jax.Array, w: jax.Array, contract: int, out=jnp.float32) -> jax.Array:
    axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
    return jax.lax.dot_general(
        x, w, (axes, ((), ())), precision=precision(x.dtype), preferred_element_type=out
    )


def _scaled(x: jax.Array, w: Quantized, dtype, contract: int = 1) -> jax.Array:
    if math.prod(w.scale.shape[:contract]) > 1:
        return _dot(x.astype(dtype), w.dequantize().astype(dtype), contract)
    if x.dtype == jnp.int8 and w.values.dtype in (jnp.int8, jnp.int4):
        y = _dot(x, w.values.astype(jnp.int8), contract, jnp.int32).astype(jnp.float32)
    else:
        y = _dot(x.astype(dtype), _numbers(w.values, dtype), contract)
    return y * w.scale.reshape(w.scale.shape[contract:])


def _by_channels(x: jax.Array, w: Quantized, dtype) -> jax.Array:
    """[N, I], [I, O] -> [N, O], some channels at a time; the last block moves back to end with the
    weight.
    """
    size = w.shape[1]
    width = min(CHANNELS, size)

    def block(i, y):
        cut = jax.tree.map(lambda a: _cut(a, i, width, 1), w)
        return jax.lax.dynamic_update_slice_in_dim(y, _scaled(x, cut, dtype), i * width, 1)

    return jax.lax.fori_loop(
        0, -(-size // width), block, jnp.zeros((x.shape[0], size), jnp.float32)
    )


def _cut(a: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    """Block i of a weight on a CPU, float32 where it was float8.

    Bits are cut and not floats, all of which XLA's CPU compiler would make float32 first. It widens
    float8 slowly, but
    float16 by an instruction: float8_e5m2 is the upper half of a float16, and float8_e4m3fn one
        times 2^8.
    """
    bits = {"bfloat16": jnp.uint16, "float8_e4m3fn": jnp.uint8, "float8_e5m2": jnp.uint8}.get(
        a.dtype.name, a.dtype
    )
    block = jax.lax.dynamic_slice_in_dim(a.view(bits), i * size, min(size, a.shape[axis]), axis)
    if a.dtype == jnp.float8_e5m2:
        return (block.astype(jnp.uint16) << 8).view(jnp.float16).astype(jnp.float32)
    if a.dtype == jnp.float8_e4m3fn:
        wide = block.astype(jnp.uint16)
        return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(jnp.float16).astype(
            jnp.float32
        ) * 2.0**8
    return block.view(a.dtype)


def _table_first(x: jax.Array, table: Quantized, dtype) -> jax.Array:
    """[N, D], [V, D] -> [N, V] with the table as the left operand, which for few rows takes half
    the time on a CPU.
    """
    size = table.shape[0]
    if table.values.dtype.itemsize >= jnp.dtype(dtype).itemsize:
        # Without the barrier XLA swaps the operands back.
        return jax.lax.optimization_barrier(einsum("vd,nd->vn", table.values, x, dtype)).T
    height = min(TABLE_ROWS, size)

    def block(i, y):
        cut = jax.tree.map(lambda a: _cut(a, i, height, 0), table)
        part = einsum("vd,nd->vn", _numbers(cut.values, dtype), x, dtype) * cut.scale
        return jax.lax.dynamic_update_slice_in_dim(y, part, i * height, 0)

    return jax.lax.fori_loop(
        0, -(-size // height), block, jnp.zeros((size, x.shape[0]), jnp.float32)
    ).T
