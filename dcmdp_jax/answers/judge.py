"""Compares answers by our own reader, and what it cannot read by the `math-verify` package in
processes of its own.

A comparison that takes too long or too much memory ends with its process. All threads share a few
processes; each starts when it is first needed, and ends with its parent however that ends.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import queue
import signal
import sys
import threading
from collections.abc import Sequence

from dcmdp_jax.answers.compare import Verdict, compare
from dcmdp_jax.answers.tokens import LONGEST
from dcmdp_jax.answers.worker import NotReady, ProcessEnded, Worker

SECONDS = 2.0  # of processor time, for one comparison
SLACK = 30.0  # seconds by the clock that a process has more: it may have to wait for a processor
PROCESSES = 2
CACHED_PAIRS = 1 << 16

COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("library.py")))


def equal(gold: str, answer: str) -> bool:
    """Returns True if `answer` is judged equal to `gold`. Threads may call this together."""
    verdict = compare(gold, answer)
    if verdict is Verdict.UNREADABLE and max(len(gold), len(answer)) <= LONGEST:
        return library().equal(gold, answer)
    return verdict is Verdict.EQUAL


def library() -> Pool:
    """Returns this process's pool of `math-verify` processes; a forked process gets its own."""
    return _library(os.getpid())


@functools.cache
def _library(pid: int) -> Pool:
    return Pool()


class Pool:
    """Processes of `command`, which is given `seconds`; each compares one pair at a time.

    `seconds` are of processor time; a process that takes `seconds + slack` by the clock is ended.
    `given_up` counts the comparisons that took longer than that or that ended two processes;
    they count as different. Results are cached.
    """

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        seconds: float = SECONDS,
        processes: int = PROCESSES,
        slack: float = SLACK,
    ):
        self.seconds = seconds
        self.given_up = 0
        self.equal = functools.lru_cache(CACHED_PAIRS)(self._compared)
        self._absent = False
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(Worker([*command, str(seconds)], seconds + slack))

    def _compared(self, gold: str, answer: str) -> bool:
        """Returns the verdict of a process; False if it gives none, or math-verify is missing."""
        if self._absent:
            return False
        question = json.dumps([gold, answer]).encode()
        worker = self._idle.get()
        try:
            verdict = _verdict(worker, question)
            if verdict is None:  # the process may have ended while it was idle
                verdict = _verdict(worker, question)
        except TimeoutError:
            verdict = None
        except NotReady as error:
            self._report_absent(error)
            return False
        finally:
            self._idle.put(worker)
        if verdict is None:
            with self._lock:
                self.given_up += 1
        return bool(verdict)

    def _report_absent(self, error: NotReady) -> None:
        """Prints, once, that math-verify cannot be used."""
        with self._lock:
            if not self._absent:
                print(
                    f"math-verify cannot be used ({error}): answers that need it count as "
                    "different; pip install 'dcmdp-jax[answers]'",
                    file=sys.stderr,
                    flush=True,
                )
            self._absent = True


def _verdict(worker: Worker, question: bytes) -> bool | None:
    """Returns a process's verdict, or None if it gives none. Raises TimeoutError if its time is
    over.
    """
    try:
        reply = worker.ask(question)
    except ProcessEnded as error:
        if error.status == -signal.SIGPROF:
            raise TimeoutError from None
        return None
    if reply not in (b"true\n", b"false\n"):
        worker.end()
        return None
    return reply == b"true\n"
