"""A missing or lost process is named; a request to stop reaches all; a stranger reaches nobody.

With real processes on localhost.
"""

import contextlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dcmdp_jax.distributed import rendezvous

MEMBER = """
import sys, time
from dcmdp_jax.distributed import rendezvous
try:
    address, processes, process, limit, secret = sys.argv[1:6]
    peers = rendezvous.join(address, int(processes), int(process), float(limit), secret)
except ValueError as error:
    print(error)
    sys.exit(2)
print("go", flush=True)
word = sys.stdin.readline().strip()
if word:
    peers.send(**{word: True})
while word != "done":
    time.sleep(0.01)
    if peers.stopping:
        print("stopping", flush=True)
        word = "done"
        peers.send(done=True)
time.sleep(0.2)
"""


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts a process that joins and then obeys one line of stdin: "done", "stop" or nothing."""
    started = []

    def process_of_run(address, processes, process, limit=20, folder=tmp_path / "run", secret=""):
        command = [
            sys.executable,
            "-c",
            MEMBER,
            str(address),
            str(processes),
            str(process),
            str(limit),
            str(folder),
        ]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {rendezvous.VARIABLE: secret}
        started.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        return started[-1]

    yield process_of_run
    for process in started:
        process.kill()
        process.communicate()


def ended(process, status):
    """Returns what the process printed, once it has ended with `status`."""
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, (out, err)
    return out + err


def all_joined(processes):
    """Returns True once every process has joined."""
    return [process.stdout.readline() for process in processes] == ["go\n"] * len(processes)


def leave(process):
    print("done", file=process.stdin, flush=True)


def test_all_join_in_any_order(port, start):
    """Process 0 is the last to be started; its port is free afterwards, for JAX's coordinator."""
    early = [start(f"127.0.0.1:{port}", 3, i) for i in (2, 1)]
    time.sleep(0.5)
    processes = [start(f"127.0.0.1:{port}", 3, 0), *early]
    assert all_joined(processes)
    with socket.create_server(("127.0.0.1", port)):
        pass
    for process in processes:
        leave(process)
    for process in processes:
        assert ended(process, 0) == ""


def test_every_process_names_those_that_are_missing(port, start):
    message = f"process 1, 3 of 4 did not connect to 127.0.0.1:{port} within 2 s"
    present = [start(f"127.0.0.1:{port}", 4, i, limit=2) for i in (0, 2)]
    for process in present:
        assert message in ended(process, 2)


def test_a_missing_process_0_is_named(port, start):
    process = start(f"127.0.0.1:{port}", 2, 1, limit=1)
    message = (
        f"process 1 found no process 0 at 127.0.0.1:{port} within 1 s (Connection refused); start "
        "process 0 there, correct --coordinator, or open the port"
    )
    assert message in ended(process, 2)


def test_an_unknown_host_is_named(start):
    process = start("no-such-host.invalid:1234", 2, 1, limit=1)
    message = "found no process 0 at no-such-host.invalid:1234 within 1 s (no such host name)"
    assert message in ended(process, 2)


def test_a_port_in_use_is_named(port, start):
    with socket.create_server(("127.0.0.1", port)):
        process = start(f"127.0.0.1:{port}", 2, 0)
        message = f"process 0 cannot listen on port {port} (Address already in use)"
        assert message in ended(process, 2)


def test_a_server_that_is_no_process_0_is_named(port, start):
    with socket.create_server(("127.0.0.1", port)) as other:
        process = start(f"127.0.0.1:{port}", 2, 1)
        other.accept()[0].close()
        message = f"process 1 reached 127.0.0.1:{port}, but what answers there is no process 0"
        assert message in ended(process, 2)


