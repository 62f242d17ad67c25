"""The slot loop: prompts in, a `Rollout` out, through an engine's prefill, bulk_insert and
generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from dcmdp_jax.records import NotFinite, Prompts, Rollout, Sampling, Weights
from dcmdp_jax.rollout.decode import DecodeState, Prefix, Tokens
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens.packing import power_of_two

MIN_FREE = 2  # a dispatch ends once so many slots have become idle, if completions wait
PREFILL_TOKENS = 4096  # most positions of one prefill; they determine the size of its activations
SMALLEST_BUCKET = 16  # prompts are padded to powers of two of at least this length


class SlotEngine(Protocol):
    """What the loop needs of an engine; `rollout.jetstream.Engine` is one."""

    slots: int  # sequences decoded together
    few: int  # so many occupied slots, or fewer, cost less than all; 0 where they do not
    steps: int  # tokens per dispatch
    max_length: int  # positions of a slot
    stop_ids: tuple[int, ...]

    def init_decode_state(self) -> DecodeState:
        """Returns empty slots."""
        ...

    def prefill(self, *, params: Weights, padded_tokens: Any, true_length: Any) -> Prefix:
        """Caches prompts, [rows, P] padded on the right, of [rows] lengths."""
        ...

    def bulk_insert(
        self,
        prefix: Prefix,
        decode_state: DecodeState,
        slots: Any,
        rows: Any,
        keys: Any,
        limit: Any,
        sampling: Sampling,
    ) -> DecodeState:
        """Starts sequences in `slots` from `rows` of the prefix; see `decode.insert`."""
        ...

    def evict(self, decode_state: DecodeState, slots: Any) -> DecodeState:
        """Ends the sequences in `slots`."""
        ...

    def generate(
        self,
        params: Weights,
        decode_state: DecodeState,
        *,
        leave_at: int,
        window: int,
        occupied: Any,
    ) -> tuple[DecodeState, Any]:
        """Samples up to `steps` tokens in every active slot; see `decode.generate`. `occupied`
        holds the numbers of all slots that may be active.
        """
        ...

    def read(self, result: Any) -> Tokens:
        """Returns on the host what `generate` sampled."""
        ...


def rollout(
    engine: SlotEngine,
    weights: Weights,
    prompts: Prompts,
    *,
    samples: int,
    key: jax.Array | np.ndarray,
    max_tokens: int | np.ndarray,
    sampling: Sampling = Sampling(),
    stop_strings: tuple[str, ...] = (),
    decode: Callable[[Any], str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_end: Callable[[int, np.ndarray, bool], None] = lambda index, text_ids, stopped: None,
    prefill_tokens: int = PREFILL_TOKENS,
    smallest_bucket: int = SMALLEST_BUCKET,
) -> Rollout:
    """Samples `samples` completions of every prompt.

    Each completion has a key of its own, which is folded with the token's number at each token.
    Its tokens thus depend on the weights, its prompt and its key alone, up to round-off: not on
    slots, neighbours or the order of refilling. A prompt is prefilled once, together with others of
    its length bucket.

    Args:
        key: one key for all completions, or `completion_keys` of each, [N, 2].
        max_tokens: one bound, or one for each of the N completions.
        stop_strings: texts that end a completion. They are searched for after each dispatch in what
            `decode` makes of its token ids; the token that completes one is the completion's last.
        should_stop: polled between dispatches.
        on_end: called with a completion's index, the ids of its text and whether it stopped, as
            soon as it has ended.
        prefill_tokens: positions of one prefill at most.
        smallest_bucket: the smallest length that prompts are padded to.

    Raises ValueError if a prompt leaves the engine no room for `max_tokens` or a log-prob is not
    finite; `NotFinite` if a weight is not; `Interrupted` if `should_stop()`.
    """
    if stop_strings and (decode is None or not all(stop_strings)):
        raise ValueError("rollout: stop_strings need `decode`, and none may be empty")
    count = len(prompts.lengths) * samples
    limits = np.broadcast_to(np.asarray(max_tokens, np.int32), (count,))
    _check_limits(engine, np.repeat(prompts.lengths, samples), limits)
    check_finite(weights)
    keys = key if isinstance(key, np.ndarray) else completion_keys(key, count)
    out = _Completions(prompts, count, int(limits.max()), sampling)
    waiting = _Waiting(engine, weights, prompts, samples, prefill_tokens, smallest_bucket)
    owner = np.full(engine.slots, -1)  # the completion that a slot holds, -1: none
    state = engine.init_decode_state()
    while waiting.remaining or (owner >= 0).any():
        if should_stop():
            raise Interrupted("stopped in a rollout")

        # fill the free slots
        for prefix, rows, ids in waiting.take(int((owner < 0).sum())):
            free = np.flatnonzero(owner < 0)[: len(ids)]
            owner[free] = ids
            columns = _pad_starts(engine.slots, free, rows, keys[ids], limits[ids])
            state = engine.bulk_insert(prefix, state, *columns, sampling)

        # decode up to K tokens in each
        occupied = np.flatnonzero(owner >= 0)
        running = owner[occupied]
        longest = int((prompts.lengths[running // samples] + out.lengths[running]).max())
        leave_at = idle_to_leave_at(engine, len(running), bool(waiting.remaining))
        window = power_of_two(longest + engine.steps, engine.max_length)
        state, result = engine.generate(
            weights, state, leave_at=leave_at, window=window, occupied=occupied
        )
        tokens = engine.read(result)
        out.append(owner, tokens)

        # take the completions that have ended out of their slots
        has_ended, cut = out.end(owner, tokens, engine.stop_ids, stop_strings, decode)
        if cut:
            state = engine.evict(state, cut)
        for i in owner[has_ended]:
            on_end(int(i), out.tokens[i, : out.text_lengths[i]], bool(out.stopped[i]))
        owner[has_ended] = -1
    return out.to_rollout()


def idle_to_leave_at(engine: SlotEngine, running: int, more_wait: bool) -> int:
    """Returns how many idle slots end a dispatch that starts with `running` occupied ones."""
    if more_wait:
        return min(engine.slots - running + MIN_FREE, engine.slots)
    return engine.slots - engine.few if running > engine.few else engine.slots


def check_finite(weights: Weights) -> None:
    """Raises NotFinite if a parameter that `weights` were made from is NaN or infinite."""
    if not np.asarray(weights.finite):
        raise NotFinite(
            "the engine is given weights that hold NaN or an infinite number; take a "
            "checkpoint or a model folder from before, and a smaller learning rate"
        )


def _check_limits(engine: SlotEngine, prompt_lengths: np.ndarray, limits: np.ndarray) -> None:
    if limits.min() < 1:
        raise ValueError(
            f"rollout: max_tokens holds {limits.min()}; every completion gets at least one token"
        )
    longest = int((prompt_lengths + limits).max())
    if longest > engine.max_length:
        raise ValueError(
            f"a prompt and its new tokens take up to {longest} positions and do not fit the "
            f"engine's {engine.max_length}"
        )


def completion_keys(key: jax.Array, count: int, offset: int = 0) -> np.ndarray:
    """Returns a key for each of `count` completions from number `offset` on, [count, 2] uint32.

    The key of completion i depends on `key` and i alone. For a `count`, one program makes the keys
    of every `offset`.
    """
    return np.asarray(_fold_in_each(key, np.arange(offset, offset + count).astype(np.uint32)))


@jax.jit
def _fold_in_each(key: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers))


class _Completions:
    """Completions as they grow."""

    def __init__(self, prompts: Prompts, count: int, max_tokens: int, sampling: Sampling):
        shape = (count, max_tokens)
        self.prompts = prompts
        self.sampling = sampling
        self.tokens = np.zeros(shape, np.int32)
        self.version = np.zeros(shape, np.int32)
        self.rollout_logp = np.zeros(shape, np.float32)
        self.support_mass = np.zeros(shape, np.float32)
        self.experts: np.ndarray | None = None
        self.top_tokens: np.ndarray | None = None
        self.top_logp: np.ndarray | None = None
        self.lengths = np.zeros(count, np.int32)
        self.text_lengths = np.zeros(count, np.int32)
        self.stopped = np.zeros(count, bool)

    def append(self, owner: np.ndarray, new: Tokens) -> None:
        """Appends each slot's valid tokens to the completion that owns the slot."""
        occupied = owner >= 0
        valid = new.valid & occupied[:, None]
        slot, column = np.nonzero(valid)
        place = owner[slot], self.lengths[owner[slot]] + column
        self.tokens[place] = new.drawn.token[slot, column]
        self.rollout_logp[place] = new.drawn.rollout_logp[slot, column]
        self.support_mass[place] = new.drawn.support_mass[slot, column]
        self.version[place] = new.version
        if new.experts.size:
            if self.experts is None:
                self.experts = np.full((*self.tokens.shape, *new.experts.shape[2:]), -1, np.int32)
            self.experts[place] = new.experts[slot, column]
        if new.top is not None:
            if self.top_tokens is None:
                shape = (*self.tokens.shape, new.top.token.shape[-1])
                self.top_tokens = np.zeros(shape, np.int32)
                self.top_logp = np.full(shape, -np.inf, np.float32)
            self.top_tokens[place] = new.top.token[slot, column]
            self.top_logp[place] = new.top.logp[slot, column]
        self.lengths[owner[occupied]] += valid[occupied].sum(axis=1, dtype=np.int32)
        self.text_lengths[owner[occupied]] = self.lengths[owner[occupied]]

    def end(
        self,
        owner: np.ndarray,
        new: Tokens,
        stop_ids: Sequence[int],
        stop_strings: tuple[str, ...],
        decode: Callable[[Any], str] | None,
    ) -> tuple[np.ndarray, list[int]]:
        """Ends the completions whose last token is among `new`, which `append` has appended.

        Returns whether each slot's completion has ended, [slots], and the slots of those that a
        stop string ended: the engine does not know, and is to evict them.
        """
        has_ended = (owner >= 0) & ~new.active
        ids = owner[has_ended]
        self.stopped[ids] = np.isin(self.tokens[ids, self.lengths[ids] - 1], stop_ids)
        self.text_lengths[ids] -= self.stopped[ids]
        if not stop_strings:
            return has_ended, []
        count = new.valid.sum(axis=1)
        cut = [
            slot
            for slot in np.flatnonzero(owner >= 0)
            if self._cut_at_stop_string(owner[slot], int(count[slot]), stop_strings, decode)
        ]
        has_ended[cut] = True
        return has_ended, cut

    def _cut_at_stop_string(
        self, i: int, new: int, stop_strings: tuple[str, ...], decode: Callable[[Any], str]
    ) -> bool:
        """Ends completion i at the first of its `new` last tokens that completes a stop string.

        Returns True if there is one.
        """
        length = self.text_lengths[i]  # without a stop token
        # a character may be four tokens, of a byte each
        start = max(length - new - 4 * max(map(len, stop_strings)), 0)

        def contains_stop_string(end: int) -> bool:
            text = decode(self.tokens[i, start:end])
            return any(stop_string in text for stop_string in stop_strings)

        if not contains_stop_string(length):
            return False
        end = next(n for n in range(length - new + 1, length + 1) if contains_stop_string(n))
        for array in (self.tokens, self.version, self.rollout_logp, self.support_mass):
            array[i, end:] = 0
        if self.experts is not None:
            self.experts[i, end:] = -1
        if self.top_tokens is not None:
            self.top_tokens[i, end:] = 0
            self.top_logp[i, end:] = -np.inf
        self.lengths[i] = end
        self.text_lengths[i] = end
        self.stopped[i] = True
        return True

    def to_rollout(self) -> Rollout:
        return Rollout(
            prompts=self.prompts,
            tokens=self.tokens,
            lengths=self.lengths,
            text_lengths=self.text_lengths,
            rollout_logp=self.rollout_logp,
            stopped=self.stopped,
            version=self.version,
            sampling=self.sampling,
            support_mass=self.support_mass,
            experts=self.experts,
            top_tokens=self.top_tokens,
            top_logp=self.top_logp,
        )


