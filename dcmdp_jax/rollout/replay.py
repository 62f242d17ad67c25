"""The log-probs that an engine gives to tokens sampled before: teacher-forced decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import decoder
from dcmdp_jax.models.cache import Cache
from dcmdp_jax.records import Rollout, Weights
from dcmdp_jax.rollout.decode import DecodeState
from dcmdp_jax.rollout.generate import PREFILL_TOKENS
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.rollout.sampling import BLOCK


def replay(
    engine: Engine, weights: Weights, sampled: Rollout, order: np.ndarray | None = None
) -> np.ndarray:
    """Log-prob of every sampled token under softmax(logits / temperature), [N, T] float32 nats, 0
    past the length.

    The softmax runs over the whole vocabulary. Completions go through the engine's own prefill and
    insert and through its decode step, token by token, with the sampled token fed where the engine
    would have fed its draw: the engine and weights that sampled give `rollout_logp + log(support_mass)`, up
    to round-off.

    Args:
      order: [N] int32, a permutation (default: 0, 1, ...): the order in which completions take the
          engine's slots.
    """
    count, width = sampled.tokens.shape
    order = np.arange(count) if order is None else order
    out = np.zeros((count, width), np.float32)
    for first in range(0, count, engine.slots):
        ids = order[first : first + engine.slots]
        held = np.pad(ids, (0, engine.slots - len(ids)), mode="edge")  # one shape to compile
        out[ids] = _decode(engine, weights, sampled, held)[: len(ids)]
    return np.where(np.arange(width) < sampled.lengths[:, None], out, 0)


def _decode(engine: Engine, weights: Weights, sampled: Rollout, ids: np.ndarray) -> np.ndarray:
    """[slots, T]: completion `ids[b]` in slot b, `engine.steps` tokens a dispatch."""
    state = _start(engine, weights, sampled, ids)
    width = sampled.tokens.shape[1]
    steps = engine.steps
    asked = sampled.prompts.lengths[ids // _samples(sampled)]
    tokens = np.pad(sampled.tokens[ids], ((0, 0), (0, -width % steps)))
    out = []
    for at in range(0, int(sampled.lengths[ids].max()), steps):
        longest = int(asked[sampled.lengths[ids] > at].max()) + at + steps
        window = min(1 << (longest - 1).bit_length(), engine.max_length)
        state, logp = _feed(
            weights.params,
            state,
            tokens[:, at : at + steps].T,
            np.float32(sampled.sampling.temperature),
            config=engine.config,
            expert_shards=engine.expert_shards,
            window=window,
        )
        out.append(logp)
    logp = np.concatenate(jax.device_get(out)).T
    return np.pad(logp, ((0, 0), (0, max(width - logp.shape[1], 0))))[:, :width]


def _start(engine: Engine, weights: Weights, sampled: Rollout, ids: np.ndarray) -> DecodeState:
    """The engine's state with the prompt of completion `ids[b]` in slot b; each prompt is prefilled
    once.
    """
    prompts = sampled.prompts
    samples = _samples(sampled)
    state = engine.init_decode_state()
    owner = ids // samples
    asked = np.unique(owner)
    at_once = max(PREFILL_TOKENS // prompts.tokens.shape[1], 1)
    at_once = min(at_once, engine.slots // samples + 2, len(prompts.lengths))  # one size to compile
    for first in range(0, len(asked), at_once):
        rows = np.pad(
            asked[first : first + at_once], (0, max(first + at_once - len(asked), 0)), mode="edge"
        )
        prefix = engine.prefill(
            params=weights, padded_tokens=prompts.tokens[rows], true_length=prompts.lengths[rows]
        )
        slots = np.flatnonzero(np.isin(owner, rows))
        spare = (0, engine.slots - len(slots))
        row = np.pad(np.searchsorted(asked[first : first + at_once], owner[slots]), spare)
        # past the last slot nothing is inserted
        slots = np.pad(slots, spare, constant_values=engine.slots)
        state = engine.bulk_insert(
            prefix,
            state,
            slots,
            row,
            np.zeros((engine.slots, 2)),
            sampled.tokens.shape[1],
            sampled.sampling,
        )
    return state


def _samples(sampled: Rollout) -> int:
    return len(sampled.tokens) // len(sampled.prompts.lengths)


@partial(jax.jit, static_argnames=("config", "expert_shards", "window"), donate_argnums=1)
def _feed(
    params: Any,
    state: DecodeState,
    tokens: jax.Array,
    temperature: jax.Array,
    *,
    config: ModelConfig,
    expert_shards: int,
    window: int,
) -> tuple[DecodeState, jax.Array]:
    """Decode steps that are told what they sample: tokens [K, slots] -> log-probs [K, slots]."""

    def step(carry: tuple[Cache, jax.Array, jax.Array], token: jax.Array):
        cache, length, fed = carry
        hidden, cache, _ = decoder.decode(
            params, fed, cache, length, config, window=window, expert_shards=expert_shards
        )
        return (cache, length + 1, token), _logp(
            decoder.head(params, hidden, config), token, temperature
        )

    (cache, length, fed), logp = jax.lax.scan(
        step, (state.cache, state.length, state.token), tokens
    )
    return state._replace(cache=cache, length=length, token=fed), logp


def _logp(logits: jax.Array, token: jax.Array, temperature: jax.Array) -> jax.Array:
    """Log-prob of `token` [B] under logits [B, V], added up block by block as the sampler does, to
    round alike.
    """
    z = (logits - jnp.max(logits, axis=-1, keepdims=True)) * (1.0 / temperature)
    blocks = jnp.pad(z, ((0, 0), (0, -z.shape[-1] % BLOCK)), constant_values=-jnp.inf).reshape(
        z.shape[0], -1, BLOCK
    )
    total = jnp.sum(jnp.sum(jnp.exp(blocks), axis=-1), axis=-1)
    return jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - jnp.log(total)
