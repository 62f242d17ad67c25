"""Pure prefill, insert and generate over a slotted KV cache.

A slot holds one sequence. Prefill has no head: it caches the prompt, and the first decode step feeds the prompt's last token
again, so sampling, log-probs and stopping exist in one place and one prefix serves any number of samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import cache as kv
from dcmdp_jax.models import qwen3
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
    temperature: jax.Array  # [B] float32


class Tokens(NamedTuple):
    """What K decode steps sampled, K columns a slot."""

    token: jax.Array  # [B, K] int32
    logp: jax.Array  # [B, K] float32
    valid: jax.Array  # [B, K] bool
    generated: jax.Array  # [B] int32, sampled so far in the slot's sequence
    active: jax.Array  # [B] bool


def init_state(config: ModelConfig, slots: int, length: int, dtype: Any) -> DecodeState:
    """Empty slots with room for `length` positions each."""
    zero = jnp.zeros((slots,), jnp.int32)
    return DecodeState(
        cache=kv.init(config, slots, length, dtype), length=zero, token=zero, generated=zero, limit=zero,
        active=jnp.zeros((slots,), bool), key=jnp.zeros((slots, 2), jnp.uint32), temperature=jnp.ones((slots,), jnp.float32))


def prefill(params: Any, tokens: jax.Array, lengths: jax.Array, config: ModelConfig) -> Prefix:
    """Caches prompts `tokens` [rows, P], padded on the right, of true `lengths` [rows] >= 1."""
    keys, values = qwen3.prefill(params, tokens, config)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return Prefix(keys, values, last, lengths)


def insert(state: DecodeState, prefix: Prefix, slots: jax.Array, rows: jax.Array, keys: jax.Array, limit: jax.Array,
           temperature: jax.Array) -> DecodeState:
    """Starts sequence g in slot `slots[g]` from prompt `rows[g]`, to end after `limit` tokens or with the slot's positions.

    Args:
      slots: [g] int32, different; a number past the last slot is dropped.
      rows: [g] int32; keys: [g, 2] uint32, the requests' own.
      limit: [] int32; temperature: [] float32.
    """
    length = prefix.lengths[rows]
    start = {"length": length - 1, "token": prefix.last[rows], "generated": 0, "active": True, "key": keys,
             "limit": jnp.minimum(limit, state.cache.keys[0].shape[2] - length), "temperature": temperature}
    started = {name: getattr(state, name).at[slots].set(value, mode="drop") for name, value in start.items()}
    return state._replace(cache=kv.insert(state.cache, prefix.keys, prefix.values, slots, rows), **started)


def generate(params: Any, state: DecodeState, leave_at: jax.Array, *, config: ModelConfig, stop_ids: tuple[int, ...],
             steps: int, window: int) -> tuple[DecodeState, Tokens]:
    """Samples up to `steps` tokens in every active slot.

    Leaves early when at least `leave_at` slots are idle (so that they can be refilled) or none is active. `window` is a
    static bound on the live lengths: attention reads that much of the cache and no more.
    """
    slots = state.token.shape[0]

    def running(carry):
        step, state, _ = carry
        idle = slots - jnp.sum(state.active)
        return (step < steps) & (idle < jnp.maximum(leave_at, 1)) | (step == 0)

    def body(carry):
        step, state, out = carry
        state, token, logp, valid = _decode_step(params, state, config, stop_ids, window)
        return step + 1, state, out._replace(
            token=out.token.at[:, step].set(token), logp=out.logp.at[:, step].set(logp), valid=out.valid.at[:, step].set(valid))

    empty = Tokens(jnp.zeros((slots, steps), jnp.int32), jnp.zeros((slots, steps), jnp.float32),
                   jnp.zeros((slots, steps), bool), state.generated, state.active)
    _, state, out = jax.lax.while_loop(running, body, (0, state, empty))
    return state, out._replace(generated=state.generated, active=state.active)


def _decode_step(params: Any, state: DecodeState, config: ModelConfig, stop_ids: tuple[int, ...], window: int):
    hidden, cache = qwen3.decode(params, state.token, state.cache, state.length, config, window=window)
    request = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.key_data(jax.vmap(jax.random.fold_in)(request, state.generated))
    token, logp = sampling.sample(qwen3.head(params, hidden, config), key, state.temperature)
    valid = state.active
    generated = state.generated + valid
    stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(valid)
    return state._replace(
        cache=cache, length=jnp.where(valid, state.length + 1, state.length), token=jnp.where(valid, token, state.token),
        generated=generated, active=valid & ~stopped & (generated < state.limit)), token, logp, valid
