"""A subprocess that answers requests, one line each, for code that may hang, crash or use too much
memory.

The process sets its own limits and keeps no state, so that it can be killed whenever it does not
answer; the next question starts another.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from typing import IO

_START = 120.0  # seconds that a process has to import what it needs


class ProcessEnded(Exception):
    """The process ended without an answer; `status` is its exit status as in `subprocess`."""

    def __init__(self, status: int):
        self.status = status


class NotReady(Exception):
    """The process cannot answer; the message is its own."""


class Worker:
    """Runs `command` at the first question, and again after its end; for one thread at a time.

    The command writes the line `ready`, or a line that says why it is not ready, and then one line
    for each line that it reads. It ends when its stdin closes, and therefore when the process that
    asks ends, for whatever reason. What it starts itself is ended with it.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        *,
        first_line: bytes = b"",
        environment: Mapping[str, str] | None = None,
        stderr: int | IO | None = subprocess.DEVNULL,
    ):
        """Starts nothing yet.

        Args:
            seconds: in which each line must be answered.
            first_line: what the process reads before it is ready.
            environment: of the process; None: this one's.
            stderr: of the process, as `subprocess` takes it.
        """
        self._command = command
        self._seconds = seconds
        self._first_line = first_line
        self._environment = environment
        self._stderr = stderr
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process, if there is none. Raises ProcessEnded, TimeoutError and NotReady."""
        try:
            if self._process is None:
                self._start()
        except BrokenPipeError:
            raise ProcessEnded(self.end()) from None
        except BaseException:
            self.end()
            raise

    def kill(self) -> None:
        """Kills the process from another thread; a question that it is at raises ProcessEnded."""
        process = self._process
        if process is not None:
            _kill(process, self._owner)

    def ask(self, question: bytes) -> bytes:
        """Returns the line that answers the line `question`.

        Raises ProcessEnded if the process ended instead, TimeoutError if it wrote nothing for
        `seconds`, and NotReady.
        """
        try:
            # a fork shares its parent's pipes, and must not read from them
            if self._process and (self._owner != os.getpid() or self._process.poll() is not None):
                self.end()
            if self._process is None:
                self._start()
            self._process.stdin.write(question + b"\n")
            self._process.stdin.flush()
            answer = self._line(self._seconds)
        except BrokenPipeError:
            answer = b""
        except BaseException:  # signals too: the next question must not get this answer
            self.end()
            raise
        if not answer.endswith(b"\n"):
            raise ProcessEnded(self.end())
        return answer

    def end(self) -> int:
        """Ends the process, if there is one, and returns its exit status."""
        if self._process is None:
            return 0
        process = self._process
        self._process = None
        self._finalizer.detach()
        return _killed(process, self._owner)

    def _start(self) -> None:
        """Starts the process and waits until it is ready."""
        # in its own session: Ctrl-C at the terminal reaches the parent alone, which stops safely
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
            start_new_session=True,
        )
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _killed, process, self._owner)
        self._finalizer.atexit = False  # at exit its stdin closes, which ends it
        self._process = process
        if self._first_line:
            process.stdin.write(self._first_line + b"\n")
            process.stdin.flush()
        first_line = self._line(_START)
        if not first_line.endswith(b"\n"):
            raise BrokenPipeError
        if first_line != b"ready\n":
            raise NotReady(first_line.decode(errors="replace").strip())

    def _line(self, seconds: float) -> bytes:
        """Returns what the process writes next, up to a newline; less if it ends.

        Raises TimeoutError if it writes nothing for `seconds`.
        """
        output = self._process.stdout.fileno()
        written = select.poll()  # select.select takes only file numbers under 1024
        written.register(output, select.POLLIN)
        read = bytearray()
        while not read.endswith(b"\n"):
            if not written.poll(1000 * seconds):
                raise TimeoutError(f"no answer within {seconds:g} s")
            part = os.read(output, 1 << 16)
            if not part:
                break
            read += part
        return bytes(read)


def _kill(process: subprocess.Popen, owner: int) -> None:
    """Kills a process and what it has started, in its session; nothing in a fork of its owner."""
    if os.getpid() == owner and process.returncode is None:  # its number is not another's yet
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)


def _killed(process: subprocess.Popen, owner: int) -> int:
    """Ends a process and returns its exit status; in a fork, whose child it is not, only closes
    this end of its pipes.
    """
    _kill(process, owner)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # part of a question was not written yet
        process.stdin.close()
    return process.returncode
