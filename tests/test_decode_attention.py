"""The TPU kernel of decoding, interpreted, against the attention of other devices; and compiled for
a TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import MeshConfig, Precision
from dcmdp_jax.models import cache, decoder, inference
from dcmdp_jax.models.kernels import decode_attention
from dcmdp_jax.models.model_config import Compute
from dcmdp_jax.models.quantized import Quantized, quantize
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.tools import slices
from support.accelerators import tpu_programs
from support.random_params import random_params
from support.tiny_models import TINY

pytestmark = pytest.mark.full

WIDTH = 128
BLOCK = 128
interpreted = functools.partial(decode_attention.attention, positions=BLOCK, interpret=True)


def case(dtype, slots, heads, group, length, compute=jnp.float32):
    """Returns queries, and keys and values as a cache of `dtype` holds them."""
    keys = jax.random.split(jax.random.key(0), 3)

    def layer(key):
        x = jax.random.normal(key, (slots, heads, length, WIDTH))
        return quantize(x, dtype, (-1,)) if dtype in cache.SCALED else x.astype(dtype)

    q = jax.random.normal(keys[0], (slots, heads, group, WIDTH), compute)
    return q, layer(keys[1]), layer(keys[2])


def spoil(layer, dead):
    """Returns a float cache [B, KV, S, h] with NaN where `dead` [B, S]."""
    return jnp.where(dead[:, None, :, None], jnp.nan, layer)


def assert_equals_window(dtype, heads, length, lengths):
    arguments = case(dtype, len(lengths), heads, 3, length)
    expected = cache.attend(*arguments, jnp.minimum(lengths, length - 1), window=length)
    found = jax.jit(interpreted)(*arguments, lengths)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


SHAPES = pytest.mark.parametrize(
    "heads, length",
    [(1, 3 * BLOCK), (4, 2 * BLOCK + 44), (2, 100)],
    ids=["whole blocks", "heads in two parts, the last block ragged", "less than a block"],
)


@SHAPES
@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_ragged_lengths_equal_the_window(dtype, heads, length):
    """One token, all positions, and past the end, as of a slot that goes on without a sequence."""
    lengths = jnp.array([0, length - 1, length + 5, length // 2, 1])
    assert_equals_window(dtype, heads, length, lengths)


def test_edges_of_blocks_equal_the_window():
    edges = [BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK - 1]
    assert_equals_window("float32", 1, 3 * BLOCK, jnp.array(edges))


def test_blocks_without_a_token_are_not_read():
    """A sum with a term 0 * NaN is NaN, so a block that is read shows it."""
    length = 3 * BLOCK
    lengths = jnp.array([0, BLOCK - 1, BLOCK, length - 1])
    q, keys, values = case("float32", len(lengths), 1, 2, length)
    expected = cache.attend(q, keys, values, lengths, window=length)
    live = (lengths // BLOCK + 1) * BLOCK
    dead = jnp.arange(length) >= live[:, None]
    found = jax.jit(interpreted)(q, spoil(keys, dead), spoil(values, dead), lengths)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    next_token = jnp.arange(length) == lengths[:, None] + 1
    found = jax.jit(interpreted)(q, keys, spoil(values, next_token), lengths)
    assert np.isnan(found).any(axis=(1, 2, 3)).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "heads, row_bytes, positions",
    [(8, 256, 512), (4, 256, 1024), (1, 256, 1024), (8, 128, 1024), (8, 512, 256), (2, 2**20, 128)],
)
def test_a_block_is_as_large_as_its_bounds_allow(heads, row_bytes, positions):
    assert decode_attention.block_positions(heads, 9216, row_bytes) == positions


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_split_slots_and_heads_equal_one_device(dtype):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    arguments = *case(dtype, 8, 4, 3, 300), jnp.array([0, 299, 3, 150, 128, 127, 7, 250])
    expected = cache.attend(*arguments, window=300)
    placed = jax.device_put(arguments, sharding.decode_state_shardings(arguments, mesh))
    found = jax.jit(functools.partial(interpreted, mesh=mesh))(*placed)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.sharding.is_equivalent_to(placed[0].sharding, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_bfloat16_errs_by_its_rounding(dtype):
    """The weights, with the scale of their values, are rounded, and so is the result: by a unit of
    roundoff (2^-8) each.
    """
    lengths = jnp.array([0, 500, 256, 77])
    q, keys, values = case(dtype, len(lengths), 2, 3, 512, jnp.bfloat16)
    found = jax.jit(interpreted)(q, keys, values, lengths)
    assert found.dtype == jnp.bfloat16
    keys, values = (
        np.asarray(x.dequantize() if isinstance(x, Quantized) else x.astype(jnp.float32))
        for x in (keys, values)
    )
    scores = np.einsum("bkgh,bkth->bkgt", q.astype(jnp.float32), keys) / WIDTH**0.5
    scores = np.where(np.arange(512) <= lengths[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected, size = (np.einsum("bkgt,bkth->bkgh", weights, v) for v in (values, np.abs(values)))
    assert (np.abs(found.astype(jnp.float32) - expected) <= 2 * 2**-8 * size + 1e-5).all()


WIDE = dataclasses.replace(TINY, head_dim=WIDTH, num_heads=4, num_kv_heads=2)


def test_a_decode_step_equals_the_window_and_reads_one_block_of_an_idle_slot():
    slots, length = 4, 2 * 1024
    config = dataclasses.replace(WIDE, num_layers=1, num_kv_heads=1)
    flat = inference.unstack(random_params(config, 0.15), config)
    _, *layers = case("float32", slots, config.num_kv_heads, 1, length)
    lengths = jnp.array([5, 2000, 1200, 1500])
    active = jnp.array([True, True, False, True])
    tokens = jnp.arange(slots)
    live = (jnp.where(active, lengths, 0) // 1024 + 1) * 1024
    dead = jnp.arange(length) >= live[:, None]

    def decode(layers):
        state = cache.Cache(*((layer,) for layer in layers))
        step = jax.jit(functools.partial(inference.decode, config=config, window=length))
        return step(flat, tokens, state, lengths, active=active)[0]

    expected = decode(layers)
    with tpu_programs():
        found = decode([spoil(layer, dead) for layer in layers])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[active], expected[active], atol=1e-5)


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_the_kernel_compiles_for_a_tpu(dtype):
    place = jax.sharding.SingleDeviceSharding(slices.slice_devices("v5e:2x2")[0])
    compute = jnp.float32 if dtype == "float32" else jnp.bfloat16

    def arguments():
        return *case(dtype, 8, 2, 4, 2100, compute), jnp.zeros(8, jnp.int32)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(arguments)
    )
    lowered = jax.jit(decode_attention.attention).trace(*shapes).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.compile().as_text()


@pytest.fixture(scope="module")
def tpu_engine():
    """An engine on four chips, and its weights' shapes."""
    config = dataclasses.replace(WIDE, compute=Compute(bfloat16=True))
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), slices.slice_devices("v5e:2x2"))
    params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    shardings = sharding.param_shardings(
        decoder.logical_axes(config), mesh, sharding.DECODE, params
    )
    params = sharding.abstract_arrays(params, shardings)
    engine = Engine(config, slots=64, steps=4, max_length=2048, stop_ids=(0,), mesh=mesh)
    return engine, sync.abstract_weights(params, config, Precision(), mesh)


@pytest.mark.slow
def test_a_tpu_decodes_with_the_kernel_and_copies_no_cache(tpu_engine):
    engine, weights = tpu_engine
    _, decode = engine.lower(weights, 2, 64)
    compiled = decode.compile()
    assert "decode_attention" in compiled.as_text()
    layer = sharding.local_bytes(engine.state_shapes().cache.keys[0])
    assert compiled.memory_analysis().temp_size_in_bytes < layer / 2


def test_one_program_of_a_tpu_serves_every_window(tpu_engine, monkeypatch):
    engine, _ = tpu_engine
    windows = []

    def generate(*arguments, window):
        windows.append(window)
        return None, None

    monkeypatch.setattr(engine, "_generate", generate)
    for window in (None, 256, 512):
        engine.generate(None, None, window=window)
    assert windows == [2048] * 3
