"""Weights of few bits, and the matrix products that accept them in place of an array.

`qwix` is not used: its products with float activations dequantize the whole weight, a copy that
XLA's CPU compiler keeps through a decode loop; its int8 product takes several times as long on a
CPU as the plain one; and its `QArray` has no field for the format of the activations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models.kernels import tiles


class Format(NamedTuple):
    """A number format of the engine.

    `uses` are fields of `config.Precision`; what holds for weights also holds for embedding and
    head, and what holds for norms for the router.
    """

    bits: int
    largest: float | None  # elements are scaled to lie within it; None: cast without a scale
    uses: tuple[str, ...]


# XLA stores 4 bits in half a byte on accelerators and in a byte on CPUs.
FORMATS = {
    "float32": Format(32, None, ("weights", "cache", "norms")),
    "bfloat16": Format(16, None, ("weights", "cache", "norms")),
    "int8": Format(8, 127.0, ("weights", "activations", "cache")),
    "int4": Format(4, 7.0, ("weights",)),
    "float8_e4m3fn": Format(8, 448.0, ("weights", "activations", "cache")),
    "float8_e5m2": Format(8, 57344.0, ("weights",)),
    "nf4": Format(4, 1.0, ("weights",)),
}
SCALED = tuple(name for name, form in FORMATS.items() if form.largest is not None)


def formats(use: str) -> tuple[str, ...]:
    """Returns the names of the formats with that use."""
    return tuple(name for name, form in FORMATS.items() if use in form.uses)


def _normal_float() -> tuple[float, ...]:
    """Returns the 16 levels of NormalFloat (arXiv 2305.14314, section 3): quantiles of a normal
    distribution, scaled to [-1, 1].
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

    values: the array's shape; a dtype of `FORMATS`, or uint4 for nf4 (indices into `NF4`).
    scale: float32, the same rank; an axis of n values has 1 scale, n, or n / group.
    input_format: format that a product's input is rounded to (one scale per token); "": none.
    """

    values: jax.Array
    scale: jax.Array
    input_format: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.values.shape

    def dequantize(self) -> jax.Array:
        """Returns `values * scale` in float32."""
        scale = self.scale
        for axis, (few, size) in enumerate(zip(scale.shape, self.shape)):
            if 1 < few < size:
                scale = jnp.repeat(scale, size // few, axis)
        return _elements(self.values, jnp.float32) * scale


def quantize(
    w: jax.Array, dtype, contract_axes: tuple[int, ...], group: int = 0, input_format: str = ""
) -> Quantized:
    """Rounds `w` to a format of `SCALED`.

        scale = max |w| over the elements that share it / largest value of `dtype`
        values = w / scale, rounded to the nearest

    Args:
        contract_axes: contracted axes as ascending negative numbers; axes before the first are
            batch axes.
        group: 0 one scale per output channel; -1 one per matrix; n > 0 one per n consecutive inputs
            of an output channel.

    Elements that are all zero get scale 1. One that is not finite makes all that share its scale
    NaN. Raises ValueError for another dtype, or a group that does not divide the inputs.
    """
    name = dtype if dtype == "nf4" else jnp.dtype(dtype).name
    if name not in SCALED:
        raise ValueError(
            f"quantize: {name} is not one of {', '.join(SCALED)}; cast with astype instead"
        )
    largest = FORMATS[name].largest
    shape = w.shape
    scales = _scale_shape(shape, contract_axes, group)
    split = [n for few, size in zip(scales, shape) for n in (few, size // few)]
    w = w.astype(jnp.float32).reshape(split)
    scale = jnp.max(jnp.abs(w), axis=range(1, len(split), 2), keepdims=True) / largest
    scale = jnp.where(scale == 0, 1.0, scale)
    values = jnp.clip(w / scale, -largest, largest)
    if name == "nf4":
        between = jnp.asarray(
            [(low + high) / 2 for low, high in itertools.pairwise(NF4)], jnp.float32
        )
        values = jnp.searchsorted(between, values, method="compare_all").astype(jnp.uint4)
    else:
        values = (jnp.round(values) if name.startswith("int") else values).astype(name)
    return Quantized(values.reshape(shape), scale.reshape(scales), input_format)


def _scale_shape(
    shape: tuple[int, ...], contract_axes: tuple[int, ...], group: int
) -> tuple[int, ...]:
    first = len(shape) + contract_axes[0]
    if group < 0:
        return shape[:first] + (1,) * (len(shape) - first)
    scales = list(shape)
    remaining = group or math.prod(shape[axis] for axis in contract_axes)
    for axis in reversed(contract_axes):
        shared = math.gcd(remaining, shape[axis])
        scales[axis] = shape[axis] // shared
        remaining //= shared
        if remaining > 1 and scales[axis] > 1:
            break
    if remaining > 1:
        raise ValueError(
            f"quantize: groups of {group} do not divide the inputs of a weight of shape {shape}; "
            "take a divisor, or 0 for one scale per output channel"
        )
    return tuple(scales)


def _elements(values: jax.Array, dtype) -> jax.Array:
    """Returns stored elements, before scaling, in `dtype`."""
    if values.dtype != jnp.uint4:
        return values.astype(dtype)
    # XLA counts 4 bits as a byte, and on a TPU widens them to bytes before the loop of decoding, in
    # a copy of all weights.
    codes = values.astype(jnp.uint16)
    levels = NF4
    for bit in range(4):  # selects are vectorized and fused, a gather is neither
        odd = (codes >> bit) & 1 == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2])]
    return levels[0].astype(dtype)


# Products


def precision(dtype) -> jax.lax.Precision:
    """Returns the precision at which float32 is not multiplied in fewer bits on accelerators."""
    return (
        jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
    )


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """Returns the `einsum` of operands cast to `dtype`, accumulated in float32 and not rounded."""
    return jnp.einsum(
        spec,
        x.astype(dtype),
        y.astype(dtype),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


def round_input(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
    """Returns `x` [..., I] rounded as a product with `w` does, in its own dtype."""
    if not isinstance(w, Quantized) or not w.input_format:
        return x
    return quantize(x, w.input_format, (-1,)).dequantize().astype(x.dtype)


def product(x: jax.Array, w: jax.Array | Quantized, dtype, contract: int = 1) -> jax.Array:
    """Multiplies the last `contract` axes of `x` by the first of `w`, in `dtype`: [..., *I],
    [*I, *O] -> [..., *O] float32.

    A `Quantized` weight is scaled after the product if a scale belongs to an output channel or the
    matrix, before it if it belongs to a group. int8 activations times int8 or int4 weights are
    summed in int32.
    """
    if not isinstance(w, Quantized):
        if w.dtype.itemsize >= jnp.dtype(dtype).itemsize:
            return _dot(x.astype(dtype), w.astype(dtype), contract)
        w = Quantized(w, jnp.ones((1,) * w.ndim, jnp.float32))
    rows = x.shape[:-contract]
    channels = w.shape[contract:]
    scale = 1.0
    if w.input_format:
        rounded = quantize(x, w.input_format, tuple(range(-contract, 0)))
        x = rounded.values
        scale = rounded.scale.reshape(rows + (1,) * len(channels))

    def by_channels(x, w):
        flat = jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:contract]), -1), w)
        return _by_channels(x.reshape(math.prod(rows), -1), flat, dtype).reshape(rows + channels)

    at_once = functools.partial(_scaled, dtype=dtype, contract=contract)
    return jax.lax.platform_dependent(x, w, cpu=by_channels, default=at_once) * scale


def project(x: jax.Array, w: jax.Array | Quantized, contract: int = 1) -> jax.Array:
    """Returns `product` in the dtype of `x`, and rounded to it."""
    return product(x, w, x.dtype, contract).astype(x.dtype)


def unembed(x: jax.Array, table: jax.Array | Quantized, dtype) -> jax.Array:
    """Returns `x @ table^T` in `dtype`: [..., D], [V, D] -> [..., V] float32. A `Quantized` table
    has one scale per row.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(table, Quantized):
        if (
            table.dtype.itemsize >= jnp.dtype(dtype).itemsize
            and rows.shape[0] > tiles.TABLE_FEW_ROWS
        ):
            return einsum("...d,vd->...v", x, table, dtype)
        table = Quantized(table, jnp.ones((1, 1), jnp.float32))
    y = jax.lax.platform_dependent(
        rows,
        table,
        cpu=functools.partial(_table_first, dtype=dtype),
        default=lambda x, t: (
            einsum("nd,vd->nv", x, _elements(t.values, dtype), dtype) * t.scale[:, 0]
        ),
    )
    return y.reshape(*x.shape[:-1], -1)