@pytest.mark.parametrize(
    "others, message",
    [
        (((3, 1),), "was started as one of 3 processes, process 0 as one of 2"),
        (((3, 1), (3, 1)), "process 1 has been started twice, on "),
    ],
    ids=["numbers", "twice"],
)
def test_processes_that_do_not_belong_together(port, start, others, message):
    count = 2 if len(others) == 1 else 3
    everybody = [
        start(f"127.0.0.1:{port}", count, 0),
        *(start(f"127.0.0.1:{port}", *other) for other in others),
    ]
    for process in everybody:
        assert message in ended(process, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("127.0.0.1", 2, 0), "the coordinator '127.0.0.1' is not HOST:PORT"),
        (("127.0.0.1:http", 2, 0), "is not HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "process 2 is not one of 2 processes"),
    ],
)
def test_impossible_arguments_are_refused(start, arguments, message):
    assert message in ended(start(*arguments), 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_by_the_others(port, start, lost):
    everybody = [start(f"127.0.0.1:{port}", 3, i) for i in range(3)]
    assert all_joined(everybody)
    everybody[lost].send_signal(signal.SIGKILL)
    name = f"process 0 at 127.0.0.1:{port}" if lost == 0 else f"process 1 on {socket.gethostname()}"
    for process in everybody[:lost] + everybody[lost + 1 :]:
        assert f"dcmdp: {name} is gone; the same commands go on from the last checkpoint" in ended(
            process, 1
        )


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_request_to_stop_reaches_all(port, start, stopped):
    everybody = [start(f"127.0.0.1:{port}", 3, i) for i in range(3)]
    assert all_joined(everybody)
    for process in everybody:
        print("stop" if process is everybody[stopped] else "", file=process.stdin, flush=True)
    for process in everybody[:stopped] + everybody[stopped + 1 :]:
        assert ended(process, 0) == "stopping\n"


# Strangers


def listening(port):
    """Returns True if a server listens on `port`, without connecting to it."""
    with open("/proc/net/tcp", encoding="utf-8") as table:
        return any(f":{port:04X} 00000000:0000 0A" in row for row in table)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def connected(port):
    """Yields a stranger's connection, process 0's nonce, and a reader."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
        connection.makefile("rb") as reader,
    ):
        yield connection, json.loads(reader.readline())["nonce"], reader


def greeting(secret, nonce, process=1, processes=2, host="here", **others):
    """Returns what a process of the run sends."""
    words = json.dumps([nonce, "own", process, processes, host]).encode()
    proof = hmac.new(secret.encode(), words, "sha256").hexdigest()
    message = {
        "nonce": "own",
        "process": process,
        "processes": processes,
        "host": host,
        "proof": proof,
    }
    return json.dumps(message | others).encode() + b"\n"


def secret_of(folder):
    return (folder / rendezvous.FILE).read_text()


def without_proof(port, nonce, folder):
    return json.dumps({"process": 1, "processes": 2, "host": "\x1b[2Jhere"}).encode() + b"\n"


def wrong_secret(port, nonce, folder):
    return greeting("another secret, as long", nonce)


def answer_to_another_nonce(port, nonce, folder):
    with connected(port) as (_, other, _):
        return greeting(secret_of(folder), other)


def other_words_under_a_proof(port, nonce, folder):
    return greeting(secret_of(folder), nonce, process=0)[:-2] + b', "process": 1}\n'


STRANGERS = {
    "no proof": without_proof,
    "wrong secret": wrong_secret,
    "replayed": answer_to_another_nonce,
    "altered": other_words_under_a_proof,
    "proof of another type": lambda *_: greeting("", "", proof=["x"]),
    "surrogates": lambda *_: greeting("", "", proof="\ud800", host="\udfff"),
    "true": lambda port, nonce, folder: greeting(secret_of(folder), nonce, process=True),
    "garbage": lambda *_: bytes(range(256)) + b"\n",
    "http": lambda *_: b"GET / HTTP/1.1\r\n\r\n",
    "nested": lambda *_: b"[" * 9000 + b"\n",
    "a deep word": lambda *_: b'{"host": ' + b"[" * 9000 + b"\n",
    "a long number": lambda *_: b'{"process": ' + b"9" * 9000 + b"}\n",
    "escapes": lambda *_: b'{"lost": "\\u001b[2J\\u001b]0;owned\\u0007"}\n{"stop": true}\n',
}


@pytest.mark.parametrize("send", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_refused_with_one_warning(port, start, tmp_path, send):
    """Two connections of strangers, then the run goes on."""
    first = start(f"127.0.0.1:{port}", 2, 0)
    until(lambda: listening(port))
    for _ in range(2):
        with connected(port) as (connection, nonce, reader):
            connection.sendall(send(port, nonce, tmp_path / "run"))
            assert reader.read() == b"", "process 0 sends nothing and disconnects"
    second = start(f"127.0.0.1:{port}", 2, 1)
    assert all_joined([first, second])
    for process in (first, second):
        leave(process)
    warning = (
        "dcmdp: a connection from 127.0.0.1 without the run's secret was refused; further ones "
        "are counted, not printed\n"
    )
    assert ended(first, 0) == warning and ended(second, 0) == ""


def test_slow_and_endless_strangers_delay_nobody(port, start):
    """Forty are silent, one sends part of a line, one a line of a gigabyte."""
    first = start(f"127.0.0.1:{port}", 2, 0)
    until(lambda: listening(port))
    with contextlib.ExitStack() as held:
        for _ in range(40):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        dripping, _, _ = held.enter_context(connected(port))
        dripping.sendall(b"{")
        endless, _, _ = held.enter_context(connected(port))
        sent = 0
        with pytest.raises(OSError):
            while sent < 2**30:
                sent += endless.send(b"a" * 65536)
        assert sent < 2**24, "a line that is too long is not read to its end"
        began = time.monotonic()
        second = start(f"127.0.0.1:{port}", 2, 1)
        assert all_joined([first, second])
        assert time.monotonic() - began < 4, "sooner than a silent connection is closed"


@pytest.mark.slow
def test_a_greeting_of_single_bytes_is_closed_in_time(port, start):
    """A byte now and then does not restart the clock."""
    first = start(f"127.0.0.1:{port}", 2, 0)
    until(lambda: listening(port))
    began = time.monotonic()
    with connected(port) as (connection, _, _), pytest.raises(OSError):
        while time.monotonic() - began < 20:
            connection.sendall(b" ")
            time.sleep(0.2)
    took = time.monotonic() - began
    assert rendezvous.GREETING_SECONDS - 0.5 < took < rendezvous.GREETING_SECONDS + 3
    assert first.poll() is None


def test_strangers_are_counted_in_a_timeouts_message(port, start):
    first = start(f"127.0.0.1:{port}", 2, 0, limit=3)
    until(lambda: listening(port))
    for _ in range(3):
        with connected(port) as (connection, _, reader):
            connection.sendall(b"\n")
            reader.read()
    output = ended(first, 2)
    assert "process 1 of 2 did not connect" in output
    assert "; 3 connections were refused without the run's secret" in output


@pytest.mark.parametrize(
    "answers",
    [
        b'{"answer": "go"}\n',
        b'{"answer": "go", "proof": "00"}\n',
        b'{"answer": "\\u001b[2Jowned", "proof": ""}\n',
        b'{"go": true}\n',
        b"\n",
        b"[" * 9000 + b"\n",
        b"\xff\xfe\n",
        b"",
    ],
)
def test_an_impostor_of_process_0_is_refused(port, start, tmp_path, answers):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / rendezvous.FILE).write_text("5" * 64)
    with socket.create_server(("127.0.0.1", port)) as impostor:
        caller = start(f"127.0.0.1:{port}", 2, 1)
        connection, _ = impostor.accept()
        with connection:
            connection.sendall(b'{"nonce": "x"}\n')
            assert b"5" * 64 not in connection.recv(9000)
            connection.sendall(answers)
        output = ended(caller, 2)
        refused = f"process 1 was not accepted at 127.0.0.1:{port}"
        assert f"{refused}: process 0 there has another secret" in output
        assert "\x1b" not in output


@pytest.mark.parametrize("when", ["refused", "lost"])
def test_escapes_from_a_process_of_the_run_are_not_printed(port, start, tmp_path, when):
    """In its host's name, and in its reason to end the others."""
    first = start(f"127.0.0.1:{port}", 2, 0)
    until(lambda: listening(port))
    with connected(port) as (connection, nonce, reader):
        secret = secret_of(tmp_path / "run")
        connection.sendall(
            greeting(
                secret,
                nonce,
                processes=3 if when == "refused" else 2,
                host="a\x1b[2J\u202eb\n" * 900,
            )
        )
        answer = json.loads(reader.readline())
        words = json.dumps([nonce, "own", answer["answer"]]).encode()
        assert answer["proof"] == hmac.new(secret.encode(), words, "sha256").hexdigest()
        if when == "lost":
            connection.sendall(
                json.dumps({"lost": "\x1b]0;owned\x07gone\n" + 900 * "x"}).encode() + b"\n"
            )
        output = ended(first, 2 if when == "refused" else 1)
    assert ("a?[2J?b?" in output) == (when == "refused")
    assert ("?]0;owned?gone?xxx" in output) == (when == "lost")
    assert all(c.isprintable() for line in output.splitlines() for c in line)
    assert len(output) < 2500


# The secret


def test_the_secrets_file_is_private_and_gone_afterwards(port, start, tmp_path):
    folder = tmp_path / "new" / "run"
    first = start(f"127.0.0.1:{port}", 2, 0, folder=folder)
    until(lambda: listening(port))
    assert (folder / rendezvous.FILE).stat().st_mode & 0o777 == 0o600
    assert len(secret_of(folder)) == 64
    second = start(f"127.0.0.1:{port}", 2, 1, folder=folder)
    assert all_joined([first, second])
    until(lambda: not list(tmp_path.iterdir()))


@pytest.mark.parametrize("left", ["7" * 64, "7" * 30, ""], ids=["complete", "half", "empty"])
def test_a_secret_that_a_killed_process_left_is_no_obstacle(port, start, tmp_path, left):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / rendezvous.FILE).write_text(left)
    late = start(f"127.0.0.1:{port}", 2, 1)
    both = [start(f"127.0.0.1:{port}", 2, 0), late]
    assert all_joined(both)
    until(lambda: not list((tmp_path / "run").iterdir()))


