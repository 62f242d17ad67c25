"""A process that answers lines: whatever ends a question, the next one has its own answer."""

import gc
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from dcmdp_jax.answers import worker

READY = "import os, signal, sys, time\nprint('ready', flush=True)\n"
ECHO = READY + "for line in sys.stdin: print(line.strip()[::-1], flush=True)"


def of(program, seconds=30.0):
    return worker.Worker([sys.executable, "-c", program], seconds)


@pytest.fixture
def echo():
    made = of(ECHO)
    yield made
    made.end()


@pytest.mark.parametrize("question", [b"abc", b"12" * 10**6], ids=["short", "long"])
def test_a_line_is_answered_by_a_line(echo, question):
    assert echo.ask(question) == question[::-1] + b"\n"


@pytest.mark.parametrize(
    "act, status",
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
        ("sys.stdout.write('half'); sys.exit()", 0),
    ],
)
def test_a_process_that_ends_tells_its_status_and_another_one_starts(act, status):
    answers = f"for line in sys.stdin:\n if line == 'die\\n': {act}\n print('ok', flush=True)"
    asked = of(READY + answers)
    for _ in range(2):
        with pytest.raises(worker.ProcessEnded) as ended:
            asked.ask(b"die")
        assert ended.value.status == status and asked.ask(b"live") == b"ok\n"
    asked.end()


def test_a_silent_process_is_ended():
    silent = of(READY + "for line in sys.stdin: time.sleep(600)", seconds=0.2)
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0.2 s"):
        silent.ask(b"?")
    assert time.monotonic() - before < 20.0 and silent._process is None


def test_a_process_that_is_not_ready_says_why():
    with pytest.raises(worker.NotReady, match="^no such library$"):
        of("print('no such library')").ask(b"?")


@pytest.mark.parametrize("program", ["raise SystemExit(4)", "print('read', end='')"])
def test_a_process_that_dies_at_its_start_has_ended(program):
    with pytest.raises(worker.ProcessEnded):
        of(program).ask(b"?")


INTERRUPTS = (
    READY
    + """
for line in sys.stdin:
    if line == 'two\\n':
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.2)
    print(line.strip()[::-1], flush=True)
"""
)


def test_an_interrupted_question_leaves_no_answer_for_the_next():
    """Ctrl-C comes while the process that asks waits, and the answer after it."""
    asked = of(INTERRUPTS)
    assert asked.ask(b"one") == b"eno\n"
    with pytest.raises(KeyboardInterrupt):
        asked.ask(b"two")
    assert asked.ask(b"three") == b"eerht\n"
    asked.end()


def test_a_process_that_was_killed_while_it_was_idle_is_started_again(echo):
    assert echo.ask(b"one") == b"eno\n"
    os.kill(echo._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, echo._process.pid, os.WEXITED | os.WNOWAIT)
    assert echo.ask(b"two") == b"owt\n"


FORKS = f"""
import os, sys
from dcmdp_jax.answers import worker
echo = worker.Worker([sys.executable, "-c", {ECHO!r}], 30.0)
print(echo.ask(b"one"), flush=True)
parents = echo._process.pid
child = os.fork()
if child == 0:
    print(echo.ask(b"two"), echo._process.pid != parents, flush=True)
    echo.end()
    os._exit(0)
os.waitpid(child, 0)
print(echo.ask(b"three"), echo._process.pid == parents)
"""


def test_a_fork_asks_a_process_of_its_own_and_leaves_its_parent_s_alone():
    """In a program of its own: JAX's threads are not for a fork."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    answers = [rf"{line}\n" for line in ("eno", "owt", "eerht")]
    assert done.stdout.splitlines() == [
        f"b'{answers[0]}'",
        f"b'{answers[1]}' True",
        f"b'{answers[2]}' True",
    ], done.stderr


def test_a_process_ends_with_its_worker():
    asked = of(ECHO)
    asked.ask(b"one")
    process = asked._process
    assert process.poll() is None
    del asked
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_a_program_with_many_open_files_may_ask(echo):
    """More than 1024, as a server with many clients has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    files = []
    try:
        while not files or files[-1] < 1100:
            files.append(os.dup(0))
        assert echo.ask(b"one") == b"eno\n" and echo._process.stdout.fileno() > 1024
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