class _Waiting:
    """Completions that have no slot yet, those of long prompts first.

    Prompts of one length bucket are prefilled together, each once.
    """

    def __init__(
        self,
        engine: SlotEngine,
        weights: Weights,
        prompts: Prompts,
        samples: int,
        prefill_tokens: int,
        smallest_bucket: int,
    ):
        self.engine = engine
        self.weights = weights
        self.prompts = prompts
        self.samples = samples
        self.prefill_tokens = prefill_tokens
        width = prompts.tokens.shape[1]
        self.buckets = np.array(
            [power_of_two(max(int(n), smallest_bucket), width) for n in prompts.lengths]
        )
        self.order = np.argsort(-self.buckets, kind="stable")  # of prompts
        self.started = 0  # completions that have had a slot
        self.prefilled = 0  # prompts, in `order`
        self.prefix: Prefix | None = None  # the last prompts that were prefilled
        self.prefix_start = 0  # place in `order` of the prefix's first prompt

    @property
    def remaining(self) -> int:
        return len(self.prompts.lengths) * self.samples - self.started

    def take(self, free: int) -> Iterator[tuple[Prefix, np.ndarray, np.ndarray]]:
        """Yields up to `free` completions as (prefix, rows of it, completion ids)."""
        while free and self.remaining:
            if self.started == self.prefilled * self.samples:
                self._prefill()
            end = min(self.started + free, self.prefilled * self.samples)
            places = np.arange(self.started, end)
            self.started = end
            free -= len(places)
            prompt = places // self.samples  # in `order`
            ids = self.order[prompt] * self.samples + places % self.samples
            yield self.prefix, prompt - self.prefix_start, ids

    def _prefill(self) -> None:
        width = self.buckets[self.order[self.prefilled]]
        most = max(self.prefill_tokens // width, 1)
        rows = self.order[self.prefilled : self.prefilled + most]
        rows = rows[self.buckets[rows] == width]
        padding = power_of_two(len(rows), 1 << 30) - len(rows)
        self.prefix = self.engine.prefill(
            params=self.weights,
            padded_tokens=np.pad(self.prompts.tokens[rows, :width], ((0, padding), (0, 0))),
            true_length=np.pad(self.prompts.lengths[rows], (0, padding), constant_values=1),
        )
        self.prefix_start = self.prefilled
        self.prefilled += len(rows)


def _pad_starts(slots: int, free: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pads to a power of two with starts in slot number `slots`, which is dropped, so that few
    sizes are compiled.
    """
    padding = power_of_two(len(free), slots) - len(free)
    padded = (np.pad(column, [(0, padding)] + [(0, 0)] * (column.ndim - 1)) for column in columns)
    return np.pad(free, (0, padding), constant_values=slots), *padded
