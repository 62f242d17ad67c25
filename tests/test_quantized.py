"""Low-bit weights: error bounds, exact cases, and products that equal those of the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models import quantized

CASES = [
    ("bsd,dnh->bsnh", (2, 3, 8), (8, 2, 5), (-3,)),
    ("bsnh,nhd->bsd", (2, 3, 2, 5), (2, 5, 8), (-3, -2)),
    ("...f,fd->...d", (4, 6), (6, 3), (-2,)),
    ("...f,fd->...d", (2, 4, 6), (6, 3), (-2,)),
]


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize(("spec", "x_shape", "w_shape", "axes"), CASES)
def test_project_equals_the_dequantized_product(spec, x_shape, w_shape, axes, dtype):
    x, w = jax.random.normal(jax.random.key(0), x_shape), jax.random.normal(jax.random.key(1), w_shape)
    few = quantized.quantize(w, dtype, axes)
    assert few.values.shape == w.shape and few.values.dtype == jnp.dtype(dtype)
    assert few.scale.dtype == jnp.float32 and few.scale.ndim == w.ndim
    assert all(few.scale.shape[axis] == 1 for axis in axes)
    assert few.scale.size == w.size // np.prod([w.shape[axis] for axis in axes])
    got = quantized.project(spec, x, few, jnp.float32)
    np.testing.assert_allclose(got, np.einsum(spec, x, few.dequantize()), atol=1e-5)
    np.testing.assert_allclose(quantized.project(spec, x, w, jnp.float32), np.einsum(spec, x, w), atol=1e-5)
    rounded = quantized.project(spec, x, few, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), got, atol=0.2)


@pytest.mark.parametrize(("dtype", "qmax"), [("int8", 127), ("int4", 7)])
def test_integers_round_to_the_nearest_of_even_steps(dtype, qmax):
    w = jax.random.normal(jax.random.key(0), (64, 10)) * jnp.geomspace(1e-3, 1e3, 10)
    few = quantized.quantize(w, dtype, (0,))
    np.testing.assert_allclose(few.scale[0], np.abs(w).max(0) / qmax, rtol=1e-6)
    assert (np.abs(few.dequantize() - w) <= few.scale * 0.5001).all()
    grid = jnp.arange(-qmax, qmax + 1, dtype=jnp.float32)[:, None] * 0.25  # what fits the grid is kept exactly
    np.testing.assert_array_equal(quantized.quantize(grid, dtype, (0,)).dequantize(), grid)


def test_float8_keeps_three_bits_of_fraction():
    w = jax.random.normal(jax.random.key(0), (64, 10)) * jnp.geomspace(1e-3, 1e3, 10)
    few = quantized.quantize(w, jnp.float8_e4m3fn, (0,))
    assert np.isfinite(few.dequantize()).all()
    np.testing.assert_allclose(np.abs(few.values.astype(jnp.float32)).max(0), 448.0)
    normal = np.abs(w / few.scale) > 2.0**-6
    assert (np.abs(few.dequantize() / w - 1)[normal] <= 2.0**-4 * 1.0001).all()


def test_a_channel_of_zeros_stays_zero():
    few = quantized.quantize(jnp.zeros((4, 3)).at[:, 0].set(2.0), jnp.int8, (0,))
    np.testing.assert_array_equal(few.dequantize(), np.array([[2.0, 0, 0]] * 4, np.float32))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="bfloat16 is not one of int8"):
        quantized.quantize(jnp.ones((2, 2)), jnp.bfloat16, (0,))
