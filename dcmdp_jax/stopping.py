"""Stopping a run without losing it: signals set a flag, which the run reads at safe points."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 2.0  # after a stop request, in which a user's function may still return
SLOW_SECONDS = 30.0  # in a user's function, after which it is named on stderr
POLL_SECONDS = 0.1  # between two looks at a user's function


class Interrupted(Exception):
    """The run was asked to stop, and can go on from where it was."""


class NotKept(Interrupted):
    """The run was asked to stop in a part whose progress is not kept: it begins again."""


class Failed(ValueError):
    """The run cannot go on as it is; what it has is saved. All processes raise it alike."""


class _Abandoned(BaseException):
    """Raised in a user's function to leave it; no `except Exception` there catches it."""


@contextmanager
def requests(
    on_request: Callable[[], None] = lambda: None, at_once: bool = False
) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once SIGINT, SIGTERM or SIGHUP has come.

    A thread receives the signals, so that they are answered while the main thread compiles. A
    second SIGINT raises KeyboardInterrupt as soon as Python runs in the main thread. SIGHUP stays
    ignored under nohup.

    Args:
        on_request: called at the first signal.
        at_once: a second SIGINT ends the process instead, which is as safe as SIGKILL.
    """
    received = []  # by the thread: every signal
    handled = []  # by the main thread: later, and signals that come together once

    def receive(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            on_request()
            _write("stopping at the next safe point; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT and at_once:
            _write("stopped at once; the same command goes on from what was saved last")
            os._exit(130)

    def handle(number, frame):
        handled.append(number)
        if _running:
            _start_timer()
        is_second = max(len(received), len(handled)) > 1
        if number == signal.SIGINT and is_second and not at_once:
            raise KeyboardInterrupt

    def has_come() -> bool:
        return bool(received or handled)

    signals = [number for number in SIGNALS if not _is_ignored_hangup(number)]
    previous = {number: signal.signal(number, handle) for number in signals}
    _previous_handlers.update(previous)
    _open.append(has_come)
    try:
        with _receiving(lambda number: receive(number) if number in signals else None):
            yield has_come
    finally:
        _open.remove(has_come)
        _previous_handlers.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


_open: list[Callable[[], bool]] = []  # what the blocks of `requests` that have not ended yield


def requested() -> bool:
    """Returns True inside a block of `requests` once a signal has come.

    For what is called without a `should_stop` and may take long.
    """
    return any(has_come() for has_come in _open)


def _is_ignored_hangup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


_previous_handlers: dict[int, Any] = {}  # those that `requests` replaces


def _restore_handlers_in_child() -> None:
    """A forked child, such as one of a verifier's pool, does not take signals for its parent."""
    if _previous_handlers:
        signal.set_wakeup_fd(-1)
        for number, handler in _previous_handlers.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_restore_handlers_in_child)


@contextmanager
def _receiving(receive: Callable[[int], None]) -> Iterator[None]:
    """A block in which a thread calls `receive` with the number of each signal that has a Python
    handler, as it comes.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                receive(number)

    thread = threading.Thread(target=listen, daemon=True)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _write(text: str) -> None:
    """Writes to stderr, whatever the main thread is doing; a terminal that is gone is no error."""
    with contextlib.suppress(OSError):
        print(f"\n{text}", file=sys.stderr, flush=True)


class UserCalls:
    """Calls of a user's function inside a block of `interruptible`."""

    def __init__(self):
        self.inside = True  # the block has not ended
        self.number = 0
        self.since = time.monotonic()

    def begin(self, number: int) -> None:
        """To be called before each call, with its number."""
        self.number = number
        self.since = time.monotonic()


_running: list[UserCalls] = []  # the block that the main thread is in, if any


@contextmanager
def interruptible(
    should_stop: Callable[[], bool],
    on_slow: Callable[[int], None],
    slow_seconds: float = SLOW_SECONDS,
) -> Iterator[UserCalls]:
    """A block in which the main thread calls a user's function, which may never return.

    Raises `Interrupted`, from within the function if need be, where it has not returned two seconds
    after `should_stop()` became true. The function stays in the main thread, because only there a
    regular expression and a verifier's own alarm answer to signals; in another thread the block
    does nothing.

    Args:
        on_slow: called once, with the number of the first call that takes more than `slow_seconds`.
    """
    calls = UserCalls()
    done = threading.Event()
    main = threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        yield calls
        return

    def abandon(number, frame):
        if calls.inside:
            raise _Abandoned

    def watch() -> None:
        stop_seen = None
        is_slow = False
        while not done.wait(POLL_SECONDS):
            now = time.monotonic()
            if stop_seen is None and should_stop():
                stop_seen = now
            if stop_seen is not None and now - stop_seen > GRACE_SECONDS:
                signal.pthread_kill(main, signal.SIGVTALRM)
                stop_seen = now  # again later, where the function catches what is raised in it
            if not is_slow and now - calls.since > slow_seconds:
                is_slow = True
                on_slow(calls.number)

    previous = signal.signal(signal.SIGVTALRM, abandon)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    _running.append(calls)
    if should_stop():
        _start_timer()
    try:
        try:
            yield calls
        finally:
            calls.inside = False
    except _Abandoned:
        calls.inside = False
        raise Interrupted("stopped in a user's function") from None
    finally:
        _running.remove(calls)
        done.set()
        thread.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _start_timer() -> None:
    """Has a timer send SIGVTALRM, too: a function that keeps the interpreter's lock lets no thread
    run. It counts the process's own CPU time.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, GRACE_SECONDS / 2, GRACE_SECONDS)
