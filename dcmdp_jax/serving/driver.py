"""Keeps the slots of one engine full, from a bounded queue, in a thread of its own.

A round frees the slots of requests that were cancelled, starts waiting requests in free slots, and
decodes up to K tokens in every slot. An engine can fail only within a round: the failure is
reported to the requests in the slots, and the driver goes on with the next ones.
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
from dcmdp_jax.rollout.generate import SMALLEST_BUCKET, idle_to_leave_at
from dcmdp_jax.tokens.packing import power_of_two

FAILED_ROUNDS = 3  # rounds in a row whose failure makes a driver unhealthy

_log = logging.getLogger(__name__)


class Closed(Exception):
    """The driver takes no more requests."""


class Failed(Exception):
    """A request cannot be completed, for a reason that does not lie in the request."""


class Request(Protocol):
    """A prompt and the receiver of its completion.

    The driver calls the methods from its thread. Only `send` may raise.
    """

    tokens: Sequence[int]
    max_tokens: int

    def cancelled(self) -> bool:
        """Returns True if nobody waits for the completion any more."""

    def send(self, tokens: list[int], version: int, ended: bool) -> None:
        """Receives the next tokens, a stop token included, and the version of their weights."""

    def fail(self, error: Exception) -> None:
        """Receives the reason why no more tokens follow."""


class _Running(NamedTuple):
    """A request in a slot."""

    request: Request
    length: int  # positions in use: prompt and completion


class Driver:
    """Runs requests on an engine.

    Weights are exchanged only while no request is running, so that all tokens of a completion come
    from the same version. Request number n samples with the key (seed, n).
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
        engine: a `rollout.jetstream.Engine` that nothing else uses.
        weights: as `sync` returns them; nothing else may donate or delete them.
        waiting: number of requests that may wait for a slot.
        sampling: how the tokens of every request are drawn.
        """
        self.engine = engine
        self.sampling = sampling
        self.seed = seed
        self.max_waiting = waiting
        self._weights = weights
        self._next_weights = None
        self._slots: list[_Running | None] = [None] * engine.slots
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()  # guards the queue, the next weights and `_closing`
        self._closing = False
        self._failed_rounds = 0
        self._started = 0
        self._state = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def live(self) -> bool:
        """True while requests are accepted and rounds succeed; the health check reports it."""
        return not self._closing and self._failed_rounds < FAILED_ROUNDS

    @property
    def running(self) -> int:
        """Number of requests in slots."""
        return sum(running is not None for running in self._slots)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `queue.Full` if too many wait, and `Closed` after `close`."""
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._drop_cancelled()
            if self.waiting + self.running >= self.max_waiting + self.engine.slots:
                raise queue.Full
            self._waiting.append(request)
            self._changed.notify_all()

    def update_weights(self, weights: Weights) -> None:
        """Exchanges the weights once the running requests have ended, and returns then.

        Waiting requests start with the new weights. Raises ValueError if the arrays differ in shape
        from the old ones or are not finite, `Closed` after `close`, and what computing `weights`
        raises. After any exception, KeyboardInterrupt included, the old weights go on serving.
        """
        if _layout(weights.params) != _layout(self._weights.params):
            raise ValueError(
                "the new weights are not shaped as those that serve; use the same `sync`"
            )
        jax.block_until_ready(weights)
        if not np.asarray(weights.finite):
            raise ValueError("the new weights hold NaN or an infinite number; compute them again")
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
        """Accepts no more requests; the thread ends once the accepted ones have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def stop(self, timeout: float | None = None) -> bool:
        """Closes and waits for the thread to end, up to `timeout` seconds.

        Returns True if it has ended.
        """
        self.close()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._round()
                except Exception as error:  # the engine may raise anything
                    _log.exception("a round of decoding failed")
                    self._fail(error)
        finally:
            with self._changed:
                self._closing = True
                unfinished = [running.request for running in self._slots if running]
                unfinished += self._waiting
                self._slots = [None] * self.engine.slots
                self._waiting = deque()
                self._changed.notify_all()
            for request in unfinished:
                request.fail(Closed("the server stopped"))

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False when the thread should end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self.running or self._next_weights or self._closing
            )
            return bool(self._waiting or self.running or not self._closing)

    def _round(self) -> None:
        self._free_cancelled()
        self._start_waiting()
        if self.running:
            self._decode()

    def _fail(self, error: Exception) -> None:
        """Fails the requests in the slots and frees these."""
        failed = [running.request for running in self._slots if running]
        self._slots = [None] * self.engine.slots
        self._state = None  # it may have been donated to the call that failed
        self._failed_rounds += 1
        for request in failed:
            request.fail(
                Failed(f"the engine failed ({type(error).__name__}); the request can be sent again")
            )

    def _drop_cancelled(self) -> None:
        self._waiting = deque(request for request in self._waiting if not request.cancelled())

    def _free_cancelled(self) -> None:
        """Removes the requests that were cancelled from the queue and from the slots."""
        with self._changed:
            self._drop_cancelled()
        slots = [
            slot
            for slot, running in enumerate(self._slots)
            if running and running.request.cancelled()
        ]
        if slots:
            self._state = self.engine.evict(self._state, slots)
            for slot in slots:
                self._slots[slot] = None

    def _start_waiting(self) -> None:
        """Exchanges the weights if no request is running; starts waiting requests in free slots."""
        with self._changed:
            if self._next_weights is not None and not self.running:
                self._weights = self._next_weights
                self._next_weights = None
                # The cache may hold NaN from bad weights, and a masked NaN still is a NaN.
                self._state = None
                self._changed.notify_all()
            if self._next_weights is not None:
                return
            free = [slot for slot, running in enumerate(self._slots) if running is None]
            free = free[: len(self._waiting)]
            # All are put into slots before any is started, so that a failure is reported to all.
            for slot in free:
                request = self._waiting.popleft()
                self._slots[slot] = _Running(request, len(request.tokens))
        if self._state is None:
            self._state = self.engine.init_decode_state()
        for slot in free:
            self._prefill(slot, self._slots[slot].request)

    def _prefill(self, slot: int, request: Request) -> None:
        length = len(request.tokens)
        tokens = np.zeros(
            (1, power_of_two(max(length, SMALLEST_BUCKET), self.engine.max_length)), np.int32
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
        """Decodes up to K tokens in every slot and sends them to their requests."""
        occupied = [slot for slot, running in enumerate(self._slots) if running]
        longest = max(self._slots[slot].length for slot in occupied)
        self._state, result = self.engine.generate(
            self._weights,
            self._state,
            leave_at=idle_to_leave_at(self.engine, len(occupied), bool(self._waiting)),
            window=power_of_two(
                max(longest + self.engine.steps, SMALLEST_BUCKET), self.engine.max_length
            ),
            occupied=occupied,
        )
        read = self.engine.read(result)
        self._failed_rounds = 0
        for slot, running in enumerate(self._slots):
            if running is None:
                continue
            ended = not read.active[slot]
            tokens = read.drawn.token[slot][read.valid[slot]].tolist()
            length = running.length + len(tokens)
            self._slots[slot] = None if ended else running._replace(length=length)
            self._send(running.request, tokens, int(read.version), ended)

    def _send(self, request: Request, tokens: list[int], version: int, ended: bool) -> None:
        try:
            request.send(tokens, version, ended)
        except Exception as error:  # such as a tokenizer's; the other completions go on
            _log.exception("a completion could not be sent")
            request.fail(
                Failed(f"the completion could not be made into text ({type(error).__name__})")
            )


def _layout(params: Any) -> tuple[Any, list[tuple]]:
    """Returns the tree's structure, and shape and dtype of its leaves."""
    leaves, tree = jax.tree.flatten(params)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]
