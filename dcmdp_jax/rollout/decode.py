"""Pure prefill, insert and generate over a slotted KV cache.

A slot holds one sequence. Prefill has no head: it caches the prompt, and the first decode step
feeds the prompt's last token again, so sampling, log-probs and stopping exist in one place and one
prefix serves any number of samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import cache as kv
from dcmdp_jax.models import decoder
from dcmdp_jax.records import Sampling, Weights
from dcmdp_jax.rollout import sampling


class Prefix(NamedTuple):
    """Prompts that are cached but not yet in a slot."""

    keys: Any  # per layer [rows, KV, P, h]
    values: Any
    last: jax.Array  # [rows] int32, each prompt's last token
    lengths: jax.Array  # [rows] int32


class DecodeState(NamedTuple):
    """Every slot's sequence; B slots."""

    cache: kv.Cache
    length: jax.Array  # [B] int32, the position `token` will be written to
    token: jax.Array  # [B] int32, fed next
    generated: jax.Array  # [B] int32, tokens sampled
    limit: jax.Array  # [B] int32, tokens to sample at most
    active: jax.Array  # [B] bool
    key: jax.Array  # [B, 2] uint32, the request's
    sampling: Sampling  # [B] each


class Step(NamedTuple):
    """What one decode step samples."""

    drawn: sampling.Drawn  # [B] each
    # [B, sparse layers, k] int32: the experts that made the distribution; [B, 0, 0] unless recorded
    experts: jax.Array
    valid: jax.Array  # [B] bool


class Tokens(NamedTuple):
    """What K decode steps sampled, on the device or, as NumPy arrays, on the host."""

    drawn: sampling.Drawn  # [B, K] each
    experts: Any  # [B, K, sparse layers, k] int32; [B, K, 0, 0] unless recorded
    valid: Any  # [B, K] bool: the slot was active
    generated: Any  # [B] int32, tokens sampled so far in the slot's sequence
    active: Any  # [B] bool: the slot's sequence goes on
    version: Any  # [] int32, of the weights


def init_state(config: ModelConfig, slots: int, length: int, cache: str) -> DecodeState:
    """Empty slots with room for `length` positions each; `cache` as in `config.Precision`."""
    zero = jnp.zeros((slots,), jnp.int32)
    one = jnp.ones((slots,), jnp.float32)
    return DecodeState(
        cache=kv.init(config, slots, length, cache),
        length=zero,
        token=zero,
        generated=zero,
        limit=zero,
        active=jnp.zeros((slots,), bool),
        key=jnp.zeros((slots, 2), jnp.uint32),
        sampling=Sampling(temperature=one, top_k=zero, top_p=one, min_p=jnp.zeros_like(one)),
    )


def prefill(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: ModelConfig,
    expert_shards: int = 0,
) -> Prefix:
    """Caches prompts `tokens` [rows, P], padded on the right, of true `lengths` [rows] >= 1.

    `expert_shards` as in `decoder.prefill`.
    """
    keys, values = decoder.prefill(params, tokens, config, expert_shards=expert_shards)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return Prefix(keys, values, last, lengths)


def insert(
    state: DecodeState,
    prefix: Prefix,
    slots: jax.Array,
    rows: jax.Array,
    keys: jax.Array,
    limit: jax.Array,
    how: Sampling,
    *,
    positions: int,
) -> DecodeState:
    """Starts sequence g in slot `slots[g]` from prompt `rows[g]`, to end after `limit[g]` tokens or
    with the slot's `positions`.

    Args:
      slots: [g] int32, different; a number past the last slot is dropped.
      rows: [g] int32; keys: [g, 2] uint32, the requests' own.
      limit: [g] int32; how: fields [g].
    """

    def put(old, new):
        return old.at[slots].set(new, mode="drop")

    length = prefix.lengths[rows]
    return state._replace(
        cache=kv.insert(state.cache, prefix.keys, prefix.values, slots, rows),
        length=put(state.length, length - 1),
        token=put(state.token, prefix.last[rows]),
        generated=put(state.generated, 0),
        limit=put(state.limit, jnp.minimum(limit, positions - length)),
        active=put(state.active, True),
        key=put(state.key, keys),
        sampling=jax.tree.map(put, state.sampling, how),
    )


def evict(state: DecodeState, slots: jax.Array) -> DecodeState:
    """Ends the sequences in `slots` [g] at once; a number past the last slot is dropped."""
    return state._replace(active=state.active.at[slots].set(False, mode="drop"))


def generate(
    weights: Weights,
    state: DecodeState,
    leave_at: jax.Array,
    *,
    config: ModelConfig,
    stop_ids: tuple[int, ...],
    steps: int,
    window: int,
    record_experts: bool,
    expert_shards: int = 0,
    apart: bool = False,
) -> tuple[DecodeState, Tokens]:
    """Samples up to `steps` tokens in every active slot.

    Leaves early when at least `leave_at` slots are idle (so that they can be refilled) or none is
    active. `window` is a
    static bound on the live lengths: attention reads that much of the cache and no more. With
        `apart` the steps work in a
    copy of the window: the same numbers, for more memory.
    """
    slots = state.token.shape[0]

    def running(carry):
        step, state, _ = carry
        idle = slots - jnp.sum(state.active)
        return (step < steps) & (idle < jnp.maximum(leave_at, 1)) | (step == 0)

    def step_at(carry):
        step, state, out = carry
        state, new = _decode_step(
            weights.params, state, config, stop_ids, window, record_experts, expert_shards
        )
        return (
            step + 1,
            state,
            jax.tree.map(lambda columns, column: columns.at[:, step].set(column), out, new),
        )

    whole = state.cache
    if apart:
        state = state._replace(cache=kv.prefix(whole, window))
    _, shapes = jax.eval_shape(
        lambda: _decode_step(
            weights.params, state, config, stop_ids, window, record_experts, expert_shards
        )
    )
    empty = jax.tree.map(
        lambda column: jnp.zeros((slots, steps, *column.shape[1:]), column.dtype), shapes
    )
    _, state, out = jax.lax.while_loop(running, step_at, (0, state, empty))
    if apart:
        state = state._replace(cache=kv.restore_prefix(whole, state.cache))
    return state, Tokens(*out, state.generated, state.active, weights.version)


def _decode_step(
    params: Any,
    state: DecodeState,
    config: ModelConfig,
    stop_ids: tuple[int, ...],
    window: int,
    record_experts: bool,
    expert_shards: int,
) -> tuple[DecodeState, Step]:
    hidden, cache, experts = decoder.decode(
        params,
        state.token,
        state.cache,
        state.length,
        config,
        window=window,
        live=state.active,
        expert_shards=expert_shards,
    )
    request = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.key_data(jax.vmap(jax.random.fold_in)(request, state.generated))
    drawn = sampling.sample(decoder.head(params, hidden, config), key, state.sampling)
    valid = state.active
    generated = state.generated + valid
    stopped = (
        jnp.isin(drawn.token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(valid)
    )
    state = state._replace(
        cache=cache,
        length=state.length + valid,
        token=jnp.where(valid, drawn.token, state.token),
        generated=generated,
        active=valid & ~stopped & (generated < state.limit),
    )
    return state, Step(drawn, experts if record_experts else experts[:, :0, :0], valid)
