"""Few-bit weights: error bounds in closed form, bytes, and products that equal those of the
dequantized weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import quantized
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.quantized import Quantized
from support.accelerators import accelerator_programs

pytestmark = pytest.mark.full

FORMATS = list(quantized.SCALED)
# appendix E of arXiv 2305.14314
NORMAL_FLOAT = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def half_step(w: np.ndarray, dtype: str) -> np.ndarray:
    """Returns half the distance of a format's neighbouring numbers around `w`, over the scale."""
    if dtype.startswith("int"):
        return np.full_like(w, 0.5)
    if dtype == "nf4":
        gaps = np.diff(NORMAL_FLOAT)
        return gaps[np.clip(np.searchsorted(NORMAL_FLOAT, w) - 1, 0, 14)] / 2
    # even spacing below 2^least
    digits, least = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14)}[dtype]
    return 2.0 ** (np.maximum(np.floor(np.log2(np.abs(w))), least) - digits - 1)


@pytest.fixture(params=["cpu", "accelerator"])
def program(request):
    """A CPU multiplies by blocks, an accelerator at once."""
    if request.param == "cpu":
        yield
    else:
        with accelerator_programs():
            yield


# weight, contracted axes, group -> shape of the scales, and the weight laid out as [matrices,
# groups, inputs, outputs]
GROUPS = [
    ((24, 10), (-2,), 0, (1, 10), (1, 1, 24, 10)),
    ((24, 10), (-2,), -1, (1, 1), (1, 1, 240, 1)),
    ((24, 10), (-2,), 8, (3, 10), (1, 3, 8, 10)),
    ((24, 2, 5), (-3,), 24, (1, 2, 5), (1, 1, 24, 10)),
    ((24, 2, 5), (-3,), 6, (4, 2, 5), (1, 4, 6, 10)),
    ((24, 2, 5), (-3,), -1, (1, 1, 1), (1, 1, 240, 1)),
    ((4, 6, 10), (-3, -2), 0, (1, 1, 10), (1, 1, 24, 10)),
    ((4, 6, 10), (-3, -2), 3, (4, 2, 10), (1, 8, 3, 10)),
    ((4, 6, 10), (-3, -2), 12, (2, 1, 10), (1, 2, 12, 10)),
    ((3, 24, 10), (-2,), 8, (3, 3, 10), (3, 3, 8, 10)),
    ((3, 24, 10), (-2,), -1, (3, 1, 1), (3, 1, 240, 1)),
    ((3, 4, 6, 10), (-3, -2), 6, (3, 4, 1, 10), (3, 4, 6, 10)),
]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("shape", "axes", "group", "scales", "laid_out"), GROUPS)
def test_rounding_errors_are_half_a_step_at_most(shape, axes, group, scales, laid_out, dtype):
    """Every value is off by half a step at most, the largest of those that share a scale by
    nothing.
    """
    w = normal(0, *shape) * jnp.geomspace(1e-3, 1e3, shape[-1])
    few = quantized.quantize(w, dtype, axes, group)
    assert (
        few.shape == few.values.shape == w.shape
        and few.scale.shape == scales
        and few.scale.dtype == jnp.float32
    )
    largest = np.abs(np.asarray(w).reshape(laid_out)).max(axis=2)
    np.testing.assert_allclose(
        few.scale.reshape(largest.shape), largest / quantized.FORMATS[dtype].largest, rtol=1e-6
    )
    got, want = (np.asarray(x, np.float64).reshape(laid_out) for x in (few.dequantize(), w))
    scale = np.asarray(few.scale, np.float64).reshape(largest.shape)[:, :, None]
    error = np.abs(got - want) / scale
    assert (error <= half_step(want / scale, dtype) * 1.0001 + 1e-5).all()
    assert error.mean() > 0.1 * half_step(want / scale, dtype).mean()
    np.testing.assert_allclose(np.abs(got).max(axis=2), largest, rtol=1e-6)


@pytest.mark.parametrize("dtype", FORMATS)
def test_each_format_has_its_number_of_bits(dtype):
    few = quantized.quantize(normal(0, 64, 32), dtype, (-2,), 16)
    kind = few.values.dtype
    info = jnp.iinfo(kind) if jnp.issubdtype(kind, jnp.integer) else jnp.finfo(kind)
    assert info.bits == quantized.FORMATS[dtype].bits
    assert few.values.size == 64 * 32 and few.scale.nbytes == 4 * 4 * 32


