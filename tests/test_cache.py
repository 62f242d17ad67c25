"""Decoding through the slotted cache against the whole sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.config import Yarn
from dcmdp_jax.models import cache, quantized, qwen3, sizes
from random_params import random_params

WINDOW = 16
SLOTS, LENGTH = 4, 24
CONFIGS = {
    "dense": dataclasses.replace(sizes.TINY, attention_bias=True, yarn=Yarn(4.0, 8)),
    "moe": dataclasses.replace(sizes.TINY_MOE, num_layers=3, decoder_sparse_step=2),
}

prefill = jax.jit(qwen3.prefill, static_argnames="config")
decode = jax.jit(qwen3.decode, static_argnames=("config", "window"), donate_argnames="cache")
insert = jax.jit(cache.insert, donate_argnames="cache")


def whole(params, tokens, config):
    """Hidden states of every position at once."""
    return np.asarray(jax.jit(qwen3.hidden, static_argnames="config")(params, tokens, config))


@pytest.mark.parametrize(("name", "precision"), [("dense", None), ("moe", None), ("moe", "int4")])
def test_decode_equals_the_whole_sequence(name, precision):
    """Ragged prompts, one prefix in two slots, an idle slot, and slots used a second time."""
    config = CONFIGS[name]
    params = random_params(config, 0.15)
    if precision:
        axes = qwen3.contracting_axes(config)
        params = jax.tree.map(lambda w, a: quantized.quantize(w, precision, a) if a else w, params, axes)
    flat = qwen3.unstack(params, config)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (5, WINDOW), 0, config.vocab_size))
    want = whole(params, tokens, config)
    state = cache.init(config, SLOTS, LENGTH)
    # rounds of (slot, sequence, prompt length): the second round reuses slots that held longer sequences
    rounds = [[(2, 0, 3), (0, 1, 6), (3, 0, 3)], [(3, 2, 6), (0, 3, 1), (1, 4, 2)]]
    for placed in rounds:
        slots, rows, prompts = (np.array(x, np.int32) for x in zip(*placed, strict=True))
        distinct = np.unique(rows)
        keys, values = prefill(flat, tokens[distinct, :8], config)  # right-padded with tokens that must not matter
        state = insert(state, keys, values, slots, np.searchsorted(distinct, rows))
        feed, lengths = np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32)
        for step in range(8):
            feed[slots] = tokens[rows, prompts - 1 + step]
            lengths[slots] = prompts - 1 + step
            x, state = decode(flat, feed, state, lengths, config, window=WINDOW)
            np.testing.assert_allclose(x[slots], want[rows, lengths[slots]], atol=1e-5, rtol=0)


def test_window_and_dtype():
    config = CONFIGS["dense"]
    flat = qwen3.unstack(random_params(config, 0.15), config)
    tokens = jax.random.randint(jax.random.key(1), (SLOTS, 8), 0, config.vocab_size)
    keys, values = prefill(flat, tokens, config)
    slots, lengths = jnp.arange(SLOTS), jnp.full(SLOTS, 7)
    empty = {dtype: cache.init(config, SLOTS, LENGTH, dtype) for dtype in ("float32", "bfloat16")}
    state = {dtype: insert(cache, keys, values, slots, slots) for dtype, cache in empty.items()}
    assert state["bfloat16"].keys[0].dtype == jnp.bfloat16
    step = functools.partial(jax.jit(qwen3.decode, static_argnames=("config", "window")), flat, tokens[:, 7])
    narrow, _ = step(state["float32"], lengths, config, window=8)
    wide, _ = step(state["float32"], lengths, config, window=LENGTH)
    np.testing.assert_allclose(narrow, wide, atol=1e-6)
    rounded, after = step(state["bfloat16"], lengths, config, window=8)
    assert after.values[0].dtype == jnp.bfloat16
    assert 0 < np.abs(rounded - wide).max() < 0.1


def test_insert_copies_rows_into_slots_and_nothing_else():
    config = sizes.TINY
    shape = (3, config.num_kv_heads, 5, config.head_dim)
    keys = tuple(jax.random.normal(jax.random.key(i), shape) for i in range(config.num_layers))
    values = tuple(-k for k in keys)
    empty = cache.init(config, SLOTS, LENGTH)
    filled = cache.insert(empty, keys, values, jnp.array([3, 0, SLOTS]), jnp.array([1, 1, 2]))
    for layer, source in zip((*filled.keys, *filled.values), (*keys, *values), strict=True):
        want = np.zeros(layer.shape, np.float32)
        want[[3, 0], :, :5] = source[1]
        np.testing.assert_array_equal(layer, want)
    with pytest.raises(ValueError, match="prefix of 5 positions does not fit a cache of 4"):
        cache.insert(cache.init(config, SLOTS, 4), keys, values, jnp.array([0]), jnp.array([0]))


def test_write_puts_one_position_and_drops_what_lies_outside():
    layer = jnp.zeros((3, 2, 4, 5))
    new = jax.random.normal(jax.random.key(0), (3, 2, 5))
    got = cache.write(layer, new, jnp.array([2, 0, 4]))
    want = np.zeros(layer.shape, np.float32)
    want[0, :, 2], want[1, :, 0] = new[0], new[1]
    np.testing.assert_array_equal(got, want)


def test_insert_and_decode_work_in_place():
    config = sizes.TINY
    flat = qwen3.unstack(random_params(config, 0.15), config)
    state = cache.init(config, SLOTS, LENGTH)
    before = sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state))
    keys, values = prefill(flat, jnp.zeros((1, 4), jnp.int32), config)
    slots = jnp.arange(SLOTS)
    state = insert(state, keys, values, slots, jnp.zeros(SLOTS, jnp.int32))
    _, state = decode(flat, jnp.zeros(SLOTS, jnp.int32), state, slots, config, window=8)
    assert sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)) == before