def embed(table: jax.Array | Quantized, tokens: jax.Array, dtype) -> jax.Array:
    """Returns rows `tokens` of a table [V, D] in `dtype`."""
    rows = jax.tree.map(lambda a: a[tokens], table)
    return (rows.dequantize() if isinstance(rows, Quantized) else rows).astype(dtype)


def expert_matrix(w: jax.Array | Quantized, e: jax.Array, dtype) -> jax.Array:
    """Returns the matrix of expert `e`, which may be traced, in `dtype`: [E, I, O] -> [I, O]."""
    matrix = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, e, keepdims=False), w)
    return (matrix.dequantize() if isinstance(matrix, Quantized) else matrix).astype(dtype)


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
        y = _dot(x.astype(dtype), _elements(w.values, dtype), contract)
    return y * w.scale.reshape(w.scale.shape[contract:])


def _by_channels(x: jax.Array, w: Quantized, dtype) -> jax.Array:
    """[N, I], [I, O] -> [N, O], a block of channels at a time. Dynamic slices are clamped, so that
    the last block ends with the weight.
    """
    size = w.shape[1]
    width = min(tiles.CHANNELS, size)

    def block(i, y):
        part = jax.tree.map(lambda a: _block(a, i, width, 1), w)
        return jax.lax.dynamic_update_slice_in_dim(y, _scaled(x, part, dtype), i * width, 1)

    return jax.lax.fori_loop(
        0, -(-size // width), block, jnp.zeros((x.shape[0], size), jnp.float32)
    )


def _block(a: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    """Returns block i of a weight on a CPU; float8 becomes float32.

    The slice is of integers with the same bits, since XLA's CPU compiler would convert a whole
    array of small floats to float32 first. It also widens float8 slowly, but float16 by an
    instruction: float8_e5m2 is the upper half of a float16, and float8_e4m3fn is a float16 whose
    exponent is 8 less.
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
    """[N, D], [V, D] -> [N, V] with the table as the left operand, which takes half the time on a
    CPU for few rows.
    """
    size = table.shape[0]
    if table.values.dtype.itemsize >= jnp.dtype(dtype).itemsize:
        # Without the barrier XLA swaps the operands back.
        return jax.lax.optimization_barrier(einsum("vd,nd->vn", table.values, x, dtype)).T
    height = min(tiles.TABLE_ROWS, size)

    def block(i, y):
        part = jax.tree.map(lambda a: _block(a, i, height, 0), table)
        logits = einsum("vd,nd->vn", _elements(part.values, dtype), x, dtype) * part.scale
        return jax.lax.dynamic_update_slice_in_dim(y, logits, i * height, 0)

    return jax.lax.fori_loop(
        0, -(-size // height), block, jnp.zeros((size, x.shape[0]), jnp.float32)
    ).T
