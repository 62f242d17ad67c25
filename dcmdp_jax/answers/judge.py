"""Answers compared: by our own reader, and what it cannot read by the `math-verify` package in
processes of its own.

A comparison that takes too long or too much memory is ended with its process. A few processes serve
all threads; each starts when it is first needed, and ends with its parent, however that ends.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from dcmdp_jax.answers.compare import Verdict, compare
from dcmdp_jax.answers.tokens import LONGEST

SECONDS = 2.0  # of one comparison
SLACK = 5.0  # seconds by which a process may miss its own limit
START = 120.0  # seconds in which a process imports its library
PROCESSES = 2
KNOWN = 1 << 16  # pairs that are remembered

COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("library.py")))


def equal(gold: str, answer: str) -> bool:
    """True if `answer` is judged equal to `gold`. Several threads may ask at once."""
    verdict = compare(gold, answer)
    if verdict is Verdict.UNREADABLE and max(len(gold), len(answer)) <= LONGEST:
        return library().equal(gold, answer)
    return verdict is Verdict.EQUAL


def library() -> Pool:
    """The processes of `math-verify` that this process shares; a forked one has its own."""
    return _library(os.getpid())


@functools.cache
def _library(pid: int) -> Pool:
    return Pool()


class Absent(Exception):
    """The library cannot be imported; the message says why."""


class Pool:
    """Processes of `command`, which is given `seconds`; each compares one pair at a time.

    `given_up` counts comparisons that took longer than `seconds`, or that two processes did not
    survive: they count as different. A pair that was compared is remembered.
    """

    def __init__(self, command: Sequence[str] = COMMAND, seconds: float = SECONDS,
                 processes: int = PROCESSES):
        self.seconds = seconds
        self.given_up = 0
        self.equal = functools.lru_cache(KNOWN)(self._compared)
        self._absent = False
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(_Process([*command, str(seconds)], seconds + SLACK))

    def _compared(self, gold: str, answer: str) -> bool:
        if self._absent:
            return False
        process = self._idle.get()
        try:
            verdict = process.ask(gold, answer)
            if verdict is None:  # it may have been ended while it was idle
                verdict = process.ask(gold, answer)
        except TimeoutError:
            verdict = None
        except Absent as error:
            self._say_absent(error)
            return False
        finally:
            self._idle.put(process)
        if verdict is None:
            with self._lock:
                self.given_up += 1
        return bool(verdict)

    def _say_absent(self, error: Absent) -> None:
        with self._lock:
            if not self._absent:
                print(f"math-verify cannot be used ({error}): answers that need it count as "
                      "different; pip install 'dcmdp-jax[answers]'", file=sys.stderr, flush=True)
            self._absent = True


class _Process:
    """One process, started when it is asked and not there."""

    def __init__(self, command: list[str], seconds: float):
        self._command = command
        self._seconds = seconds
        self._process: subprocess.Popen | None = None

    def ask(self, gold: str, answer: str) -> bool | None:
        """Returns whether they are equal; None where the process ended instead.

        Raises TimeoutError where it ended because its time was over, and Absent where it has no
        library.
        """
        try:
            if self._process is None:
                self._start()
            self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._line(self._seconds)
        except BrokenPipeError:
            reply = b""
        except BaseException:  # a signal's, too: no reply may be left for the next question
            self._end()
            raise
        if reply in (b"true\n", b"false\n"):
            return reply == b"true\n"
        if self._end() == -signal.SIGALRM:
            raise TimeoutError
        return None

    def _start(self) -> None:
        # in a session of its own: Ctrl-C at the terminal is for its parent, which comes to a safe
        # point first
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True)
        said = self._line(START)
        if said.startswith(b"absent"):
            raise Absent(json.loads(said.removeprefix(b"absent")))
        if said != b"ready\n":
            raise BrokenPipeError

    def _line(self, seconds: float) -> bytes:
        """What the process writes next, up to a newline. Raises TimeoutError where it writes
        nothing for so long."""
        output = self._process.stdout.fileno()
        read = b""
        while not read.endswith(b"\n"):
            if not select.select([output], [], [], seconds)[0]:
                raise TimeoutError
            part = os.read(output, 1000)
            if not part:
                break
            read += part
        return read

    def _end(self) -> int:
        """Ends the process, if there is one, and returns its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()
        return process.returncode
