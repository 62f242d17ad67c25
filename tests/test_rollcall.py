"""Who is missing is named, who is lost is named, and a request to stop reaches everybody; real processes on localhost."""

import signal
import socket
import subprocess
import sys
import time

import pytest

WAITS = """
import sys, time
from dcmdp_jax import rollcall
try:
    roll = rollcall.call(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
except ValueError as error:
    print(error)
    sys.exit(2)
print("go", flush=True)
word = sys.stdin.readline().strip()
if word:
    roll.send(**{word: True})
while word != "done":
    time.sleep(0.01)
    if roll.stopping:
        print("stopping", flush=True)
        word = "done"
        roll.send(done=True)
time.sleep(0.2)
"""


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def start():
    started = []

    def one(address, processes, process, limit=20):
        command = [sys.executable, "-c", WAITS, str(address), str(processes), str(process), str(limit)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def ended(process, status):
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, (out, err)
    return out + err


def test_all_there(port, start):
    """In any order, process 0 late."""
    late = [start(f"127.0.0.1:{port}", 3, i) for i in (2, 1)]
    time.sleep(0.5)
    everybody = [start(f"127.0.0.1:{port}", 3, 0), *late]
    assert [process.stdout.readline() for process in everybody] == ["go\n"] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free for JAX's coordinator while the lines stay open
    assert [ended(process, 0) for process in everybody if not print("done", file=process.stdin, flush=True)] == [""] * 3


def test_the_missing_are_named_by_all(port, start):
    there = [start(f"127.0.0.1:{port}", 4, i, limit=2) for i in (0, 2)]
    for process in there:
        assert f"process 1, 3 of 4 did not call at 127.0.0.1:{port} within 2 s" in ended(process, 2)


def test_a_wrong_port_or_host_is_named(port, start):
    assert f"process 1 found no process 0 at 127.0.0.1:{port} within 1 s (Connection refused)" in ended(
        start(f"127.0.0.1:{port}", 2, 1, limit=1), 2)
    assert "found no process 0 at no-such-host.invalid:1234 within 1 s (no such host name)" in ended(
        start("no-such-host.invalid:1234", 2, 1, limit=1), 2)
    with socket.create_server(("127.0.0.1", port)) as other:
        assert f"process 0 cannot listen on port {port} (Address already in use)" in ended(start(f"127.0.0.1:{port}", 2, 0), 2)
        caller = start(f"127.0.0.1:{port}", 2, 1)
        other.accept()[0].close()
        assert f"process 1 reached 127.0.0.1:{port}, but what answers there is no process 0" in ended(caller, 2)


def test_a_stranger_is_ignored(port, start):
    first = start(f"127.0.0.1:{port}", 2, 0)
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    second = start(f"127.0.0.1:{port}", 2, 1)
    assert [process.stdout.readline() for process in (first, second)] == ["go\n"] * 2


@pytest.mark.parametrize("others, message", [
    (((3, 1),), "was started as one of 3 processes, process 0 as one of 2"),
    (((3, 1), (3, 1)), "process 1 has been started twice, on "),
], ids=["numbers", "twice"])
def test_processes_that_do_not_belong_together(port, start, others, message):
    count = 2 if len(others) == 1 else 3
    everybody = [start(f"127.0.0.1:{port}", count, 0), *(start(f"127.0.0.1:{port}", *other) for other in others)]
    for process in everybody:
        assert message in ended(process, 2)


@pytest.mark.parametrize("arguments, message", [
    (("127.0.0.1", 2, 0), "the coordinator '127.0.0.1' is not HOST:PORT"),
    (("127.0.0.1:http", 2, 0), "is not HOST:PORT"),
    (("127.0.0.1:1", 2, 2), "process 2 is not one of 2 processes")])
def test_arguments(start, arguments, message):
    assert message in ended(start(*arguments), 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_by_the_others(port, start, lost):
    everybody = [start(f"127.0.0.1:{port}", 3, i) for i in range(3)]
    assert [process.stdout.readline() for process in everybody] == ["go\n"] * 3
    everybody[lost].send_signal(signal.SIGKILL)
    name = f"process 0 at 127.0.0.1:{port}" if lost == 0 else f"process 1 on {socket.gethostname()}"
    for process in everybody[:lost] + everybody[lost + 1:]:
        assert f"dcmdp: {name} is gone; the same commands go on from the last checkpoint" in ended(process, 1)


@pytest.mark.parametrize("asked", [0, 2])
def test_a_request_to_stop_reaches_all(port, start, asked):
    everybody = [start(f"127.0.0.1:{port}", 3, i) for i in range(3)]
    assert [process.stdout.readline() for process in everybody] == ["go\n"] * 3
    for process in everybody:
        print("stop" if process is everybody[asked] else "", file=process.stdin, flush=True)
    for process in everybody[:asked] + everybody[asked + 1:]:
        assert ended(process, 0) == "stopping\n"
