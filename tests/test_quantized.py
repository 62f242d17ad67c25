"""Few-bit weights: error bounds in closed form, bytes, and products that equal those of the
dequantized weight.
"""

import functools
from typing import NamedTuple

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
        yield request.param
    else:
        with accelerator_programs():
            yield request.param


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


in_every_format = pytest.mark.parametrize("dtype", FORMATS)
by_groups = pytest.mark.parametrize(("shape", "axes", "group", "scales", "laid_out"), GROUPS)


class Rounded(NamedTuple):
    """A weight in few bits, and laid out as in `GROUPS`: the weight, what is read from the few
    bits, and scales that broadcast against both.
    """

    few: Quantized
    want: np.ndarray
    got: np.ndarray
    scale: np.ndarray

    @property
    def error(self):
        return np.abs(self.got - self.want) / self.scale


@functools.cache
def rounded(shape, axes, group, laid_out, dtype):
    w = normal(0, *shape) * jnp.geomspace(1e-3, 1e3, shape[-1])
    few = quantized.quantize(w, dtype, axes, group)
    got, want = (np.asarray(x, np.float64).reshape(laid_out) for x in (few.dequantize(), w))
    scale = np.asarray(few.scale, np.float64).reshape(laid_out[0], laid_out[1], 1, laid_out[3])
    return Rounded(few, want, got, scale)


@in_every_format
@by_groups
def test_a_group_has_one_scale(shape, axes, group, scales, laid_out, dtype):
    few = rounded(shape, axes, group, laid_out, dtype).few
    assert few.shape == few.values.shape == shape
    assert few.scale.shape == scales and few.scale.dtype == jnp.float32


@in_every_format
@by_groups
def test_a_scale_takes_the_largest_value_to_that_of_the_format(
    shape, axes, group, scales, laid_out, dtype
):
    of = rounded(shape, axes, group, laid_out, dtype)
    largest = np.abs(of.want).max(axis=2, keepdims=True)
    np.testing.assert_allclose(of.scale, largest / quantized.FORMATS[dtype].largest, rtol=1e-6)


@in_every_format
@by_groups
def test_rounding_errors_are_half_a_step_at_most(shape, axes, group, scales, laid_out, dtype):
    of = rounded(shape, axes, group, laid_out, dtype)
    assert (of.error <= half_step(of.want / of.scale, dtype) * 1.0001 + 1e-5).all()


@in_every_format
@by_groups
def test_rounding_errors_are_those_of_the_bits_that_are_kept(
    shape, axes, group, scales, laid_out, dtype
):
    of = rounded(shape, axes, group, laid_out, dtype)
    assert of.error.mean() > 0.1 * half_step(of.want / of.scale, dtype).mean()


@in_every_format
@by_groups
def test_the_largest_value_of_a_group_is_exact(shape, axes, group, scales, laid_out, dtype):
    of = rounded(shape, axes, group, laid_out, dtype)
    np.testing.assert_allclose(np.abs(of.got).max(axis=2), np.abs(of.want).max(axis=2), rtol=1e-6)


@in_every_format
def test_each_format_has_its_number_of_bits(dtype):
    few = quantized.quantize(normal(0, 64, 32), dtype, (-2,), 16)
    kind = few.values.dtype
    info = jnp.iinfo(kind) if jnp.issubdtype(kind, jnp.integer) else jnp.finfo(kind)
    assert info.bits == quantized.FORMATS[dtype].bits
    assert few.values.size == 64 * 32


@in_every_format
def test_a_group_has_four_bytes_of_scale(dtype):
    few = quantized.quantize(normal(0, 64, 32), dtype, (-2,), 16)
    assert few.scale.nbytes == 4 * 4 * 32


def test_the_levels_of_normal_float_are_the_published_ones():
    np.testing.assert_allclose(quantized.NF4, NORMAL_FLOAT, atol=2e-7)


def test_normal_float_has_zero_and_its_ends_exactly():
    assert quantized.NF4[0] == -1 and quantized.NF4[7] == 0 and quantized.NF4[15] == 1


def test_a_number_is_rounded_to_the_nearest_level_of_normal_float():
    w = jnp.linspace(-1, 1, 2001)[:, None]
    nearest = np.asarray(NORMAL_FLOAT)[np.abs(np.asarray(w) - np.asarray(NORMAL_FLOAT)).argmin(1)]
    np.testing.assert_allclose(
        quantized.quantize(w, "nf4", (-2,)).dequantize()[:, 0], nearest, atol=2e-7
    )


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("int4", 7)])
def test_numbers_on_the_grid_are_exact(dtype, largest):
    grid = jnp.arange(-largest, largest + 1, dtype=jnp.float32)[:, None] * 0.25
    np.testing.assert_array_equal(quantized.quantize(grid, dtype, (-2,)).dequantize(), grid)


@in_every_format
def test_zeros_stay_zero(dtype):
    few = quantized.quantize(jnp.zeros((4, 3)).at[:, 0].set(2.0), dtype, (-2,))
    np.testing.assert_array_equal(few.dequantize(), np.array([[2.0, 0, 0]] * 4, np.float32))


