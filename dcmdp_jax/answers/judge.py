"""Answers compared in a process of its own, which is ended where a comparison takes too long or too much memory."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable

from dcmdp_jax.answers import compare

MEMORY = 2 << 30  # bytes of address space of the judging process


class Judge:
    """Compares answers by `compare.equal`, or by the `math-verify` package; to be used in a `with` block.

    `given_up` counts comparisons that took longer than `seconds`, or that the process did not survive: they count as
    unequal. The same pair is compared once.
    """

    def __init__(self, seconds: float = 5.0, math_verify: bool = False):
        if math_verify and importlib.util.find_spec("math_verify") is None:
            raise ValueError("math-verify is not installed; pip install math-verify antlr4-python3-runtime==4.13.2, or "
                             "leave --math-verify out")
        self.seconds, self.given_up = seconds, 0
        self._command = [sys.executable, "-m", "dcmdp_jax.answers.judge", *(["--math-verify"] if math_verify else [])]
        self._known: dict[tuple[str, str], bool] = {}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error) -> None:
        self._end()

    def equal(self, gold: str, answer: str | None) -> bool:
        """Whether `answer` equals `gold`; None equals nothing."""
        if answer is None:
            return False
        if (gold, answer) not in self._known:
            self._known[gold, answer] = self._ask(gold, answer)
        return self._known[gold, answer]

    def _ask(self, gold: str, answer: str) -> bool:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._line(self.seconds)
        except BrokenPipeError:
            reply = b""
        if reply not in (b"true\n", b"false\n"):
            self.given_up += 1
            self._end()
        return reply == b"true\n"

    def _start(self) -> None:
        # in a session of its own, so that Ctrl-C, which lets the evaluation come to a safe point, does not end it before
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if self._line(120.0) != b"ready\n":  # importing is no part of a comparison's time
            self._end()
            raise RuntimeError(f"the judging process did not start: {' '.join(self._command)}")

    def _line(self, seconds: float) -> bytes:
        """What the process writes next, up to a newline; less where it ends or the time is over."""
        output, read = self._process.stdout.fileno(), b""
        while not read.endswith(b"\n") and select.select([output], [], [], seconds)[0]:
            part = os.read(output, 100)
            if not part:
                break
            read += part
        return read

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _math_verify() -> Callable[[str, str], bool]:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time is kept elsewhere, as it is

    def equal(gold: str, answer: str) -> bool:
        one, other = (math_verify.parse(f"$\\boxed{{{text}}}$", parsing_timeout=None) for text in (gold, answer))
        return bool(math_verify.verify(one, other, timeout_seconds=None))

    return equal


def _serve() -> None:
    """Answers each line `[gold, answer]` of standard input with `true` or `false`."""
    replies, sys.stdout = sys.stdout, sys.stderr  # a library's own printing is no reply
    equal = _math_verify() if "--math-verify" in sys.argv[1:] else compare.equal
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
