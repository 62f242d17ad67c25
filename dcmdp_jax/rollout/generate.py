"""The slot loop: prompts in, a `Rollout` out, through an engine's prefill, bulk_insert and
generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dcmdp_jax.records import NotFinite, Prompts, Rollout, Sampling, Weights
from dcmdp_jax.stopping import Interrupted

MIN_FREE = 2  # idle slots worth stopping for, while completions wait
PREFILL_TOKENS = 4096  # positions of one prefill, so that its activations are bounded
SMALLEST_BUCKET = 16  # prompt lengths are padded to powers of two from here on


class SlotEngine(Protocol):
    """What the loop asks of an engine (see `rollout.jetstream.Engine`)."""

    slots: int
    steps: int
    max_length: int
    stop_ids: tuple[int, ...]

    def prefill(self, *, params, padded_tokens, true_length): ...
    def bulk_insert(self, prefix, decode_state, slots, rows, keys, limit, sampling): ...
    def evict(self, decode_state, slots): ...
    def generate(self, params, decode_state, *, leave_at, window): ...
    def read(self, result): ...
    def init_decode_state(self): ...


def rollout(
    engine: SlotEngine,
    weights: Weights,
    prompts: Prompts,
    *,
    samples: int,
    key: jax.Array | np.ndarray,
    max_tokens: int | np.ndarray,
    first: int = 0,
    sampling: Sampling = Sampling(),
    stop_strings: tuple[str, ...] = (),
    decode: Callable[[Any], str] | None = None,
    asked: Callable[[], bool] = lambda: False,
    ended: Callable[[int, np.ndarray, bool], None] = lambda number, text, stopped: None,
) -> Rollout:
    """Samples `samples` completions of every prompt.

    Each completion has a key of its own, folded with the token's number at each token, so that its
    tokens depend on the weights, its prompt and `key` alone, up to round-off: not on slots,
    neighbours or the order of refilling. A prompt is prefilled once, together with others of its
    length bucket.

    Args:
      key: of all completions, or `completion_keys` of each, [N, 2].
      max_tokens: a bound for all, or one for each of the N completions.
      first: the number of the first completion in a larger batch, of which these prompts are a
          part; keys go by it.
      stop_strings: texts that end a completion, found by `decode` (token ids to text) after each
          dispatch. The token that
        completes one is the completion's last.
      asked: polled between dispatches.
      ended: called with each completion's number, the ids of its text and whether it stopped, as
          soon as it has ended.

    Raises ValueError where a prompt leaves the engine no room for `max_tokens`, and where a weight
    or a log-prob is not finite; `Interrupted` where `asked()` says so.
    """
    if stop_strings and (decode is None or not all(stop_strings)):
        raise ValueError("rollout: stop_strings need `decode`, and none may be empty")
    count = len(prompts.lengths) * samples
    limits = np.broadcast_to(np.asarray(max_tokens, np.int32), (count,))
    if limits.min() < 1:
        raise ValueError(
            f"rollout: max_tokens holds {limits.min()}; every completion gets at least one token"
        )
    longest = int((np.repeat(prompts.lengths, samples) + limits).max())
    if longest > engine.max_length:
        raise ValueError(
            f"a prompt and its new tokens take up to {longest} positions and do not fit the engine's "
            f"{engine.max_length}"
        )
    if not np.asarray(weights.finite):
        raise NotFinite(
            "the engine is given weights that hold NaN or an infinite number; take a "
            "checkpoint or a model folder from before, and a smaller learning rate"
        )
    out = _Completions(prompts, count, int(limits.max()), sampling)
    keys = key if isinstance(key, np.ndarray) else completion_keys(key, first + count)[first:]
    waiting = _Waiting(engine, weights, prompts, samples)
    owner = np.full(engine.slots, -1)  # the completion a slot holds
    state = engine.init_decode_state()
    while waiting.remaining or (owner >= 0).any():
        if asked():
            raise Interrupted("stopped in a rollout")
        for prefix, rows, ids in waiting.take(int((owner < 0).sum())):
            free = np.flatnonzero(owner < 0)[: len(ids)]
            owner[free] = ids
            state = engine.bulk_insert(
                prefix, state, *_padded(engine.slots, free, rows, keys[ids], limits[ids]), sampling
            )
        held = owner[owner >= 0]
        live = int((prompts.lengths[held // samples] + out.lengths[held]).max())
        leave_at = (
            min(engine.slots - len(held) + MIN_FREE, engine.slots)
            if waiting.remaining
            else engine.slots
        )
        state, result = engine.generate(
            weights, state, leave_at=leave_at, window=bucket(live + engine.steps, engine.max_length)
        )
        read = engine.read(result)
        out.add(owner, read)
        idle = (owner >= 0) & ~read.active
        out.end(owner[idle], engine.stop_ids)
        if stop_strings:
            found = [
                slot
                for slot in np.flatnonzero(owner >= 0)
                if out.cut(owner[slot], int(read.valid[slot].sum()), stop_strings, decode)
            ]
            state = engine.evict(state, found)
            idle[found] = True
        for i in owner[idle]:
            ended(int(i), out.tokens[i, : out.text_lengths[i]], bool(out.stopped[i]))
        owner[idle] = -1
    return out.record()


def completion_keys(key: jax.Array, count: int) -> np.ndarray:
    """A key for each of `count` completions, [count, 2] uint32; the first ones do not depend on
    `count`.
    """
    return np.asarray(jax.random.bits(key, (count, 2), "uint32"))


class _Completions:
    """Completions as they grow."""

    def __init__(self, prompts: Prompts, count: int, max_tokens: int, sampling: Sampling):
        self.prompts = prompts
        self.sampling = sampling
        shape = (count, max_tokens)
        self.tokens = np.zeros(shape, np.int32)
        self.version = np.zeros(shape, np.int32)
        self.rollout_logp = np.zeros(shape, np.float32)
        self.support_mass = np.zeros(shape, np.float32)
        self.lengths, self.text_lengths, self.stopped = (
            np.zeros((count,), dtype) for dtype in (np.int32, np.int32, bool)
        )
        self.experts = None

    def add(self, owner: np.ndarray, read: Any) -> None:
        """Appends each held slot's valid tokens to its completion."""
        valid = read.valid & (owner >= 0)[:, None]
        slot, column = np.nonzero(valid)
        place = owner[slot], self.lengths[owner[slot]] + column
        self.tokens[place] = read.drawn.token[slot, column]
        self.rollout_logp[place] = read.drawn.rollout_logp[slot, column]
        self.support_mass[place] = read.drawn.support_mass[slot, column]
        self.version[place] = read.version
        if read.experts.size:
            if self.experts is None:
                self.experts = np.full((*self.tokens.shape, *read.experts.shape[2:]), -1, np.int32)
            self.experts[place] = read.experts[slot, column]
        held = owner >= 0
        self.lengths[owner[held]] += valid[held].sum(axis=1, dtype=np.int32)
        self.text_lengths[owner[held]] = self.lengths[owner[held]]

    def end(self, ids: np.ndarray, stop_ids: tuple[int, ...]) -> None:
        """Completions `ids` have got their last token."""
        self.stopped[ids] = np.isin(self.tokens[ids, self.lengths[ids] - 1], stop_ids)
        self.text_lengths[ids] -= self.stopped[ids]

    def cut(
        self, i: int, new: int, stop_strings: tuple[str, ...], decode: Callable[[Any], str]
    ) -> bool:
        """Ends completion i at the first of its `new` last tokens whose text completes a stop
        string, if one does.
        """
        length = self.text_lengths[i]  # a stop token is no text
        # a token may be one byte of a character's four
        first = max(length - new - 4 * max(map(len, stop_strings)), 0)
        if not any(stop in decode(self.tokens[i, first:length]) for stop in stop_strings):
            return False
        end = next(
            end
            for end in range(length - new + 1, length + 1)
            if any(stop in decode(self.tokens[i, first:end]) for stop in stop_strings)
        )
        for array in (self.tokens, self.version, self.rollout_logp, self.support_mass):
            array[i, end:] = 0
        if self.experts is not None:
            self.experts[i, end:] = -1
        self.lengths[i] = self.text_lengths[i] = end
        self.stopped[i] = True
        return True

    def record(self) -> Rollout:
        return Rollout(
            prompts=self.prompts,
            tokens=self.tokens,
            lengths=self.lengths,
            text_lengths=self.text_lengths,
            rollout_logp=self.rollout_logp,
            support_mass=self.support_mass,
            stopped=self.stopped,
            version=self.version,
            sampling=self.sampling,
            experts=self.experts,
        )