def not_finite_in_one_place(dtype, bad):
    return quantized.quantize(jnp.ones((4, 3)).at[1, 2].set(bad), dtype, (-2,))


@in_every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_spoil_their_group(dtype, bad):
    np.testing.assert_array_equal(
        np.isfinite(not_finite_in_one_place(dtype, bad).dequantize()),
        np.array([[True, True, False]] * 4),
    )


@in_every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_product(dtype, bad, program):
    few = not_finite_in_one_place(dtype, bad)
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


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="bfloat16 is not one of int8"):
        quantized.quantize(jnp.ones((2, 2)), jnp.bfloat16, (-2,))


@pytest.mark.parametrize(
    "shape, axes, group",
    [
        ((24, 10), (-2,), 7),
        ((24, 10), (-2,), 48),
        ((4, 6, 10), (-3, -2), 9),
        ((4, 6, 10), (-3, -2), 16),
    ],
)
def test_groups_that_do_not_divide_the_inputs_are_refused(shape, axes, group):
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


every_product = pytest.mark.parametrize(("x_shape", "w_shape", "contract", "group"), PRODUCTS)
in_every_dtype = pytest.mark.parametrize("dtype", [*FORMATS, "bfloat16"])


@functools.cache
def factors(x_shape, w_shape, contract, group, dtype):
    """An input, a weight in few bits, the same in float32, and their product."""
    x = normal(0, *x_shape)
    w = normal(1, *w_shape)
    if dtype == "bfloat16":
        few = w.astype(dtype)
        plain = few.astype(jnp.float32)
    else:
        few = quantized.quantize(w, dtype, tuple(range(-w.ndim, contract - w.ndim)), group)
        plain = few.dequantize()
    want = np.tensordot(np.asarray(x, np.float64), np.asarray(plain, np.float64), contract)
    return x, few, plain, want


@in_every_dtype
@every_product
def test_products_equal_those_of_the_dequantized_weight(
    x_shape, w_shape, contract, group, dtype, program
):
    x, few, _, want = factors(x_shape, w_shape, contract, group, dtype)
    got = jax.jit(lambda x, w: quantized.product(x, w, jnp.float32, contract))(x, few)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


@in_every_dtype
@every_product
def test_a_weight_in_float32_is_multiplied_as_it_is(
    x_shape, w_shape, contract, group, dtype, program
):
    x, _, plain, want = factors(x_shape, w_shape, contract, group, dtype)
    np.testing.assert_allclose(quantized.product(x, plain, jnp.float32, contract), want, atol=1e-5)


@in_every_dtype
@every_product
def test_a_projection_keeps_the_dtype_of_its_input(
    x_shape, w_shape, contract, group, dtype, program
):
    x, few, _, want = factors(x_shape, w_shape, contract, group, dtype)
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


few_bit_inputs = pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
some_formats = pytest.mark.parametrize("dtype", ["int8", "int4", "nf4", "float32"])
some_products = pytest.mark.parametrize(("x_shape", "w_shape", "contract", "group"), PRODUCTS[:5])


@functools.cache
def rounding_factors(x_shape, w_shape, contract, group, dtype, activations):
    """An input whose tokens differ in size, and a weight whose inputs are rounded."""
    x = normal(0, *x_shape).at[0].multiply(100.0).at[1].set(0.0)
    w = normal(1, *w_shape)
    if dtype == "float32":
        return x, Quantized(w, jnp.ones((1,) * w.ndim), activations)
    axes = tuple(range(-w.ndim, contract - w.ndim))
    return x, quantized.quantize(w, dtype, axes, group, activations)


@functools.cache
def rounded_product(x_shape, w_shape, contract, group, dtype, activations, program):
    x, few = rounding_factors(x_shape, w_shape, contract, group, dtype, activations)
    return quantized.product(x, few, jnp.float32, contract)


@few_bit_inputs
@some_formats
@some_products
def test_activations_are_rounded_a_token_at_a_time(
    x_shape, w_shape, contract, group, dtype, activations, program
):
    case = (x_shape, w_shape, contract, group, dtype, activations)
    x, few = rounding_factors(*case)
    inputs = rounded_rows(np.asarray(x).reshape(*x_shape[: x.ndim - contract], -1), activations)
    want = (inputs @ np.asarray(few.dequantize()).reshape(inputs.shape[-1], -1)).reshape(
        *x_shape[: x.ndim - contract], *w_shape[contract:]
    )
    np.testing.assert_allclose(rounded_product(*case, program), want, rtol=1e-5, atol=2e-4)


@few_bit_inputs
@some_formats
@some_products
def test_products_of_rounded_activations_differ_from_those_of_exact_ones(
    x_shape, w_shape, contract, group, dtype, activations, program
):
    case = (x_shape, w_shape, contract, group, dtype, activations)
    x, few = rounding_factors(*case)
    got = rounded_product(*case, program)
    assert np.abs(got - np.tensordot(x, few.dequantize(), contract)).max() > 1e-3