def test_the_levels_of_normal_float():
    np.testing.assert_allclose(quantized.NF4, NORMAL_FLOAT, atol=2e-7)
    assert quantized.NF4[0] == -1 and quantized.NF4[7] == 0 and quantized.NF4[15] == 1
    w = jnp.linspace(-1, 1, 2001)[:, None]
    nearest = np.asarray(NORMAL_FLOAT)[np.abs(np.asarray(w) - np.asarray(NORMAL_FLOAT)).argmin(1)]
    np.testing.assert_allclose(
        quantized.quantize(w, "nf4", (-2,)).dequantize()[:, 0], nearest, atol=2e-7
    )


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("int4", 7)])
def test_numbers_on_the_grid_are_exact(dtype, largest):
    grid = jnp.arange(-largest, largest + 1, dtype=jnp.float32)[:, None] * 0.25
    np.testing.assert_array_equal(quantized.quantize(grid, dtype, (-2,)).dequantize(), grid)


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_stay_zero(dtype):
    few = quantized.quantize(jnp.zeros((4, 3)).at[:, 0].set(2.0), dtype, (-2,))
    np.testing.assert_array_equal(few.dequantize(), np.array([[2.0, 0, 0]] * 4, np.float32))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_product(dtype, bad, program):
    w = jnp.ones((4, 3)).at[1, 2].set(bad)
    few = quantized.quantize(w, dtype, (-2,))
    np.testing.assert_array_equal(
        np.isfinite(few.dequantize()), np.array([[True, True, False]] * 4)
    )
    product = quantized.product(jnp.ones((1, 4)), few, jnp.float32)
    np.testing.assert_array_equal(np.isfinite(product), [[True, True, False]])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_is_multiplied_exactly(dtype, program):
    numbers = jnp.arange(256, dtype=jnp.uint8).view(jnp.dtype(dtype))
    numbers = numbers[np.isfinite(numbers.astype(jnp.float32))]
    got = quantized.product(
        jnp.ones((1, 1)), Quantized(numbers[None], jnp.ones((1, 1))), jnp.float32
    )
    np.testing.assert_array_equal(got[0], numbers.astype(jnp.float32))


def test_other_dtypes_and_groups_are_refused():
    with pytest.raises(ValueError, match="bfloat16 is not one of int8"):
        quantized.quantize(jnp.ones((2, 2)), jnp.bfloat16, (-2,))
    flat = ((24, 10), (-2,))
    heads = ((4, 6, 10), (-3, -2))
    for (shape, axes), group in ((flat, 7), (flat, 48), (heads, 9), (heads, 16)):
        with pytest.raises(ValueError, match=f"groups of {group} do not divide the inputs"):
            quantized.quantize(jnp.ones(shape), "int8", axes, group)


PRODUCTS = [  # x, weight, contracted axes, group
    ((2, 3, 24), (24, 2, 5), 1, 0),
    ((2, 3, 4, 6), (4, 6, 10), 2, 3),
    ((2, 3, 4, 6), (4, 6, 10), 2, -1),
    ((7, 24), (24, 300), 1, 0),  # several blocks of channels, the last one short
    ((7, 24), (24, 300), 1, 8),
    ((24,), (24, 128), 1, -1),
]


@pytest.mark.parametrize("dtype", [*FORMATS, "bfloat16"])
@pytest.mark.parametrize(("x_shape", "w_shape", "contract", "group"), PRODUCTS)
def test_products_equal_those_of_the_dequantized_weight(
    x_shape, w_shape, contract, group, dtype, program
):
    x = normal(0, *x_shape)
    w = normal(1, *w_shape)
    if dtype == "bfloat16":
        few = w.astype(dtype)
        plain = few.astype(jnp.float32)
    else:
        few = quantized.quantize(w, dtype, tuple(range(-w.ndim, contract - w.ndim)), group)
        plain = few.dequantize()
    want = np.tensordot(np.asarray(x, np.float64), np.asarray(plain, np.float64), contract)
    got = jax.jit(lambda x, w: quantized.product(x, w, jnp.float32, contract))(x, few)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(quantized.product(x, plain, jnp.float32, contract), want, atol=1e-5)
    half = quantized.project(x.astype(jnp.bfloat16), few, contract)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.15)


