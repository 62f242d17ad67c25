"""Signals: received at once, obeyed at safe points, and in a user's function that hangs."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dcmdp_jax import stopping

SLEEP = "import time; time.sleep(60)"


def kill_later(seconds, number=signal.SIGTERM):
    """From another process: a function that keeps the interpreter's lock lets no thread run."""
    return subprocess.Popen(["bash", "-c", f"sleep {seconds}; kill -{int(number)} {os.getpid()}"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_reported_once(number, capfd):
    reports = []
    with stopping.requests(lambda: reports.append(1)) as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
    assert reports == [1]
    assert capfd.readouterr().err.count("stopping at the next safe point") == 1


def test_a_second_interrupt_is_raised():
    with pytest.raises(KeyboardInterrupt), stopping.requests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.requests():
        pass
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_hangup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.requests() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_a_process_that_is_busy_outside_of_python():
    """The child computes a power, which takes minutes and runs no handler."""
    code = (
        "from dcmdp_jax import stopping\nimport numpy as np\n"
        "with stopping.requests(at_once=True):\n"
        "    print('in', flush=True)\n"
        "    x = np.random.default_rng(0).normal(size=(6000, 6000))\n"
        "    while True: x = x @ x / 1e3\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "in\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and time.monotonic() - began < 5
    assert err.split("\n")[1::2] == [
        "stopping at the next safe point; press Ctrl-C again to stop at once",
        "stopped at once; the same command goes on from what was saved last",
    ]


def loops():
    while True:
        pass


def keeps_what_is_raised():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


HANGS = {
    "in a loop": loops,
    "asleep": lambda: time.sleep(60),
    "waiting": lambda: threading.Event().wait(),
    "in a child": lambda: subprocess.run([sys.executable, "-c", SLEEP]),
    "retrying": keeps_what_is_raised,
    "in a regular expression": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_function_that_hangs_is_left(how):
    with stopping.requests() as should_stop:
        killer = kill_later(0.3)
        began = time.monotonic()
        with (
            pytest.raises(stopping.Interrupted),
            stopping.interruptible(should_stop, lambda number: None) as calls,
        ):
            calls.begin(0)
            HANGS[how]()
        assert time.monotonic() - began < 20
        assert killer.wait() == 0


def test_a_function_that_returns_in_time_is_not_left():
    with stopping.requests() as should_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with stopping.interruptible(should_stop, lambda number: None) as calls:
            calls.begin(0)
            time.sleep(0.5)
        time.sleep(0.1)


def test_a_slow_call_is_reported_once():
    slow = []
    with stopping.interruptible(lambda: False, slow.append, slow_seconds=0.2) as calls:
        for number in range(4):
            calls.begin(number)
            time.sleep(0.6 if number == 2 else 0.01)
    assert slow == [2]


def test_a_forked_child_dies_of_sigterm_and_does_not_stop_its_parent():
    with stopping.requests() as should_stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM and not should_stop()