def test_the_launchers_secret_needs_no_shared_folder(port, start, tmp_path):
    secret = "given by the launcher"
    both = [
        start(f"127.0.0.1:{port}", 2, i, folder=tmp_path / str(i), secret=secret) for i in (0, 1)
    ]
    assert all_joined(both)
    assert not list(tmp_path.iterdir())


def test_another_launchers_secret_is_refused_on_both_sides(port, start):
    first = start(f"127.0.0.1:{port}", 2, 0, limit=4, secret="given by the launcher")
    second = start(f"127.0.0.1:{port}", 2, 1, secret="of another launcher")
    assert "process 1 was not accepted at" in ended(second, 2)
    assert "; 1 connection was refused without the run's secret" in ended(first, 2)


def test_a_folder_that_is_not_shared_is_named(port, start, tmp_path):
    folder = tmp_path / "not shared"
    start(f"127.0.0.1:{port}", 2, 0, secret="given by the launcher")
    output = ended(start(f"127.0.0.1:{port}", 2, 1, limit=1, folder=folder), 2)
    assert f"process 1 finds no {folder / rendezvous.FILE}" in output
    assert "not on a file system shared" in output


def test_a_short_secret_is_refused(port, start):
    process = start(f"127.0.0.1:{port}", 2, 0, secret="short")
    assert "DCMDP_SECRET has 5 characters" in ended(process, 2)
