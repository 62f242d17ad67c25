"""Products of tokens with their experts' weights of few bits, on a TPU: a kernel that reads each
chosen expert's weights as they are stored and makes a tile of them whole in a core's own memory.

A step of the grid is an expert with tokens and one tile of rows that holds some of them; how many
there are is known only when the program runs. M rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.quantized import Quantized, precision

LANES = 128  # elements in a vector's row
ROWS = 32  # rows that a vector of 8 bits has
# Formats of weights by kind of TPU, where XLA copies them and the kernel takes fewer instructions.
FORMATS = {
    "TPU v4": ("int8", "int4"),
    "TPU v5": ("int4", "float8_e4m3fn", "float8_e5m2"),
}
E4M3FN = 16  # a number of float8_e4m3fn over that with the same bits in float8_e4m3b11fnuz
Split = tuple[str | None, str | None]


def is_supported(name: str, sizes: tuple[int, ...], mesh: jax.sharding.Mesh) -> bool:
    """Returns True if XLA would copy experts' weights of that format, and the kernel multiplies
    them: `sizes`, I and O, are split over the mesh's tensor axis into parts that fill vectors.
    """
    kind = mesh.devices.flat[0].device_kind
    split = ROWS * mesh.shape["tensor"]
    return (
        name in FORMATS.get(kind, ())
        and mesh.shape["expert"] == 1
        and not any(size % split for size in sizes)
    )


def product(
    rows: jax.Array,
    w: Quantized,
    sizes: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    split: Split = (None, None),
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Returns `ragged_dot(rows, w.dequantize(), sizes)`: rows [M, I], sorted by expert, w [E, I, O]
    in int8, int4 or fp8 with a scale for each channel or matrix, sizes [E] int32 -> [M, O] float32.

    The first sizes[0] rows are of expert 0, the next sizes[1] of expert 1; sizes add up to M. A
    scale that is NaN makes its results NaN; elements that are NaN without one are not recognized.

    Args:
        mesh: the one over which w is split, if any; all devices hold all rows.
        split: logical axes of I and O, of which one may be split over `mesh`.
        transposed: multiply [E, O, I], which is how XLA stores some w (see `experts`).
        interpret: run the kernel on any device.
    """
    scale = jnp.broadcast_to(w.scale, (*w.scale.shape[:2], w.shape[2]))
    values = jnp.swapaxes(w.values, 1, 2) if transposed else w.values
    on_shard = functools.partial(_on_shard, transposed=transposed, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return on_shard(rows, values, scale, sizes)
    inputs, outputs = split

    def summed(*args):
        y = on_shard(*args)
        return jax.lax.psum(y, sharding.ACTIVATIONS[inputs]) if inputs else y

    def on_mesh(*args):
        return sharding.shard_map(
            summed,
            (None, inputs),
            (None, outputs, inputs) if transposed else (None, inputs, outputs),
            (None, None, outputs),
            (None,),
            out=(None, outputs),
        )(*args)

    return sharding.with_mesh(mesh, on_mesh)(rows, values, scale, sizes)


def _on_shard(
    rows: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    sizes: jax.Array,
    transposed: bool,
    interpret: bool,
) -> jax.Array:
    count, inputs = rows.shape
    experts, *_, outputs = scale.shape
    width = _width(outputs, inputs, values.dtype, transposed)
    parts = -(-outputs // width)
    # Twice the mean number of an expert's rows, so that most have one tile; 16 fill a vector.
    tile = min(max(1 << (count // experts).bit_length(), 16), tiles.EXPERT_ROWS)
    if values.dtype == jnp.float8_e4m3fn:
        scale = scale * E4M3FN
    scale = jnp.pad(scale, ((0, 0), (0, 0), (0, parts * width - outputs)))
    scale = scale.reshape(experts, parts, 1, width)
    expert, row_tile, steps = _steps(sizes, tile, count)
    end = jnp.cumsum(sizes)

    def at_rows(part, n, expert, row_tile, begin, end):
        return row_tile[n], 0

    def at_weights(part, n, expert, row_tile, begin, end):
        return (expert[n], part, 0) if transposed else (expert[n], 0, part)

    def at_scale(part, n, expert, row_tile, begin, end):
        return expert[n], part, 0, 0

    def at_out(part, n, expert, row_tile, begin, end):
        return part, row_tile[n], 0

    out = pl.pallas_call(
        functools.partial(_multiply, tile=tile, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((parts, count, width), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(parts, steps),
            in_specs=[
                pl.BlockSpec((tile, inputs), at_rows),
                pl.BlockSpec(
                    (None, width, inputs) if transposed else (None, inputs, width), at_weights
                ),
                pl.BlockSpec((None, None, 1, width), at_scale),
            ],
            out_specs=pl.BlockSpec((None, tile, width), at_out),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_product",
    )(expert, row_tile, end - sizes, end, rows, values, scale)
    return out.swapaxes(0, 1).reshape(count, -1)[:, :outputs]


def _width(outputs: int, inputs: int, dtype, transposed: bool) -> int:
    """Returns the outputs of a block of weights, which has at most `tiles.EXPERT_BYTES` unless
    that is less than a vector's.

    The number of blocks is even, if they fill vectors then: a chip of two cores (v4, v5p) gives
    each as many.
    """
    bits = jax.dtypes.itemsize_bits(dtype)
    least = ROWS * 8 // bits if transposed else LANES
    blocks = 2 * -(-inputs * outputs * bits // (16 * tiles.EXPERT_BYTES))
    return min(-(-outputs // (blocks * least)) * least, outputs)


def _steps(sizes: jax.Array, tile: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the expert and the tile of rows of each step, and how many steps there are; the
    arrays have room for the most that there can be.
    """
    end = jnp.cumsum(sizes)
    first = (end - sizes) // tile
    count = jnp.where(sizes > 0, (end - 1) // tile - first + 1, 0)
    room = -(-rows // tile) + len(sizes) - 1
    expert = jnp.repeat(jnp.arange(len(sizes), dtype=jnp.int32), count, total_repeat_length=room)
    before = jnp.cumsum(count) - count
    row_tile = jnp.arange(room, dtype=jnp.int32) - before[expert] + first[expert]
    return expert, row_tile, jnp.sum(count)


def _multiply(
    expert, row_tile, begin, end, rows, values, scale, out, *, tile: int, transposed: bool
) -> None:
    """Step n of the grid: the rows of tile `row_tile[n]` that are expert `expert[n]`'s."""
    n = pl.program_id(1)
    x = rows[...]
    y = jax.lax.dot_general(
        x,
        _whole(values[...], x.dtype),
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    row = row_tile[n] * tile + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    own = (row >= begin[expert[n]]) & (row < end[expert[n]])
    out[...] = jnp.where(own, y * scale[...], out[...])


def _whole(values: jax.Array, dtype) -> jax.Array:
    """Returns a tile of stored elements in `dtype`; those of float8_e4m3fn over `E4M3FN`.

    A v5p converts float8_e4m3b11fnuz by an instruction, float8_e4m3fn by several. The bits of -0
    are NaN in the former. So the sign of zeros is cleared, in four elements at a time: adding 127
    to a byte of 1 to 127 sets its top bit.
    """
    if values.dtype == jnp.float8_e4m3fn:
        words = pltpu.bitcast(values, jnp.int32)
        low = jnp.int32(0x7F7F7F7F)
        words &= ((words & low) + low) | low
        values = pltpu.bitcast(words, jnp.float8_e4m3b11fnuz)
    return values.astype(dtype)
