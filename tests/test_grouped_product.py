"""The TPU kernel for experts of few bits, interpreted, against `ragged_dot` with whole weights; and
compiled for TPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models.kernels import experts, grouped_product, tiles
from dcmdp_jax.models.kernels.experts import FEW_BITS
from dcmdp_jax.models.kernels.swiglu import Experts
from dcmdp_jax.models.quantized import Quantized, quantize
from dcmdp_jax.tools import slices
from support.accelerators import accelerator_programs

pytestmark = pytest.mark.full

interpreted = functools.partial(grouped_product.product, interpret=True)
LAYOUT = pytest.mark.parametrize("transposed", [False, True])


def case(name, sizes, inputs, outputs, group=0):
    """Returns rows and weights whose products are about one in size."""
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (len(sizes), inputs, outputs)) * inputs**-0.5
    return (
        jax.random.normal(keys[1], (sum(sizes), inputs)),
        quantize(w, name, (-2,), group),
        jnp.array(sizes, jnp.int32),
    )


def whole(rows, w, sizes):
    return jax.lax.ragged_dot(rows, w.dequantize(), sizes, precision="highest")


@LAYOUT
@pytest.mark.parametrize("name", FEW_BITS)
def test_equals_whole_weights(name, transposed):
    """One program for all sizes of as many rows and experts: each with full tiles, none or one row,
    all rows, and parts of tiles.
    """
    product = jax.jit(functools.partial(interpreted, transposed=transposed))
    for sizes in (
        (64, 0, 64, 0),
        (32, 32, 32, 32),
        (0, 123, 5, 0),
        (0, 0, 126, 2),
        (1, 0, 0, 127),
        (0, 128, 0, 0),
        (3, 40, 70, 15),
    ):
        arguments = case(name, sizes, 64, 160)
        np.testing.assert_allclose(product(*arguments), whole(*arguments), atol=1e-5, rtol=0)


@LAYOUT
@pytest.mark.parametrize("sizes", [(3,), (0, 5, 0, 40, 1, 0)])
def test_fewer_rows_than_tiles_hold(sizes, transposed):
    arguments = case("float8_e4m3fn", sizes, 64, 160)
    found = interpreted(*arguments, transposed=transposed)
    np.testing.assert_allclose(found, whole(*arguments), atol=1e-5, rtol=0)


@LAYOUT
@pytest.mark.parametrize("outputs", [32, 224, 288, 300])
def test_sizes_that_no_block_divides(outputs, transposed, monkeypatch):
    """With blocks of two vectors' outputs at most."""
    monkeypatch.setattr(tiles, "EXPERT_BYTES", 96 * (64 if transposed else 256))
    arguments = case("float8_e4m3fn", (5, 0, 20), 96, outputs)
    found = interpreted(*arguments, transposed=transposed)
    np.testing.assert_allclose(found, whole(*arguments), atol=1e-5, rtol=0)


def test_one_scale_a_matrix():
    arguments = case("int8", (5, 0, 20), 64, 96, group=-1)
    np.testing.assert_allclose(interpreted(*arguments), whole(*arguments), atol=1e-5, rtol=0)


@LAYOUT
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int8", "int4"])
def test_every_finite_element_is_exact(name, transposed):
    """Subnormal numbers and -0 too, in bfloat16."""
    bits = jnp.arange(256, dtype=jnp.uint8)
    values = bits.view(name) if name.startswith("float") else bits.view(jnp.int8).astype(name)
    values = jnp.where(jnp.isfinite(values.astype(jnp.float32)), values, jnp.zeros((), name))
    values = values.reshape(1, 32, 8)
    w = Quantized(values, jnp.ones((1, 1, 8)))
    eye = jnp.eye(32, dtype=jnp.bfloat16)
    found = interpreted(eye, w, jnp.array([32], jnp.int32), transposed=transposed)
    np.testing.assert_array_equal(found, values[0].astype(jnp.float32))


def test_a_scale_that_is_not_a_number_shows():
    rows, w, sizes = case("float8_e4m3fn", (4, 4), 32, 64)
    broken = Quantized(w.values, w.scale.at[1, 0, 7].set(jnp.nan))
    found = np.isnan(interpreted(rows, broken, sizes))
    assert found[4:, 7].all()
    assert found.sum() == 4


@LAYOUT
@pytest.mark.parametrize("split", [(None, "mlp"), ("mlp", None)])
@pytest.mark.parametrize("name", ["int4", "float8_e4m3fn"])
def test_split_weights_equal_one_device(name, split, transposed):
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
    rows, w, sizes = case(name, (0, 5, 30, 2), 256, 128)
    inputs, outputs = split
    specs = ((None, inputs), (None, inputs, outputs), (None, None, outputs), (None,))
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, sharding.partition_spec(names, sharding.DECODE)))
        for x, names in zip((rows, w.values, w.scale, sizes), specs, strict=True)
    ]

    def split_product(rows, values, scale, sizes):
        w = Quantized(values, scale)
        return interpreted(rows, w, sizes, mesh, split, transposed=transposed)

    found = jax.jit(split_product)(*placed)
    np.testing.assert_allclose(found, whole(rows, w, sizes), atol=1e-5, rtol=0)
    expected = sharding.partition_spec((None, outputs), sharding.DECODE)
    assert found.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected), 2)