class _Waiting:
    """Completions that have no slot yet, long prompts first; prompts of one length bucket are
    prefilled together, each once.
    """

    def __init__(self, engine: SlotEngine, weights: Weights, prompts: Prompts, samples: int):
        self.engine = engine
        self.weights = weights
        self.prompts = prompts
        self.samples = samples
        self.buckets = np.array(
            [bucket(max(int(n), SMALLEST_BUCKET), prompts.tokens.shape[1]) for n in prompts.lengths]
        )
        self.order = np.argsort(-self.buckets, kind="stable")
        self.started = 0
        self.prefilled = 0
        self.prefix = None

    @property
    def remaining(self) -> int:
        return len(self.prompts.lengths) * self.samples - self.started

    def take(self, free: int) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Up to `free` completions as (prefix, rows of it, completion ids)."""
        while free and self.remaining:
            if self.started == self.prefilled * self.samples:
                self._prefill()
            turn = np.arange(self.started, min(self.started + free, self.prefilled * self.samples))
            self.started = self.started + len(turn)
            free = free - len(turn)
            place = turn // self.samples
            yield (
                self.prefix,
                place - self.first,
                self.order[place] * self.samples + turn % self.samples,
            )

    def _prefill(self) -> None:
        self.first = self.prefilled
        width = self.buckets[self.order[self.prefilled]]
        rows = self.order[self.first : self.first + max(PREFILL_TOKENS // width, 1)]
        rows = rows[self.buckets[rows] == width]
        spare = bucket(len(rows), 1 << 30) - len(rows)
        self.prefix = self.engine.prefill(
            params=self.weights,
            padded_tokens=np.pad(self.prompts.tokens[rows, :width], ((0, spare), (0, 0))),
            true_length=np.pad(self.prompts.lengths[rows], (0, spare), constant_values=1),
        )
        self.prefilled += len(rows)


def _padded(slots: int, free: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Starts in slot number `slots`, which is dropped, fill up to a power of two, so that few sizes
    are compiled.
    """
    spare = bucket(len(free), slots) - len(free)
    rest = (np.pad(column, [(0, spare)] + [(0, 0)] * (column.ndim - 1)) for column in columns)
    return np.pad(free, (0, spare), constant_values=slots), *rest


def bucket(size: int, most: int) -> int:
    """The power of two at or over `size`, `most` at the most."""
    return min(1 << (size - 1).bit_length(), most)
