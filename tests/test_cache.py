"""Decoding through the slotted cache against the whole sequence at once, in every precision of the
cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models import cache, decoder, inference, quantized
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.models.model_config import Compute, Yarn
from dcmdp_jax.models.quantized import Quantized
from support.accelerators import accelerator_programs
from support.random_params import random_params
from support.tiny_models import TINY, TINY_MOE

pytestmark = pytest.mark.full

WINDOW = 16
SLOTS = 4
LENGTH = 24
CONFIGS = {
    "dense": dataclasses.replace(TINY, qkv_bias=True, o_bias=True, rope_scaling=Yarn(4.0, 8)),
    "moe": dataclasses.replace(TINY_MOE, num_layers=3, decoder_sparse_step=2),
}
FEW_BITS = ("int8", "float8_e4m3fn")

prefill = jax.jit(inference.prefill, static_argnames="config")
decode = jax.jit(inference.decode, static_argnames=("config", "window"), donate_argnames="cache")
insert = jax.jit(cache.insert, donate_argnames="cache")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def all_at_once(params, tokens, config):
    """Returns the hidden states of all positions."""
    return np.asarray(jax.jit(decoder.hidden, static_argnames="config")(params, tokens, config))


@pytest.mark.parametrize(("name", "precision"), [("dense", None), ("moe", None), ("moe", "int4")])
def test_decode_equals_all_positions_at_once(name, precision):
    """Ragged prompts, one prefix in two slots, an idle slot, and slots used a second time."""
    config = CONFIGS[name]
    params = random_params(config, 0.15)
    if precision:
        axes = decoder.contracting_axes(config)
        params = jax.tree.map(
            lambda w, a: quantized.quantize(w, precision, a) if a else w, params, axes
        )
    flat = inference.unstack(params, config)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (5, WINDOW), 0, config.vocab_size))
    want = all_at_once(params, tokens, config)
    state = cache.init(config, SLOTS, LENGTH)
    # rounds of (slot, sequence, prompt length): the second round reuses slots that held longer
    # sequences
    rounds = [[(2, 0, 3), (0, 1, 6), (3, 0, 3)], [(3, 2, 6), (0, 3, 1), (1, 4, 2)]]
    for placed in rounds:
        slots, rows, prompts = (np.array(x, np.int32) for x in zip(*placed, strict=True))
        distinct = np.unique(rows)
        # right-padded with tokens that must not matter
        keys, values = prefill(flat, tokens[distinct, :8], config)
        state = insert(state, keys, values, slots, np.searchsorted(distinct, rows))
        feed = np.zeros(SLOTS, np.int32)
        lengths = np.zeros(SLOTS, np.int32)
        for step in range(8):
            feed[slots] = tokens[rows, prompts - 1 + step]
            lengths[slots] = prompts - 1 + step
            x, state, _ = decode(flat, feed, state, lengths, config, window=WINDOW)
            np.testing.assert_allclose(x[slots], want[rows, lengths[slots]], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def one_step():
    """(dtype, window) -> hidden states and caches before and after one step at position 7."""
    config = CONFIGS["dense"]
    flat = inference.unstack(random_params(config, 0.15), config)
    tokens = jax.random.randint(jax.random.key(1), (SLOTS, 8), 0, config.vocab_size)
    keys, values = prefill(flat, tokens, config)
    slots = jnp.arange(SLOTS)
    lengths = jnp.full(SLOTS, 7)
    step = jax.jit(inference.decode, static_argnames=("config", "window"))

    def run(dtype, window):
        before = insert(cache.init(config, SLOTS, LENGTH, dtype), keys, values, slots, slots)
        x, after, _ = step(flat, tokens[:, 7], before, lengths, config, window=window)
        return x, before, after

    return run


def test_positions_past_the_window_are_not_read(one_step):
    narrow = one_step("float32", 8)[0]
    np.testing.assert_allclose(narrow, one_step("float32", LENGTH)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", *FEW_BITS])
def test_a_step_leaves_the_cache_in_its_format(dtype, one_step):
    _, before, after = one_step(dtype, 8)
    assert jax.tree.leaves(after.values[0])[0].dtype == jnp.dtype(dtype)
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize("dtype", ["bfloat16", *FEW_BITS])
def test_a_cache_of_few_bits_is_close_to_float32(dtype, one_step):
    error = np.abs(one_step(dtype, 8)[0] - one_step("float32", 8)[0])
    assert 0 < error.max() < 0.1


def in_format(x, dtype):
    """Returns keys or values [B, KV, S, h] in the format of a cache of `dtype`."""
    return quantized.quantize(x, dtype, (-1,)) if dtype in FEW_BITS else x.astype(dtype)


def plain(layer):
    return np.asarray(
        layer.dequantize() if isinstance(layer, Quantized) else layer.astype(jnp.float32),
        np.float64,
    )


# slots, kv-heads, q-heads per kv-head, head size of the tests of attention
SHAPE = (8, 2, 3, 8)
LENGTHS = jnp.array([0, 1, 5, 15, 7, 3, 14, 8])


def case(dtype):
    """Returns queries, and keys and values as a cache of `dtype` holds them."""
    b, kv, g, h = SHAPE
    keys, values = (in_format(normal(i, b, kv, LENGTH, h), dtype) for i in (1, 2))
    return normal(0, b, kv, g, h), keys, values


def assert_attention_equals_numpy(dtype, **tiles):
    q, keys, values = case(dtype)
    attend = functools.partial(cache.attend, window=WINDOW, **tiles)
    got = jax.jit(lambda *args: attend(*args))(q, keys, values, LENGTHS)
    scores = np.einsum("bkgh,bkth->bkgt", q, plain(keys)) / q.shape[-1] ** 0.5
    scores[
        np.broadcast_to(np.arange(LENGTH) > np.asarray(LENGTHS)[:, None, None, None], scores.shape)
    ] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bkgt,bkth->bkgh", weights / weights.sum(-1, keepdims=True), plain(values))
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("slots_at_a_time", [1, 3, 8])
@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_attention_to_blocks_of_slots_equals_numpy(dtype, slots_at_a_time):
    elements_per_slot = SHAPE[1] * WINDOW * SHAPE[3]
    assert_attention_equals_numpy(dtype, cpu_elements=slots_at_a_time * elements_per_slot)


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_attention_on_accelerators_equals_numpy(dtype):
    with accelerator_programs():
        assert_attention_equals_numpy(dtype)


def test_attention_to_the_cache_is_the_layers_attention():
    q, keys, values = case("float32")
    mask = (jnp.arange(LENGTH) <= LENGTHS[:, None])[:, None, None, None]
    want = attention.attention(q[..., None, :], keys, values, mask)[..., 0, :]
    got = cache.attend(q, keys, values, LENGTHS, window=WINDOW)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.5 / 127), ("float8_e4m3fn", 16 / 448)])
def test_error_of_a_quantized_cache(dtype, share):
    """`share` is half the largest step over the largest number. With it keys are off by dk = share
    max|k|, scores by e = |q|_1 dk / sqrt(h), each weight by a factor within exp(+-2e), values by dv
    = share max|v|: |output error| <= (exp(2e) - 1) max|v| + dv.
    """
    b = 4
    kv = 2
    g = 3
    h = 8
    q = 0.2 * normal(0, b, kv, g, h)
    keys = normal(1, b, kv, LENGTH, h)
    values = normal(2, b, kv, LENGTH, h)
    lengths = jnp.array([0, 3, 9, 15])
    exact = cache.attend(q, keys, values, lengths, window=WINDOW)
    error = np.abs(
        cache.attend(q, in_format(keys, dtype), in_format(values, dtype), lengths, window=WINDOW)
        - exact
    )
    scores = np.abs(q).sum(-1).max() * share * np.abs(keys).max() / h**0.5
    bound = (np.exp(2 * scores) - 1) * np.abs(values).max() + share * np.abs(values).max()
    assert bound / 100 < error.max() < bound < 1


@pytest.mark.parametrize(
    ("dtype", "per_head"),
    [
        ("", 4 * 16),
        ("float32", 4 * 16),
        ("bfloat16", 2 * 16),
        ("int8", 16 + 4),
        ("float8_e4m3fn", 16 + 4),
    ],
)
def test_bytes_of_each_format(dtype, per_head):
    state = cache.init(TINY, SLOTS, LENGTH, dtype)
    heads = 2 * TINY.num_layers * SLOTS * TINY.num_kv_heads * LENGTH
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == heads * per_head


def test_a_cache_has_the_compute_dtype_by_default():
    config = dataclasses.replace(TINY, compute=Compute(bfloat16=True))
    assert cache.init(config, 1, 1).keys[0].dtype == jnp.bfloat16


def test_formats_that_a_cache_cannot_have_raise():
    with pytest.raises(ValueError, match="cannot hold 'int4'; choose one of float32, bfloat16"):
        cache.init(TINY, 1, 1, "int4")


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_insert_copies_rows_into_slots_and_nothing_else(dtype):
    config = TINY
    shape = (3, config.num_kv_heads, 5, config.head_dim)
    keys = tuple(normal(i, *shape) for i in range(config.num_layers))
    values = tuple(-k for k in keys)
    empty = cache.init(config, SLOTS, LENGTH, dtype)
    filled = cache.insert(empty, keys, values, jnp.array([3, 0, SLOTS]), jnp.array([1, 1, 2]))
    for layer, source in zip((*filled.keys, *filled.values), (*keys, *values), strict=True):
        want = np.zeros(layer.shape)
        want[[3, 0], :, :5] = plain(in_format(source, dtype))[1]
        np.testing.assert_array_equal(plain(layer), want)


def test_a_prefix_longer_than_the_cache_raises():
    config = TINY
    keys = (jnp.zeros((3, config.num_kv_heads, 5, config.head_dim)),) * config.num_layers
    with pytest.raises(ValueError, match="prefix of 5 positions does not fit a cache of 4"):
        cache.insert(cache.init(config, SLOTS, 4), keys, keys, jnp.array([0]), jnp.array([0]))


@pytest.mark.parametrize("dtype", cache.DTYPES)
def test_write_drops_positions_outside_the_cache(dtype):
    layer = in_format(jnp.zeros((3, 2, 4, 5)), dtype)
    new = normal(0, 3, 2, 5)
    got = cache.write(layer, new, jnp.array([2, 0, 4]))
    want = np.zeros(layer.shape)
    want[0, :, 2], want[1, :, 0] = plain(in_format(new, dtype))[:2]
    np.testing.assert_array_equal(plain(got), want)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_insert_and_decode_work_in_place(dtype):
    config = TINY
    flat = inference.unstack(random_params(config, 0.15), config)
    state = cache.init(config, SLOTS, LENGTH, dtype)
    before = sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state))
    keys, values = prefill(flat, jnp.zeros((1, 4), jnp.int32), config)
    slots = jnp.arange(SLOTS)
    state = insert(state, keys, values, slots, jnp.zeros(SLOTS, jnp.int32))
    _, state, _ = decode(flat, jnp.zeros(SLOTS, jnp.int32), state, slots, config, window=8)
    assert sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)) == before
