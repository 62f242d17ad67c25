"""Stopping a run without losing it: signals become a question that is asked at safe points."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The run was asked to stop, and can go on from where it was."""


class Failed(ValueError):
    """The run cannot go on as it is; what it has is saved. All processes raise it alike."""


@contextmanager
def requests(tell: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came; a second SIGINT interrupts at once.

    The first signal calls `tell`.
    """
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1:
            tell()
        os.write(2, b"\nstopping at the next safe point; press Ctrl-C again to stop at once\n")  # print may be running

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
