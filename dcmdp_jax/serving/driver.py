"""The slots of one engine, kept full from a bounded queue by a thread of its own.

A round lets go of what nobody waits for, starts what waits, and decodes up to K tokens in every
slot. Everything that
can fail happens in a round: its failure reaches the requests in the slots and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dcmdp_jax.records import Sampling, Weights
from dcmdp_jax.rollout.generate import MIN_FREE, SMALLEST_BUCKET, bucket

FAULTS = 3  # rounds failing in a row that make a driver unhealthy

_log = logging.getLogger(__name__)


class Closed(Exception):
    """The driver takes no more requests."""


class Failed(Exception):
    """A request was given up for a reason that is not its own."""


class Request(Protocol):
    """A prompt, and where its tokens go. The driver's thread calls the methods; only `send` may
    raise.
    """

    tokens: Sequence[int]
    max_tokens: int

    def gone(self) -> bool:
        """Nobody waits for the tokens any more."""

    def send(self, tokens: list[int], version: int, ended: bool) -> None:
        """The next tokens, a stop token included, and the version of the weights that sampled them."""

    def fail(self, error: Exception) -> None:
        """No more tokens come."""


class _Held(NamedTuple):
    request: Request
    length: int  # positions in use: prompt and completion


class Driver:
    """Runs requests on an engine.

    Weights are exchanged only while no slot is held, so that every token of a reply comes from one
    version. Request number n samples with the key (seed, n).
    """

    def __init__(
        self,
        engine: Any,
        weights: Weights,
        *,
        waiting: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ):
        """Args:
        engine: see `rollout.jetstream.Engine`; the driver is its only user.
        weights: what `sync` returned: nothing else may donate or delete it.
        waiting: requests that may wait for a slot.
        sampling: how tokens of every request are drawn.
        """
        self.engine = engine
        self.sampling = sampling
        self.seed = seed
        self.room = waiting
        self._weights = weights
        self._next_weights = None
        self._held: list[_Held | None] = [None] * engine.slots
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()  # guards the queue, the next weights and `_closing`
        self._closing = False
        self._faults = 0
        self._started = 0
        self._state = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def live(self) -> bool:
        return not self._closing and self._faults < FAULTS

    @property
    def running(self) -> int:
        """Slots that are held."""
        return sum(held is not None for held in self._held)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `queue.Full`, and `Closed` after `close`."""
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._drop_gone()
            if self.waiting + self.running >= self.room + self.engine.slots:
                raise queue.Full
            self._waiting.append(request)
            self._changed.notify_all()

    def update_weights(self, weights: Weights) -> None:
        """Exchanges the weights once the running requests have ended; those that wait start with
        the new ones.

        Returns when the new ones serve. Whatever is raised, the old ones go on serving: ValueError
        where the arrays are not shaped as theirs or not all finite, what computing `weights`
        raises, `Closed`, and KeyboardInterrupt while waiting.
        """
        if _layout(weights.params) != _layout(self._weights.params):
            raise ValueError(
                "the new weights are not shaped as those that serve; make them with the same `sync`"
            )
        jax.block_until_ready(weights)
        if not np.asarray(weights.finite):
            raise ValueError("the new weights hold NaN or an infinite number; make them anew")
        with self._changed:
            if self._next_weights is not None:
                raise ValueError("another exchange of weights is waiting; wait for it")
            self._next_weights = weights
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._next_weights is not weights or self._closing)
                if self._next_weights is weights:
                    raise Closed("the server is shutting down")
            finally:
                if self._next_weights is weights:
                    self._next_weights = None

    def close(self) -> None:
        """Takes no more requests; the thread ends with those it has."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def stop(self, timeout: float | None = None) -> bool:
        """Closes and waits, `timeout` seconds at the most, for the thread to end; tells whether it
        has.
        """
        self.close()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._round()
                except Exception as error:  # of the engine: it may raise anything
                    _log.exception("a round of decoding failed")
                    self._fail(error)
        finally:
            with self._changed:
                self._closing = True
                left = [held.request for held in self._held if held] + list(self._waiting)
                self._held = [None] * self.engine.slots
                self._waiting = deque()
                self._changed.notify_all()
            for request in left:
                request.fail(Closed("the server stopped"))

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self.running or self._next_weights or self._closing
            )
            return bool(self._waiting or self.running or not self._closing)

    def _round(self) -> None:
        self._let_go()
        self._admit()
        if self.running:
            self._decode()

    def _fail(self, error: Exception) -> None:
        """Gives up the requests in the slots and starts afresh."""
        failed = [held.request for held in self._held if held]
        self._held = [None] * self.engine.slots
        self._state = None  # it may have been donated to what failed
        self._faults += 1
        for request in failed:
            request.fail(
                Failed(f"the engine failed ({type(error).__name__}); the request can be sent again")
            )

    def _drop_gone(self) -> None:
        self._waiting = deque(request for request in self._waiting if not request.gone())

    def _let_go(self) -> None:
        with self._changed:
            self._drop_gone()
        slots = [slot for slot, held in enumerate(self._held) if held and held.request.gone()]
        if slots:
            self._state = self.engine.evict(self._state, slots)
            for slot in slots:
                self._held[slot] = None

    def _admit(self) -> None:
        """Takes new weights where it can, and starts requests in free slots."""
        with self._changed:
            if self._next_weights is not None and not self.running:
                self._weights = self._next_weights
                self._next_weights = None
                # what bad weights left in the cache would outlive them: a masked NaN is a NaN still
                self._state = None
                self._changed.notify_all()
            if self._next_weights is not None:
                return
            free = [slot for slot, held in enumerate(self._held) if held is None][
                : len(self._waiting)
            ]
            for slot in free:  # before anything can fail: a failure reaches all of them
                request = self._waiting.popleft()
                self._held[slot] = _Held(request, len(request.tokens))
        if self._state is None:
            self._state = self.engine.init_decode_state()
        for slot in free:
            self._start(slot, self._held[slot].request)

    def _start(self, slot: int, request: Request) -> None:
        length = len(request.tokens)
        tokens = np.zeros(
            (1, bucket(max(length, SMALLEST_BUCKET), self.engine.max_length)), np.int32
        )
        tokens[0, :length] = request.tokens
        prefix = self.engine.prefill(
            params=self._weights, padded_tokens=tokens, true_length=[length]
        )
        key = np.array([[self.seed, self._started & 0xFFFFFFFF]], np.uint32)
        self._started += 1
        self._state = self.engine.bulk_insert(
            prefix, self._state, [slot], [0], key, request.max_tokens, self.sampling
        )

    def _decode(self) -> None:
        slots = self.engine.slots
        longest = max(held.length for held in self._held if held)
        self._state, result = self.engine.generate(
            self._weights,
            self._state,
            leave_at=min(slots - self.running + MIN_FREE, slots) if self._waiting else slots,
            window=bucket(
                max(longest + self.engine.steps, SMALLEST_BUCKET), self.engine.max_length
            ),
        )
        read = self.engine.read(result)
        self._faults = 0
        for slot, held in enumerate(self._held):
            if held is not None:
                ended = not read.active[slot]
                new = read.drawn.token[slot][read.valid[slot]].tolist()
                self._held[slot] = None if ended else held._replace(length=held.length + len(new))
                self._send(held.request, new, int(read.version), ended)

    def _send(self, request: Request, tokens: list[int], version: int, ended: bool) -> None:
        try:
            request.send(tokens, version, ended)
        except Exception as error:  # a tokenizer's, over one completion: the others go on
            _log.exception("a completion could not be sent")
            request.fail(
                Failed(f"the completion could not be made into text ({type(error).__name__})")
            )


def _layout(params: Any) -> tuple[Any, list[tuple]]:
    leaves, tree = jax.tree.flatten(params)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]
