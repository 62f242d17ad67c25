"""SwiGLU in tiles of rows against the formula: values and gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models.kernels import swiglu
from support.accelerators import accelerator_programs

pytestmark = pytest.mark.full

D = 6
F = 10


def case(rows, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (2, rows, D), (D, F), (D, F), (F, D), (2, rows, D)
    return [
        jax.random.normal(k, s, dtype if s[0] == 2 else jnp.float32)
        for k, s in zip(keys, shapes, strict=True)
    ]


def formula(x, gate, up, down):
    return (nn.silu(x @ gate) * (x @ up)) @ down


def both(f, x, gate, up, down, dy):
    y, pull = jax.vjp(f, x, gate, up, down)
    return y, pull(dy)


dense = functools.partial(swiglu.dense, tile_rows=8, few_rows=6)


def assert_equals_formula(rows):
    got, want = (jax.jit(functools.partial(both, f))(*case(rows)) for f in (dense, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


@pytest.mark.parametrize("rows", [3, 4, 7, 16])
def test_tiles_equal_the_formula(rows):
    assert_equals_formula(rows)


@pytest.mark.parametrize("rows", [3, 4, 7, 16])
def test_the_program_of_accelerators_equals_the_formula(rows):
    with accelerator_programs():
        assert_equals_formula(rows)


def test_bfloat16_activations_on_float32_weights():
    got = jax.jit(functools.partial(both, dense))(*case(7, jnp.bfloat16))
    want = both(formula, *(x.astype(jnp.float32) for x in case(7, jnp.bfloat16)))
    assert [x.dtype.name for x in jax.tree.leaves(got)] == ["bfloat16"] * 2 + ["float32"] * 3
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * np.abs(b).max())