@few_bit_inputs
@some_formats
@some_products
def test_an_input_alone_is_rounded_a_row_at_a_time(
    x_shape, w_shape, contract, group, dtype, activations, program
):
    x, few = rounding_factors(x_shape, w_shape, contract, group, dtype, activations)
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


every_table = pytest.mark.parametrize("dtype", [*FORMATS, "bfloat16", "float32"])
TOKENS = np.array([[0, 699, 5], [3, 3, 600]])


@functools.cache
def table_of(dtype):
    """A table [V, D] with more rows than one block, and its values in float32."""
    table = normal(0, 700, 24)
    few = quantized.quantize(table, dtype, (-1,)) if dtype in FORMATS else table.astype(dtype)
    return few, np.asarray(few.dequantize() if dtype in FORMATS else few.astype(jnp.float32))


@every_table
@pytest.mark.parametrize("rows", [3, tiles.TABLE_FEW_ROWS + 1])
def test_logits_of_a_table_equal_those_of_the_dequantized_one(dtype, rows, program):
    few, plain = table_of(dtype)
    x = normal(1, 1, rows, 24)
    logits = jax.jit(lambda x, table: quantized.unembed(x, table, jnp.float32))(x, few)
    assert logits.shape == (1, rows, 700) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x) @ plain.T, atol=1e-5)


@every_table
def test_embeddings_of_a_table_equal_those_of_the_dequantized_one(dtype, program):
    few, plain = table_of(dtype)
    found = quantized.embed(few, jnp.asarray(TOKENS), jnp.float32)
    np.testing.assert_allclose(found, plain[TOKENS], rtol=1e-6)


@every_table
def test_embeddings_are_of_the_dtype_that_is_asked_for(dtype, program):
    few, _ = table_of(dtype)
    assert quantized.embed(few, jnp.asarray(TOKENS), jnp.bfloat16).dtype == jnp.bfloat16


def test_gradients_pass_through_the_logits():
    """Few rows take another path through the table than many."""
    table = normal(0, 40, 24)
    x = normal(1, 3, 24)
    got = jax.grad(lambda *args: jnp.sum(jnp.sin(quantized.unembed(*args, jnp.float32))), (0, 1))(
        x, table
    )
    want = jax.grad(lambda x, table: jnp.sum(jnp.sin(x @ table.T)), (0, 1))(x, table)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)


@functools.cache
def experts(dtype):
    """Matrices of three experts, and the same in float32."""
    w = normal(0, 3, 24, 10)
    if dtype == "float32":
        return w, w
    few = quantized.quantize(w, dtype, (-2,), 8)
    return few, few.dequantize()


@pytest.mark.parametrize("dtype", [*FORMATS, "float32"])
def test_expert_matrix_is_the_experts_own(dtype):
    few, plain = experts(dtype)
    got = jax.jit(
        lambda few: jax.lax.map(
            lambda e: quantized.expert_matrix(few, e, jnp.float32), jnp.arange(3)
        )
    )(few)
    np.testing.assert_allclose(got, plain, rtol=1e-6)


@pytest.mark.parametrize("dtype", [*FORMATS, "float32"])
def test_expert_matrix_is_of_the_dtype_that_is_asked_for(dtype):
    few, _ = experts(dtype)
    assert quantized.expert_matrix(few, 1, jnp.bfloat16).dtype == jnp.bfloat16


split_weights = pytest.mark.parametrize(
    "split", [(None, "tensor"), ("tensor", None)], ids=["outputs", "inputs"]
)
grouped_weights = pytest.mark.parametrize(
    ("dtype", "group", "activations"), [("int8", 0, ""), ("int4", 8, ""), ("int8", 0, "int8")]
)


@functools.cache
def mesh():
    return sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:8])


@functools.cache
def spread(dtype, group, activations, split):
    """A weight on one device, and on eight."""
    few = quantized.quantize(normal(1, 32, 256), dtype, (-2,), group, activations)
    table = {"tensor": "tensor"}
    whole = tuple(name if few.scale.shape[i] > 1 else None for i, name in enumerate(split))
    places = Quantized(
        sharding.param_shardings(split, mesh(), table, few.values),
        sharding.param_shardings(whole, mesh(), table, few.scale),
        activations,
    )
    return few, jax.device_put(few, places)


@split_weights
@grouped_weights
def test_a_weight_lies_in_parts_on_its_devices(dtype, group, activations, split):
    _, apart = spread(dtype, group, activations, split)
    assert len(apart.values.sharding.device_set) == 8
    assert not apart.values.sharding.is_fully_replicated


@split_weights
@grouped_weights
def test_products_over_devices(dtype, group, activations, split, program):
    few, apart = spread(dtype, group, activations, split)
    x = normal(0, 8, 32)
    got = jax.jit(lambda x, w: quantized.product(x, w, jnp.float32))(
        jax.device_put(x, sharding.batch_sharding(mesh(), 0)), apart
    )
    np.testing.assert_allclose(got, quantized.product(x, few, jnp.float32), atol=1e-5)