def rounded_rows(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` [..., I] on the grid of `dtype`, one scale a row, in NumPy."""
    scale = np.abs(x).max(-1, keepdims=True) / quantized.FORMATS[dtype].largest
    units = x / np.where(scale > 0, scale, 1)
    return (
        np.rint(units) if dtype == "int8" else units.astype(jnp.dtype(dtype)).astype(np.float32)
    ) * scale


@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4", "float32"])
@pytest.mark.parametrize(("x_shape", "w_shape", "contract", "group"), PRODUCTS[:5])
def test_activations_are_rounded_a_token_at_a_time(
    x_shape, w_shape, contract, group, dtype, activations, program
):
    x = normal(0, *x_shape).at[0].multiply(100.0).at[1].set(0.0)
    w = normal(1, *w_shape)
    if dtype == "float32":
        few = Quantized(w, jnp.ones((1,) * w.ndim), activations)
    else:
        few = quantized.quantize(
            w, dtype, tuple(range(-w.ndim, contract - w.ndim)), group, activations
        )
    inputs = rounded_rows(np.asarray(x).reshape(*x_shape[: x.ndim - contract], -1), activations)
    want = (inputs @ np.asarray(few.dequantize()).reshape(inputs.shape[-1], -1)).reshape(
        *x_shape[: x.ndim - contract], *w_shape[contract:]
    )
    got = quantized.product(x, few, jnp.float32, contract)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)
    assert np.abs(got - np.tensordot(x, few.dequantize(), contract)).max() > 1e-3
    np.testing.assert_allclose(
        quantized.round_input(x, few), rounded_rows(np.asarray(x), activations), rtol=1e-6
    )


def test_int8_times_int8_is_exact():
    """Sums beyond 2^24, where float32 no longer holds every integer, are rounded once."""
    x, w = (
        np.random.default_rng(i).integers(100, 128, shape)
        for i, shape in enumerate([(3, 4096), (4096, 50)])
    )
    x[:, 0] = w[0] = 127  # the scales are 1
    few = quantized.quantize(jnp.asarray(w, jnp.float32), "int8", (-2,), 0, "int8")
    got = quantized.product(jnp.asarray(x, jnp.float32), few, jnp.float32)
    np.testing.assert_array_equal(got, (x @ w).astype(np.float32))


@pytest.mark.parametrize("dtype", [*FORMATS, "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [3, tiles.TABLE_FEW_ROWS + 1])
def test_tables_equal_the_dequantized_ones(dtype, rows, program):
    """Logits and lookups of a table [V, D], more rows than one block, against those of its
    dequantized values.
    """
    table = normal(0, 700, 24)
    x = normal(1, 1, rows, 24)
    tokens = jnp.array([[0, 699, 5], [3, 3, 600]])
    few = quantized.quantize(table, dtype, (-1,)) if dtype in FORMATS else table.astype(dtype)
    plain = np.asarray(few.dequantize() if dtype in FORMATS else few.astype(jnp.float32))
    logits = jax.jit(lambda x, table: quantized.unembed(x, table, jnp.float32))(x, few)
    assert logits.shape == (1, rows, 700) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x) @ plain.T, atol=1e-5)
    np.testing.assert_allclose(
        quantized.embed(few, tokens, jnp.float32), plain[np.asarray(tokens)], rtol=1e-6
    )
    assert quantized.embed(few, tokens, jnp.bfloat16).dtype == jnp.bfloat16


def test_gradients_pass_through_the_logits():
    """Few rows take another path through the table than many."""
    table = normal(0, 40, 24)
    x = normal(1, 3, 24)
    got = jax.grad(lambda *args: jnp.sum(jnp.sin(quantized.unembed(*args, jnp.float32))), (0, 1))(
        x, table
    )
    want = jax.grad(lambda x, table: jnp.sum(jnp.sin(x @ table.T)), (0, 1))(x, table)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)


@pytest.mark.parametrize("dtype", [*FORMATS, "float32"])
def test_expert_matrix_is_the_experts_own(dtype):
    w = normal(0, 3, 24, 10)
    few = quantized.quantize(w, dtype, (-2,), 8) if dtype in FORMATS else w
    plain = few.dequantize() if dtype in FORMATS else w
    got = jax.jit(
        lambda few: jax.lax.map(
            lambda e: quantized.expert_matrix(few, e, jnp.float32), jnp.arange(3)
        )
    )(few)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    assert quantized.expert_matrix(few, 1, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("split", [(None, "tensor"), ("tensor", None)], ids=["outputs", "inputs"])
@pytest.mark.parametrize(
    ("dtype", "group", "activations"), [("int8", 0, ""), ("int4", 8, ""), ("int8", 0, "int8")]
)
def test_products_over_devices(dtype, group, activations, split, program):
    mesh = sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:8])
    x = normal(0, 8, 32)
    few = quantized.quantize(normal(1, 32, 256), dtype, (-2,), group, activations)
    table = {"tensor": "tensor"}
    whole = tuple(name if few.scale.shape[i] > 1 else None for i, name in enumerate(split))
    places = Quantized(
        sharding.param_shardings(split, mesh, table, few.values),
        sharding.param_shardings(whole, mesh, table, few.scale),
        activations,
    )
    apart = jax.device_put(few, places)
    assert (
        len(apart.values.sharding.device_set) == 8 and not apart.values.sharding.is_fully_replicated
    )
    got = jax.jit(lambda x, w: quantized.product(x, w, jnp.float32))(
        jax.device_put(x, sharding.batch_sharding(mesh, 0)), apart
    )
    np.testing.assert_allclose(got, quantized.product(x, few, jnp.float32), atol=1e-5)
