"""Teacher forcing through an engine: its log-probs of tokens that were sampled before."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from dcmdp_jax.models import decoder, inference
from dcmdp_jax.models.cache import Cache
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Rollout, Weights
from dcmdp_jax.rollout.decode import DecodeState
from dcmdp_jax.rollout.generate import PREFILL_TOKENS
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.rollout.sampling import log_prob


def replay(
    engine: Engine, weights: Weights, rollout: Rollout, order: np.ndarray | None = None
) -> np.ndarray:
    """Returns the log-prob of every sampled token under softmax(logits / temperature).

    [N, T] float32, nats, 0 past the length; the softmax runs over the full vocabulary. Completions
    go through the engine's own prefill, insert and decode step, token by token, with the sampled
    token fed where the engine would feed the one it draws. The engine and weights that sampled
    give `rollout_logp + log(support_mass)`, up to round-off.

    Args:
        order: [N] int32, a permutation (default: 0, 1, ...): the order in which completions take
            the engine's slots.
    """
    count, width = rollout.tokens.shape
    order = np.arange(count) if order is None else order
    out = np.zeros((count, width), np.float32)
    for start in range(0, count, engine.slots):
        ids = order[start : start + engine.slots]
        # padded to one shape
        padded_ids = np.pad(ids, (0, engine.slots - len(ids)), mode="edge")
        out[ids] = _replay_slots(engine, weights, rollout, padded_ids)[: len(ids)]
    return np.where(np.arange(width) < rollout.lengths[:, None], out, 0)


def _replay_slots(
    engine: Engine, weights: Weights, rollout: Rollout, ids: np.ndarray
) -> np.ndarray:
    """Returns the log-probs [slots, T] of completion `ids[b]` in slot b.

    Each dispatch feeds `engine.steps` tokens.
    """
    state = _start(engine, weights, rollout, ids)
    width = rollout.tokens.shape[1]
    steps = engine.steps
    prompt_lengths = rollout.prompts.lengths[ids // _samples(rollout)]
    tokens = np.pad(rollout.tokens[ids], ((0, 0), (0, -width % steps)))
    out = []
    for at in range(0, int(rollout.lengths[ids].max()), steps):
        longest = int(prompt_lengths[rollout.lengths[ids] > at].max()) + at + steps
        state, logp = _feed(
            weights.params,
            state,
            tokens[:, at : at + steps].T,
            np.float32(rollout.sampling.temperature),
            config=engine.config,
            mesh=engine.mesh,
            window=engine.window(longest),
        )
        out.append(logp)
    logp = np.concatenate(jax.device_get(out)).T
    return np.pad(logp, ((0, 0), (0, max(width - logp.shape[1], 0))))[:, :width]


def _start(engine: Engine, weights: Weights, rollout: Rollout, ids: np.ndarray) -> DecodeState:
    """Returns the engine's state with the prompt of completion `ids[b]` in slot b.

    Each prompt is prefilled once.
    """
    prompts = rollout.prompts
    samples = _samples(rollout)
    state = engine.init_decode_state()
    owner = ids // samples  # the prompt of each slot
    needed = np.unique(owner)
    # prompts of one prefill: one size to compile
    size = max(PREFILL_TOKENS // prompts.tokens.shape[1], 1)
    size = min(size, engine.slots // samples + 2, len(prompts.lengths))
    for start in range(0, len(needed), size):
        chunk = needed[start : start + size]
        rows = np.pad(chunk, (0, size - len(chunk)), mode="edge")
        prefix = engine.prefill(
            params=weights, padded_tokens=prompts.tokens[rows], true_length=prompts.lengths[rows]
        )
        slots = np.flatnonzero(np.isin(owner, chunk))
        padding = (0, engine.slots - len(slots))
        row = np.pad(np.searchsorted(chunk, owner[slots]), padding)
        # what is inserted past the last slot is dropped
        slots = np.pad(slots, padding, constant_values=engine.slots)
        state = engine.bulk_insert(
            prefix,
            state,
            slots,
            row,
            np.zeros((engine.slots, 2)),
            rollout.tokens.shape[1],
            rollout.sampling,
        )
    return state


def _samples(rollout: Rollout) -> int:
    return len(rollout.tokens) // len(rollout.prompts.lengths)


@partial(jax.jit, static_argnames=("config", "mesh", "window"), donate_argnums=1)
def _feed(
    params: Any,
    state: DecodeState,
    tokens: jax.Array,
    temperature: jax.Array,
    *,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    window: int,
) -> tuple[DecodeState, jax.Array]:
    """Decodes K steps that take `tokens` [K, slots] for their draws; log-probs are [K, slots]."""

    def step(carry: tuple[Cache, jax.Array, jax.Array], token: jax.Array):
        cache, length, fed = carry
        hidden, cache, _ = inference.decode(
            params, fed, cache, length, config, window=window, mesh=mesh
        )
        logits = decoder.head(params, hidden, config)
        return (cache, length + 1, token), log_prob(logits, token, temperature)

    (cache, length, fed), logp = jax.lax.scan(
        step, (state.cache, state.length, state.token), tokens
    )
    return state._replace(cache=cache, length=length, token=fed), logp
