"""Where a run's progress appears: lines, or a block at the lower end of a terminal."""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

SILENCE = 9.0  # seconds after which a reader is told what the run is doing
TICK = 1.0  # seconds between two looks at the clock


class Style(enum.Enum):
    """How a run's progress is shown."""

    AUTOMATIC = enum.auto()  # a block on a terminal, elsewhere a line now and then
    PLAIN = enum.auto()  # a line a step, without colour, nothing redrawn
    QUIET = enum.auto()  # not at all


class Screen:
    """Lines and a block of lines, on which a thread tells what takes long.

    The block is redrawn in place; what the program prints meanwhile appears above it.
    """

    def __init__(self) -> None:
        self.style = Style.AUTOMATIC
        self._lock = threading.RLock()
        self._stream: TextIO | None = None  # the terminal while the screen is open, else stderr
        self._doing: Callable[[], str] | None = None  # what takes long, "" if nothing does
        self._block: list[str] = []
        self._height = 0  # lines of the block that are on the terminal
        self._width = 0
        self._in_line = False  # what was printed above the block ends within a line
        self._last = time.monotonic()  # when something was said

    @property
    def redraws(self) -> bool:
        """True if there is a terminal that can move its cursor, and it may."""
        can = sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"
        return can and self.style is Style.AUTOMATIC

    def say(self, text: str) -> None:
        """Prints a line of a result on stdout."""
        if self.style is not Style.QUIET:
            print(text, flush=True)
            self._last = time.monotonic()

    def line(self, text: str) -> None:
        """Prints a line of progress on stderr."""
        if self.style is not Style.QUIET:
            print(text, file=sys.stderr, flush=True)
            self._last = time.monotonic()

    def draw(self, block: list[str]) -> None:
        """Draws a block over the one before."""
        with self._lock:
            self._block = block
            self._redraw()

    @contextlib.contextmanager
    def opened(self, doing: Callable[[], str]) -> Iterator[None]:
        """A block of the program in which nine seconds of silence end with what `doing()` returns.

        On a terminal it is the last line of the drawn block, a second after the other.
        """
        if self.style is Style.QUIET or self._doing:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        self._doing = doing
        self._last = time.monotonic()
        try:
            with self._above_block() if self.redraws else contextlib.nullcontext():
                thread.start()
                try:
                    yield
                finally:
                    done.set()
                    thread.join()
                    self._doing = None
                    if self._stream:
                        self._redraw()
        finally:
            self._doing = None
            self._block = []
            self._height = 0

    @contextlib.contextmanager
    def _above_block(self) -> Iterator[None]:
        """A block of the program that prints above the drawn block."""
        self._stream = sys.stderr
        streams = ["stderr", "stdout"] if sys.stdout.isatty() else ["stderr"]
        before = {name: getattr(sys, name) for name in streams}
        for name, stream in before.items():
            setattr(sys, name, _Above(stream, self._print_above))
        try:
            yield
        finally:
            self._stream = None
            for name, stream in before.items():
                setattr(sys, name, stream)

    def _print_above(self, stream: TextIO, text: str) -> int:
        with self._lock:
            self._erase()
            length = stream.write(text)
            stream.flush()
            if text:
                self._in_line = not text.endswith("\n")
            return length

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(TICK):
            doing = self._doing()
            if self._stream:
                with self._lock:
                    if not self._in_line:
                        self._redraw()
            elif doing and time.monotonic() - self._last >= SILENCE:
                self.line(doing)

    def forget(self) -> None:
        """To be called in a forked child: the block is its parent's, whose thread may hold the
        lock.
        """
        self._lock = threading.RLock()
        self._block = []
        self._height = 0

    def _redraw(self) -> None:
        """Moves up to the block's first line and writes the block down over it.

        If the width changed, the terminal may have wrapped the old lines anew and their place is
        not known: a new block begins below.
        """
        stream = self._stream or sys.stderr
        width = columns()
        up = f"\x1b[{self._height}A" if self._height and width == self._width else ""
        lines = list(self._block)
        if self._doing and (doing := self._doing()):
            lines.append(doing)
        below = "\n" if self._in_line else "\r"
        drawn = "".join(f"\x1b[2K{_colored(line[:width])}\n" for line in lines)
        stream.write(f"{below}{up}{drawn}\x1b[J")
        stream.flush()
        self._in_line = False
        self._height = len(lines)
        self._width = width

    def _erase(self) -> None:
        if self._height and columns() == self._width:
            self._stream.write(f"\r\x1b[{self._height}A\x1b[J")
            self._stream.flush()
        self._height = 0


class _Above:
    """A stream of the terminal, written to above the block."""

    def __init__(self, stream: TextIO, write: Callable[[TextIO, str], int]):
        self._stream = stream
        self._write = write

    def write(self, text: str) -> int:
        """Writes the text and returns its length, as `TextIO.write` does."""
        return self._write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def columns() -> int:
    """Returns the columns of a line: the last one of a terminal would wrap on some."""
    return max(shutil.get_terminal_size().columns - 1, 20)


def _colored(line: str) -> str:
    """Colours what a reader must know, unless NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return line
    for word, code in (
        ("ABOVE", "31"),
        ("NOT MEASURED", "31"),
        ("(at its bound)", "33"),
        ("warning", "33"),
        ("within", "32"),
    ):
        line = line.replace(word, f"\x1b[{code}m{word}\x1b[0m")
    return line


screen = Screen()  # of this process
os.register_at_fork(after_in_child=screen.forget)
