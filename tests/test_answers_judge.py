"""What our reader cannot read is judged by math-verify, in processes that can be ended."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dcmdp_jax.answers import compare, judge, worker

CALCULUS = [
    (r"\int_0^1 3x^2\,dx", "1", True),
    (r"\int_0^1 3x^2\,dx", "2", False),
    (r"\sum_{k=1}^{4} k", "10", True),
    (r"\sum_{k=1}^{4} k", "11", False),
    (r"\int_0^a 2x\,dx", "a^2", True),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", "1", True),
]
HANGS = r"9^{9^{9^9}}", "1"


@pytest.fixture
def pool():
    made = []

    def make(*options, **named):
        made.append(judge.Pool(*options, **named))
        return made[-1]

    yield make
    for processes in made:
        while not processes._idle.empty():
            processes._idle.get().end()


def started(processes):
    """Process ids of those of a pool that have been started."""
    found = [idle._process for idle in processes._idle.queue]
    return [process.pid for process in found if process is not None]


def running(pid):
    """True if a process is there and is no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds):
    """True if a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_what_the_reader_cannot_read_is_judged_by_the_library():
    for gold, answer, label in CALCULUS:
        assert compare.compare(gold, answer) is compare.Verdict.UNREADABLE
        assert judge.equal(gold, answer) is label
    assert judge.library().given_up == 0


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("1/2", "0.5"),
        ("1/2", "1/3"),
        ("", ""),
        ("1", r"\int " * 1000),
        (r"\int x dx", r"\int x dx"),
    ],
)
def test_what_the_reader_can_read_is_judged_without_the_library(gold, answer, monkeypatch):
    monkeypatch.setattr(judge, "library", None)
    assert judge.equal(gold, answer) is compare.equal(gold, answer)


GENEROUS = [
    (r"\int_0^1 x^2 dx", "0.333333"),
    (r"\{1, 1, 2\}", r"\{1, 2\}"),
    ("(1, 2)", r"\{1, 2\}"),
    (r"\begin{matrix}0.333333\end{matrix}", r"\begin{matrix}1/3\end{matrix}"),
    ("x^2+C", "x^2+c"),
    ("52_8", "52"),
    (r"7 \text{ or more}", "7"),
    (r"\pi", "3.14159265358979"),
]


def test_the_library_is_not_as_generous_as_it_comes(pool):
    generous = pool([*judge.COMMAND, "alone"])
    strict = pool()
    assert all(generous.equal(*pair) for pair in GENEROUS)
    assert not [pair for pair in GENEROUS if strict.equal(*pair)]


def test_neighbours_of_what_the_library_judges_are_different():
    matrix = r"\begin{pmatrix} 7 & 2 \\ 3 & x+1 \end{pmatrix}"
    same = [
        matrix.replace("pmatrix", "bmatrix"),
        matrix.replace("x+1", "1+x"),
        matrix.replace("7", "7.0"),
    ]
    others = [
        matrix.replace("7", "8"),
        matrix.replace("7 & 2", "2 & 7"),
        matrix.replace("x", "y"),
        matrix.replace("7", "7.0000001"),
        matrix.replace("pmatrix", "vmatrix"),
        "7, 2, 3, x+1",
        matrix.replace("7 & 2", r"7 \\ 2"),
        "-" + matrix,
        matrix + r" \text{ cm}",
    ]
    assert all(judge.equal(matrix, answer) for answer in same)
    assert not [answer for answer in others if judge.equal(matrix, answer)]


def test_a_pair_is_compared_once(pool, monkeypatch):
    processes = pool(processes=1)
    assert processes.equal(*CALCULUS[0][:2])
    monkeypatch.setattr(worker.Worker, "ask", None)
    assert processes.equal(*CALCULUS[0][:2])


def test_a_comparison_that_takes_too_long_is_ended_and_the_next_is_answered(pool):
    processes = pool(seconds=1.0, processes=1)
    assert processes.equal(*CALCULUS[0][:2])
    assert not processes.equal(*HANGS)
    assert processes.given_up == 1
    assert processes.equal(*CALCULUS[2][:2]) and processes.given_up == 1


FAKE = "import os, sys, time; print('ready', flush=True)\nfor line in sys.stdin: {}"


@pytest.fixture
def fake(pool, tmp_path):
    """Makes a pool of one process that does `act` when it is asked; returns it and its starts."""

    def make(act):
        log = tmp_path / "starts"
        program = f"open({str(log)!r}, 'a').write('started ')\n" + FAKE.format(act)
        processes = pool([sys.executable, "-c", program], seconds=0.5, processes=1, slack=2.5)
        return processes, lambda: len(log.read_text().split())

    return make


def test_a_reply_is_the_verdict(fake):
    processes, _ = fake("print('true', flush=True)")
    assert processes.equal("1", "1")
    assert processes.given_up == 0


@pytest.mark.parametrize(
    "act", ["time.sleep(600)", "sys.exit(3)", "print('maybe', flush=True)", "os.abort()"]
)
def test_a_process_that_hangs_or_dies_gives_no_verdict(act, fake):
    processes, _ = fake(act)
    assert not processes.equal("1", "1")
    assert processes.given_up == 1


@pytest.mark.parametrize(
    "act, times",
    [
        ("time.sleep(600)", 1),
        ("sys.exit(3)", 2),
        ("print('maybe', flush=True)", 2),
        ("os.abort()", 2),
        ("print('true', flush=True)", 1),
    ],
)
def test_a_process_that_dies_is_asked_once_more(act, times, fake):
    """It may have been ended while it was idle; one that hangs is not asked again."""
    processes, starts = fake(act)
    processes.equal("1", "1")
    assert starts() == times


def test_a_process_that_is_killed_while_it_is_idle_is_asked_again(pool):
    processes = pool(processes=1)
    for gold, answer, label in CALCULUS[:3]:
        assert processes.equal(gold, answer) is label
        os.kill(started(processes)[0], signal.SIGKILL)
    assert processes.given_up == 0


INTERRUPTS = """
import json, os, signal, sys, time
print('ready', flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    if answer == 'interrupt':
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
    print('false' if answer == 'wrong' else 'true', flush=True)
"""


def test_an_interrupted_question_leaves_no_reply_for_the_next(pool):
    """Ctrl-C comes while the process that asks waits, and the reply after it."""
    processes = pool([sys.executable, "-c", INTERRUPTS], processes=1)
    assert processes.equal("1", "right")
    with pytest.raises(KeyboardInterrupt):
        processes.equal("1", "interrupt")
    assert not processes.equal("1", "wrong")


@pytest.fixture
def process_id(pool):
    """Of the one process of a pool that was needed."""
    processes = pool()
    assert processes.equal(*CALCULUS[0][:2])
    (pid,) = started(processes)
    return pid


def test_a_process_has_a_memory_limit(process_id):
    limits = pathlib.Path(f"/proc/{process_id}/limits").read_text()
    assert f"Max address space         {2 << 30}" in limits


def test_a_process_has_a_session_of_its_own(process_id):
    """Ctrl-C at the terminal is not for it."""
    assert os.getpgid(process_id) != os.getpgrp()


def test_threads_share_the_processes(pool):
    processes = pool()
    pairs = [
        (rf"\sum_{{k=1}}^{{{n}}} k", str(n * (n + 1) // 2 + n % 2), n % 2 == 0)
        for n in range(2, 26)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pair: processes.equal(*pair[:2]), pairs))
    assert found == [label for *_, label in pairs]
    assert len(started(processes)) == judge.PROCESSES and processes.given_up == 0


@pytest.fixture
def absent(pool):
    """A pool whose processes have no math-verify."""
    return pool([sys.executable, "-S", *judge.COMMAND[1:]])


def test_without_the_library_answers_that_need_it_are_different(absent):
    assert not any(absent.equal(gold, answer) for gold, answer, _ in CALCULUS)
    assert absent.given_up == 0 and not started(absent)


def test_an_absent_library_is_reported_once(absent, capfd):
    for gold, answer, _ in CALCULUS:
        absent.equal(gold, answer)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "No module named 'math_verify'" in err
    assert "pip install 'dcmdp-jax[answers]'" in err


PARENT = """
import threading, time
from dcmdp_jax.answers import judge
pool = judge.Pool(seconds=2.0, processes=1)
process = pool._idle.queue[0]
pool.equal("1", "x")
print(process._process.pid, flush=True)
if {busy}:
    threading.Thread(target=pool.equal, args={hangs}, daemon=True).start()
    time.sleep(0.5)
print("asked", flush=True)
time.sleep({rest})
"""


@pytest.mark.parametrize("busy, rest", [(False, 600), (True, 600), (False, 0), (True, 0)])
def test_a_process_ends_with_its_parent(busy, rest):
    """Killed or come to its end, while the process is idle and while it compares."""
    program = PARENT.format(busy=busy, hangs=HANGS, rest=rest)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "asked\n"
    if rest:
        assert running(pid)
        parent.kill()
    assert gone(pid, 6.0)
    assert parent.wait(10.0) == (-signal.SIGKILL if rest else 0)


def test_the_library_prints_replies_alone():
    process = subprocess.run(
        [*judge.COMMAND, "5"],
        input='["1", "1.0"]\n["1", "2"]\n',
        text=True,
        capture_output=True,
        check=True,
    )
    assert process.stdout == "ready\ntrue\nfalse\n"
