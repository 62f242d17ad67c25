"""Pure prefill, insert and generate over a slotted KV cache.

A slot holds one sequence. Prefill has no head: it caches the prompt, and the first decode step
feeds the prompt's last token again, so sampling, log-probs and stopping exist in one place and one
prefix serves any number of samples.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.models import cache as kv
from dcmdp_jax.models import decoder, inference
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling, Weights
from dcmdp_jax.rollout.sampling import Drawn, Top, sample, top


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
    limit: jax.Array  # [B] int32, most tokens to sample
    active: jax.Array  # [B] bool
    key: jax.Array  # [B, 2] uint32, the request's
    sampling: Sampling  # [B] each


class Step(NamedTuple):
    """What one decode step samples."""

    drawn: Drawn  # [B] each
    # [B, sparse layers, k] int32: the experts that made the distribution; [B, 0, 0] unless recorded
    experts: jax.Array
    valid: jax.Array  # [B] bool
    top: Top | None  # [B, k] each, unless k is 0


class Tokens(NamedTuple):
    """What K decode steps sampled, on the device or, as NumPy arrays, on the host."""

    drawn: Drawn  # [B, K] each
    experts: Any  # [B, K, sparse layers, k] int32; [B, K, 0, 0] unless recorded
    valid: Any  # [B, K] bool: the slot was active
    generated: Any  # [B] int32, tokens sampled so far in the slot's sequence
    active: Any  # [B] bool: the slot's sequence goes on
    version: Any  # [] int32, of the weights
    top: Top | None = None  # [B, K, k] each, unless k is 0


def init_state(config: ModelConfig, slots: int, length: int, cache: str) -> DecodeState:
    """Returns empty slots of `length` positions each; `cache` is as in `config.Precision`."""
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
    mesh: jax.sharding.Mesh | None = None,
) -> Prefix:
    """Caches prompts `tokens` [rows, P], padded on the right, of `lengths` [rows] >= 1.

    `mesh` as in `inference.prefill`.
    """
    keys, values = inference.prefill(params, tokens, config, mesh=mesh)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return Prefix(keys, values, last, lengths)


def insert(
    state: DecodeState,
    prefix: Prefix,
    slots: jax.Array,
    rows: jax.Array,
    keys: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    *,
    positions: int,
) -> DecodeState:
    """Starts g sequences: number i in slot `slots[i]`, from prompt `rows[i]` of `prefix`.

    A sequence ends after `limit[i]` tokens, or when it fills the slot's `positions`.

    Args:
        slots: [g] int32, all different; a number past the last slot is dropped.
        rows: [g] int32.
        keys: [g, 2] uint32, one per request.
        limit: [g] int32.
        sampling: fields [g].
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
        sampling=jax.tree.map(put, state.sampling, sampling),
    )


def evict(state: DecodeState, slots: jax.Array) -> DecodeState:
    """Ends the sequences in `slots` [g]; a number past the last slot is dropped."""
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
    top_logprobs: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    copy_window: bool = False,
) -> tuple[DecodeState, Tokens]:
    """Samples up to `steps` tokens in every active slot.

    Args:
        leave_at: [] int32. The loop ends early when this many slots are idle, so that they can be
            refilled, or when all are.
        stop_ids: tokens that end a sequence.
        window: a bound on the lengths of all sequences after the last step, the positions of the
            cache that attention reads at most.
        record_experts: return the experts of each token.
        top_logprobs: k, the likeliest tokens to return at each place.
        mesh: as in `inference.decode`.
        copy_window: decode in a copy of the first `window` positions of the cache. Results are
            equal; it is faster on a CPU and takes more memory.
    """
    slots = state.token.shape[0]
    cache = state.cache
    if copy_window:
        state = state._replace(cache=kv.prefix(cache, window))
    step_once = partial(
        _decode_step,
        weights.params,
        config=config,
        stop_ids=stop_ids,
        window=window,
        record_experts=record_experts,
        top_logprobs=top_logprobs,
        mesh=mesh,
    )

    def goes_on(carry):
        step, state, _ = carry
        idle = slots - jnp.sum(state.active)
        return (step < steps) & (idle < jnp.maximum(leave_at, 1)) | (step == 0)

    def body(carry):
        step, state, out = carry
        state, new = step_once(state)
        out = jax.tree.map(lambda columns, column: columns.at[:, step].set(column), out, new)
        return step + 1, state, out

    _, shapes = jax.eval_shape(step_once, state)
    empty = jax.tree.map(
        lambda column: jnp.zeros((slots, steps, *column.shape[1:]), column.dtype), shapes
    )
    _, state, out = jax.lax.while_loop(goes_on, body, (0, state, empty))
    if copy_window:
        state = state._replace(cache=kv.restore_prefix(cache, state.cache))
    return state, Tokens(
        out.drawn,
        out.experts,
        out.valid,
        state.generated,
        state.active,
        weights.version,
        out.top,
    )


def generate_few(
    weights: Weights,
    state: DecodeState,
    slots: jax.Array,
    leave_at: jax.Array,
    *,
    window: int,
    **options: Any,
) -> tuple[DecodeState, Tokens]:
    """`generate` where all but a few slots are idle, at the cost of those few.

    Args:
        slots: [n] int32, all different; every other slot is idle.
        leave_at: [] int32, more than the number of other slots; see `generate`.
        window: see `generate`.
        options: the others of `generate`, without `copy_window`: it decodes in a copy.
    """
    count = state.token.shape[0]
    part = jax.tree.map(lambda column: column[slots], state._replace(cache=None))
    part = part._replace(cache=kv.prefix(state.cache, window, slots))
    others = count - slots.shape[0]
    part, few = generate(weights, part, leave_at - others, window=window, **options)

    def put(old, new):
        return old.at[slots].set(new, unique_indices=True)

    cache = kv.restore_prefix(state.cache, part.cache, slots)
    state = jax.tree.map(put, state._replace(cache=None), part._replace(cache=None))
    state = state._replace(cache=cache)
    drawn, experts, valid, likeliest = jax.tree.map(
        lambda new: put(jnp.zeros((count, *new.shape[1:]), new.dtype), new),
        (few.drawn, few.experts, few.valid, few.top),
    )
    return state, Tokens(
        drawn, experts, valid, state.generated, state.active, few.version, likeliest
    )


def _decode_step(
    params: Any,
    state: DecodeState,
    *,
    config: ModelConfig,
    stop_ids: tuple[int, ...],
    window: int,
    record_experts: bool,
    top_logprobs: int,
    mesh: jax.sharding.Mesh | None,
) -> tuple[DecodeState, Step]:
    hidden, cache, experts = inference.decode(
        params,
        state.token,
        state.cache,
        state.length,
        config,
        window=window,
        active=state.active,
        mesh=mesh,
    )
    request = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.key_data(jax.vmap(jax.random.fold_in)(request, state.generated))
    logits = decoder.head(params, hidden, config)
    drawn = sample(logits, key, state.sampling)
    likeliest = top(logits, state.sampling.temperature, top_logprobs) if top_logprobs else None
    valid = state.active
    generated = state.generated + valid
    stopped = jnp.isin(drawn.token, jnp.array(stop_ids, jnp.int32))
    state = state._replace(
        cache=cache,
        length=state.length + valid,
        token=jnp.where(valid, drawn.token, state.token),
        generated=generated,
        active=valid & ~stopped & (generated < state.limit),
    )
    if not record_experts:
        experts = experts[:, :0, :0]
    return state, Step(drawn, experts, valid, likeliest)
