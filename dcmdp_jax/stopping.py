"""Stopping a run without losing it: signals become a question that is asked at safe points."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = (
    2.0  # seconds in which a user's function may still return, once the run is asked to stop
)
SLOW_SECONDS = 30.0  # seconds after which a user's function is named
POLL_SECONDS = 0.1  # seconds between two looks at a user's function


class Interrupted(Exception):
    """The run was asked to stop, and can go on from where it was."""


class Failed(ValueError):
    """The run cannot go on as it is; what it has is saved. All processes raise it alike."""


class _Left(BaseException):
    """Raised in a user's function to get out of it; no `except Exception` there keeps it."""


@contextmanager
def requests(
    tell: Callable[[], None] = lambda: None, at_once: bool = False
) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT, SIGTERM or SIGHUP came.

    A thread hears them, so that they are answered while the main thread compiles. The first signal
    calls `tell`. A second SIGINT raises KeyboardInterrupt as soon as Python runs in the main
    thread; with `at_once` it ends the process, which is as safe as SIGKILL. SIGHUP stays ignored
    under nohup.
    """
    heard = []
    handled = []  # by the thread, each signal; by the main thread, later and fewer

    def hear(number: int) -> None:
        heard.append(number)
        if len(heard) == 1:
            tell()
            _write("stopping at the next safe point; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT and at_once:
            _write("stopped at once; the same command goes on from what was saved last")
            os._exit(130)

    def handle(number, frame):
        handled.append(number)
        if _watches:
            _arm()
        if number == signal.SIGINT and max(len(heard), len(handled)) > 1 and not at_once:
            raise KeyboardInterrupt

    heeded = [
        number
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in heeded}
    _before.update(before)
    try:
        with _listening(lambda number: hear(number) if number in heeded else None):
            yield lambda: bool(heard or handled)
    finally:
        _before.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_before: dict[int, Any] = {}  # handlers that `requests` replaces


def _in_child() -> None:
    """A forked child, as of a verifier's pool, answers to signals as before, not for its parent."""
    if _before:
        signal.set_wakeup_fd(-1)
        for number, handler in _before.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def _listening(hear: Callable[[int], None]) -> Iterator[None]:
    """Has a thread call `hear` with the number of each signal that has a handler, as it comes."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                hear(number)

    thread = threading.Thread(target=listen, daemon=True)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _write(text: str) -> None:
    """To stderr, whatever the main thread is doing; where the terminal is gone, to nobody."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class Watch:
    """What the main thread is at in a user's function, which may never return; see `watched`."""

    def __init__(self):
        self.inside = True
        self.turn = 0
        self.since = time.monotonic()

    def begin(self, turn: int) -> None:
        """The function is called for the `turn`-th time."""
        self.turn = turn
        self.since = time.monotonic()


_watches: list[Watch] = []  # the one that is going on, if there is one


@contextmanager
def interruptible(asked: Callable[[], bool], slow: Callable[[int], None]) -> Iterator[Watch]:
    """A block in which the main thread calls a user's function, each time after `begin(turn)`.

    Raises `Interrupted`, from within the function if need be, where it has not returned 2 s after
    `asked()` became true. `slow(turn)` is called once, where a turn takes longer than 30 s. The
    function stays in the main thread: only there do a regular expression and a verifier's own alarm
    answer to signals.
    """
    watch = Watch()
    done = threading.Event()
    main = threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        yield watch  # signals are not for this thread
        return

    def leave(number, frame):
        if watch.inside:
            raise _Left

    def look() -> None:
        asked_at = None
        told = False
        while not done.wait(POLL_SECONDS):
            now = time.monotonic()
            if asked_at is None and asked():
                asked_at = now
            if asked_at is not None and now - asked_at > GRACE_SECONDS:
                signal.pthread_kill(main, signal.SIGVTALRM)
                asked_at = now  # once more, where the function keeps what is raised in it
            if not told and now - watch.since > SLOW_SECONDS:
                told = True
                slow(watch.turn)

    before = signal.signal(signal.SIGVTALRM, leave)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    _watches.append(watch)
    if asked():
        _arm()
    try:
        try:
            yield watch
        finally:
            watch.inside = False
    except _Left:
        watch.inside = False
        raise Interrupted("stopped in a user's function") from None
    finally:
        _watches.remove(watch)
        done.set()
        thread.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _arm() -> None:
    """Leaves the function by a timer, too.

    No thread runs where a function keeps the interpreter's lock.
    """
    signal.setitimer(
        signal.ITIMER_VIRTUAL, GRACE_SECONDS / 2, GRACE_SECONDS
    )  # of the process's own time