def abstract(mesh, arguments):
    """Returns the shapes of tokens, choices and experts, placed as an engine has them."""
    whole, outputs, inputs = (None, None), (None, None, "mlp"), (None, "mlp", None)

    def place(names, tree):
        def leaf(x):
            split = tuple(name if n > 1 else None for name, n in zip(names, x.shape))
            place = jax.NamedSharding(mesh, sharding.partition_spec(split, sharding.DECODE))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(leaf, tree)

    x, chosen, weights = arguments
    of_experts = map(place, (outputs, outputs, inputs), weights)
    return place(whole, x), place(whole, chosen), Experts(*of_experts)


def layer(name):
    """Returns 32 tokens and experts, of which a fourth of F fills no vectors."""
    shapes = (32, 1024, 768), (32, 1024, 768), (32, 768, 1024)
    weights = Experts(*(quantize(jnp.zeros(shape), name, (-2,)) for shape in shapes))
    return jnp.zeros((32, 1024), jnp.bfloat16), jnp.zeros((32, 4), jnp.int32), weights


def test_split_experts_equal_one_device(monkeypatch):
    """In bfloat16: sums that are rounded differ by a unit of roundoff, in the worst case one each
    of gate, up, their product and the result.
    """
    monkeypatch.setitem(grouped_product.FORMATS, jax.devices()[0].device_kind, ("float8_e4m3fn",))
    monkeypatch.setattr(grouped_product, "product", interpreted)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (4, 128, 256), (4, 128, 256), (4, 256, 128)
    weights = Experts(
        *(
            quantize(jax.random.normal(key, shape) * shape[1] ** -0.5, "float8_e4m3fn", (-2,))
            for key, shape in zip(keys, shapes, strict=True)
        )
    )
    x = jax.random.normal(keys[0], (16, 128), jnp.bfloat16)
    chosen = jax.random.randint(keys[1], (16, 2), 0, 4)

    def run(mesh):
        placed = abstract(mesh, (x, chosen, weights))
        placed = jax.tree.map(
            lambda a, s: jax.device_put(a, s.sharding), (x, chosen, weights), placed
        )
        with accelerator_programs():
            return jax.jit(functools.partial(experts.expert_outputs, mesh=mesh))(*placed)

    found, expected = (
        np.asarray(run(sharding.make_mesh(MeshConfig(**axes), jax.devices()[:count])), np.float32)
        for axes, count in (({"data": 2, "tensor": 4}, 8), ({}, 1))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2**-8 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("outputs", "inputs", "transposed", "width"),
    [(192, 2048, True, 96), (2048, 192, False, 1024), (768, 2048, False, 384), (96, 64, True, 64)],
)
def test_two_cores_get_equal_blocks(outputs, inputs, transposed, width):
    assert grouped_product._width(outputs, inputs, jnp.int8, transposed) == width


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize(
    ("topology", "name"),
    [
        (topology, name)
        for topology, kind in (("v4:2x2x1", "TPU v4"), ("v5p:2x2x1", "TPU v5"))
        for name in grouped_product.FORMATS[kind]
    ],
)
def test_a_tpu_copies_no_weights(topology, name, tensor):
    devices = slices.slice_devices(topology)[:tensor]
    mesh = sharding.make_mesh(MeshConfig(tensor=tensor), devices)
    arguments = abstract(mesh, jax.eval_shape(lambda: layer(name)))
    f = functools.partial(experts.expert_outputs, mesh=mesh)
    lowered = jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call(") == 3
    one_copy = 32 * 1024 * 768 * 2 // tensor
    assert lowered.compile().memory_analysis().temp_size_in_bytes < one_copy / 2


def test_what_the_kernel_takes():
    chip = sharding.make_mesh(MeshConfig(), slices.slice_devices("v5p:2x2x1")[:1])
    by_expert = sharding.make_mesh(MeshConfig(expert=4), slices.slice_devices("v5p:2x2x1"))
    by_tensor = sharding.make_mesh(MeshConfig(tensor=4), slices.slice_devices("v5p:2x2x1"))
    takes = grouped_product.is_supported
    assert takes("float8_e4m3fn", (64, 96), chip)
    assert not takes("float8_e4m3fn", (64, 96), by_expert)
    assert not takes("float8_e4m3fn", (64, 96), by_tensor)
    assert not takes("float8_e4m3fn", (64, 40), chip)
    assert not takes("int8", (64, 96), chip)
