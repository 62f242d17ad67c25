"""A process that answers lines, for programs and libraries that may hang, swell or die.

It sets its own limits and holds nothing that its end would lose: it is killed whenever it does not
answer, and the next question starts another.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import weakref
from collections.abc import Sequence

START = 120.0  # seconds in which a process imports what it needs


class ProcessEnded(Exception):
    """The process ended without an answer; `status` is as `subprocess` has it."""

    def __init__(self, status: int):
        self.status = status


class NotReady(Exception):
    """The process cannot answer; the message is what it says."""


class Worker:
    """Runs `command` when it is first asked, and again after its end; one thread at a time may ask.

    The command writes the line `ready`, or a line that says why it is not, and then a line for each
    that it reads. It ends with its input, so with the process that asks, however that ends.
    """

    def __init__(self, command: Sequence[str], seconds: float):
        self._command = command
        self._seconds = seconds
        self._process: subprocess.Popen | None = None

    def ask(self, question: bytes) -> bytes:
        """The line that answers the line `question`.

        Raises ProcessEnded where the process ended instead, TimeoutError where it wrote nothing for
        `seconds`, and NotReady.
        """
        try:
            # a fork has its parent's pipes, and must not take answers from them
            if self._process and (self._owner != os.getpid() or self._process.poll() is not None):
                self.end()
            if self._process is None:
                self._start()
            self._process.stdin.write(question + b"\n")
            self._process.stdin.flush()
            answer = self._line(self._seconds)
        except BrokenPipeError:
            answer = b""
        except BaseException:  # a signal's, too: no answer may be left for the next question
            self.end()
            raise
        if not answer.endswith(b"\n"):
            raise ProcessEnded(self.end())
        return answer

    def end(self) -> int:
        """Ends the process, if there is one, and returns its status."""
        if self._process is None:
            return 0
        process = self._process
        self._process = None
        self._finalizer.detach()
        return _killed(process)

    def _start(self) -> None:
        # in a session of its own: Ctrl-C at the terminal is for its parent, which comes to a safe
        # point first
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _killed, process)
        self._finalizer.atexit = False  # the end of its input ends it then
        self._process = process
        said = self._line(START)
        if not said.endswith(b"\n"):
            raise BrokenPipeError
        if said != b"ready\n":
            raise NotReady(said.decode(errors="replace").strip())

    def _line(self, seconds: float) -> bytes:
        """What the process writes next, up to a newline; less where it ends.

        Raises TimeoutError where it writes nothing for so long.
        """
        output = self._process.stdout.fileno()
        written = select.poll()  # select.select knows the first 1024 files alone
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


def _killed(process: subprocess.Popen) -> int:
    """Returns its status. In a fork, whose process it is not, this closes the pipes alone."""
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a part of a question was still to be written
        process.stdin.close()
    return process.returncode
