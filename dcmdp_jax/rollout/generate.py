"""The slot loop: prompts in, a `Rollout` out, through an engine's prefill, bulk_insert and generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dcmdp_jax.records import Prompts, Rollout
from dcmdp_jax.stopping import Interrupted


MIN_FREE = 2  # idle slots worth stopping for, while completions wait


class Engine(Protocol):
    """What the loop asks of an engine (see `rollout.jetstream.Engine`)."""

    slots: int
    steps: int
    max_length: int
    stop_ids: tuple[int, ...]

    def prefill(self, *, params, padded_tokens, true_length): ...
    def bulk_insert(self, prefix, decode_state, slots, rows, keys, limit, temperature): ...
    def generate(self, params, decode_state, *, leave_at, window): ...
    def read(self, result): ...
    def init_decode_state(self): ...


def rollout(engine: Engine, params: Any, prompts: Prompts, *, samples: int, key: jax.Array, max_tokens: int,
            temperature: float, version: int = 0, asked: Callable[[], bool] = lambda: False) -> Rollout:
    """Samples `samples` completions of every prompt.

    Each completion has a key of its own, folded with the token's number at each token, so that its tokens depend on the
    weights, its prompt and `key` alone: not on slots, neighbours or the order of refilling. A prompt is prefilled once.

    Raises ValueError where a prompt leaves the engine no room for `max_tokens`, and `Interrupted` where `asked()` says so
    between two dispatches.
    """
    longest = int(prompts.lengths.max())
    if longest + max_tokens > engine.max_length:
        raise ValueError(f"a prompt of {longest} tokens and {max_tokens} new ones do not fit the engine's "
                         f"{engine.max_length} positions")
    count = len(prompts.lengths) * samples
    tokens, logp = np.zeros((count, max_tokens), np.int32), np.zeros((count, max_tokens), np.float32)
    lengths, stopped = np.zeros((count,), np.int32), np.zeros((count,), bool)
    keys = np.asarray(jax.random.bits(key, (count, 2), "uint32"))
    waiting = _Waiting(engine, params, prompts, samples)
    owner = np.full(engine.slots, -1)  # the completion a slot holds
    state = engine.init_decode_state()
    while waiting.remaining or (owner >= 0).any():
        if asked():
            raise Interrupted("stopped in a rollout")
        for prefix, rows, ids in waiting.take(int((owner < 0).sum())):
            free = np.flatnonzero(owner < 0)[:len(ids)]
            owner[free] = ids
            state = engine.bulk_insert(prefix, state, *_padded(free, rows, keys[ids], engine.slots), max_tokens, temperature)
        held = owner[owner >= 0]
        live = int((prompts.lengths[held // samples] + lengths[held]).max())
        leave_at = min(engine.slots - len(held) + MIN_FREE, engine.slots) if waiting.remaining else engine.slots
        state, result = engine.generate(params, state, leave_at=leave_at,
                                        window=_bucket(live + engine.steps, engine.max_length))
        token, new_logp, valid, active = engine.read(result)
        slot, column = np.nonzero(valid & (owner >= 0)[:, None])
        row, position = owner[slot], lengths[owner[slot]] + column
        tokens[row, position], logp[row, position] = token[slot, column], new_logp[slot, column]
        lengths[held] += valid[owner >= 0].sum(axis=1, dtype=np.int32)
        ended = (owner >= 0) & ~active
        stopped[owner[ended]] = np.isin(tokens[owner[ended], lengths[owner[ended]] - 1], engine.stop_ids)
        owner[ended] = -1
    return Rollout(prompts=prompts, tokens=tokens, lengths=lengths, rollout_logp=logp, stopped=stopped, version=version,
                   temperature=temperature)


class _Waiting:
    """Completions that have no slot yet, in order; prompts are prefilled a few at a time, each once."""

    def __init__(self, engine: Engine, params: Any, prompts: Prompts, samples: int):
        self.engine, self.params, self.prompts, self.samples = engine, params, prompts, samples
        self.started, self.prefilled, self.prefix = 0, 0, None

    @property
    def remaining(self) -> int:
        return len(self.prompts.lengths) * self.samples - self.started

    def take(self, free: int) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Up to `free` completions as (prefix, rows of it, completion ids)."""
        while free and self.remaining:
            if self.started == self.prefilled * self.samples:
                self._prefill(-(-free // self.samples))
            ids = np.arange(self.started, min(self.started + free, self.prefilled * self.samples))
            self.started, free = self.started + len(ids), free - len(ids)
            yield self.prefix, ids // self.samples - self.first, ids

    def _prefill(self, rows: int) -> None:
        self.first = self.prefilled
        chosen = slice(self.first, self.first + rows)
        lengths = self.prompts.lengths[chosen]
        tokens = self.prompts.tokens[chosen, :_bucket(int(lengths.max()), self.prompts.tokens.shape[1])]
        spare = _bucket(len(lengths), 1 << 30) - len(lengths)
        self.prefix = self.engine.prefill(
            params=self.params, padded_tokens=np.pad(tokens, ((0, spare), (0, 0))),
            true_length=np.pad(lengths, (0, spare), constant_values=1))
        self.prefilled += len(lengths)


def _padded(free: np.ndarray, rows: np.ndarray, keys: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts in slot number `slots`, which is dropped, fill up to a power of two, so that few sizes are compiled."""
    spare = _bucket(len(free), slots) - len(free)
    return np.pad(free, (0, spare), constant_values=slots), np.pad(rows, (0, spare)), np.pad(keys, ((0, spare), (0, 0)))


def _bucket(size: int, most: int) -> int:
    """The power of two at or over `size`, `most` at the most."""
    return min(1 << (size - 1).bit_length(), most)
