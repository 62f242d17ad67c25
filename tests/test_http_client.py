"""The client of servers: order, faults, repeated attempts, interruption."""

import asyncio
import queue
import socket
import sys
import threading
import types

import pytest

from dcmdp_jax.rollout import http_client
from dcmdp_jax.rollout.http_client import BadReply, Call, Client, ServerError
from dcmdp_jax.stopping import Interrupted
from support.servers import StandIn, closed, cut_reply, half_json, held, once, send, status


class Echo:
    """Answers a request with the number in it."""

    path = "/echo"
    keeps = False

    def complete(server, body):
        return {"number": body["number"]}

    def control(server, method, path, body):
        return 404, {"detail": "Not Found"}


@pytest.fixture
def server():
    with StandIn(Echo) as server:
        yield server


def impatient(url, **options):
    """A client that waits for little between two attempts."""
    return Client(url, "echo", first_wait=0.01, longest_wait=0.05, **options)


def number_of(reply, number):
    if not isinstance(reply, dict) or type(reply.get("number")) is not int:
        raise BadReply("has no number")
    return reply["number"]


def ask(server, count=8, **options):
    client = impatient(server.url, **({"timeout": 20} | options))
    return client.send([Call("POST", "/echo", {"number": i}) for i in range(count)], number_of)


PASSING = {
    "500": status(500),
    "503": status(503),
    "429": status(429),
    "a cut reply": cut_reply,
    "half of the JSON": half_json,
    "no reply": closed,
    "another form": lambda handler, number: send(handler, {"count": 3}) or True,
    "no object": lambda handler, number: send(handler, [1]) or True,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_passing_fault_is_waited_out_and_every_answer_is_in_its_place(server, fault):
    server.faults.append(once(1, 4)(fault))
    assert ask(server) == list(range(8))
    assert len(server.asked) == 10  # each of the two was asked for once more


LASTING = {
    "500": (status(500), 3, "answers POST /echo with status 500: .*injected.*; look at its log"),
    "503": (status(503), 4, "answers POST /echo with status 503"),
    "a cut reply": (cut_reply, 4, "breaks off its reply to POST /echo"),
    "half of the JSON": (half_json, 2, "its reply is cut off or not JSON"),
    "no reply": (closed, 4, "breaks off its reply"),
    "another form": (
        lambda handler, number: send(handler, {"count": 3}) or True,
        2,
        "in another form than expected: its reply has no number",
    ),
    "400": (status(400), 1, "answers POST /echo with status 400.*; look at its log"),
    "404": (status(404), 1, "answers POST /echo with status 404.*; look at its log"),
    "401": (status(401), 1, "it asks for a key; set DCMDP_SERVER_API_KEY in the environment"),
    "301": (status(301), 1, "answers POST /echo with status 301.*; give another address"),
}


@pytest.mark.parametrize("fault, attempts, message", LASTING.values(), ids=LASTING)
def test_a_lasting_fault_is_one_sentence(server, fault, attempts, message):
    server.faults.append(fault)
    with pytest.raises(ServerError, match=message) as caught:
        ask(server, count=1, attempts=4)
    assert len(server.asked) == attempts
    assert server.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_time_out_is_waited_out(server):
    gate = threading.Event()
    server.faults.append(once(0)(held(gate)))
    assert ask(server, timeout=0.5) == list(range(8))
    gate.set()


def test_a_lasting_time_out_is_one_sentence(server):
    gate = threading.Event()
    server.faults.append(held(gate))
    with pytest.raises(ServerError, match=r"does not answer POST /echo within 0.2 s \(2 attempts"):
        ask(server, count=1, timeout=0.2)
    assert len(server.asked) == 2
    gate.set()


def test_the_time_of_all_attempts_is_told(server, monkeypatch):
    clock = iter((100.0, 142.0))
    fake = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(http_client, "time", fake)
    server.faults.append(status(500))
    with pytest.raises(ServerError, match=r"\(3 attempts in 42 s\)"):
        ask(server, count=1)


def test_the_pauses_of_a_request_are_ten_minutes():
    client = Client("http://a")
    pauses = [
        min(client.first_wait * 2**i, client.longest_wait) for i in range(client.attempts - 1)
    ]
    assert 590 < sum(pauses) < 610


def test_a_long_wait_is_told_once(server, capsys):
    server.faults.append(status(503))
    with pytest.raises(ServerError):
        ask(server, attempts=7)
    said = f"waiting for echo at {server.url}, which answers POST /echo with status"
    assert capsys.readouterr().err.count(said) == 1


def test_a_late_answer_is_not_taken(server):
    """The first attempt's answer comes while the second is under way."""
    second_asked = threading.Event()

    def fault(handler, number):
        if number == 0:
            second_asked.wait(20)
            send(handler, {"number": 99})
            return True
        second_asked.set()
        return False

    server.faults.append(fault)
    assert ask(server, count=1, timeout=0.5) == [0]


def test_a_refused_connection_is_one_sentence():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"^echo at {url} cannot be reached .*; start it"):
            impatient(url, attempts=2).get("/echo")


def test_a_server_that_comes_back_is_waited_for(server):
    client = impatient(server.url, attempts=200)
    server.hang_up()
    threading.Timer(0.3, server.listen, (server.http.server_port,)).start()
    assert client.send([Call("POST", "/echo", {"number": 3})], number_of) == [3]


def test_one_request_that_fails_for_good_ends_the_others(server):
    gate = threading.Event()
    server.faults += [once(*range(1, 8))(held(gate)), once(0)(status(400))]
    with pytest.raises(ServerError, match="status 400"):
        ask(server)
    gate.set()


def test_an_interruption_cancels_what_is_under_way(server):
    asked = threading.Event()
    ends = queue.Queue()

    def hold(handler, number):
        asked.set()
        ends.put(handler.connection.recv(1))  # nothing more, once the client has closed it
        return True

    server.faults.append(hold)
    client = Client(server.url, "echo", connections=1)
    calls = [Call("POST", "/echo", {"number": i}) for i in range(8)]
    with pytest.raises(Interrupted):
        client.send(calls, number_of, should_stop=asked.is_set)
    assert ends.get(timeout=60) == b"" and len(server.asked) == 1


def test_waiting_for_a_server_is_interrupted(server):
    server.faults.append(status(503))
    with pytest.raises(Interrupted):
        Client(server.url, first_wait=60.0, longest_wait=60.0).send(
            [Call("POST", "/echo", {"number": 1})], should_stop=lambda: bool(server.asked)
        )


def test_it_works_inside_a_running_event_loop(server):
    """As in a notebook."""

    async def cell():
        return ask(server)

    assert asyncio.run(cell()) == list(range(8))


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "",
        "http://",
        "http://127.0.0.1:80o0",
        "http://127.0.0.1:99999",
        "http://[::1",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="is no address of a server.*; give http://HOST:PORT"):
        Client(url)


def test_a_key_of_the_environment_is_sent(server, monkeypatch):
    monkeypatch.setenv("DCMDP_SERVER_API_KEY", "abc\n")
    keys = []
    server.faults.append(lambda handler, number: keys.append(handler.headers["Authorization"]))
    ask(server, count=1)
    assert keys == ["Bearer abc"]


def test_no_key_is_sent_unless_one_is_set(server, monkeypatch):
    monkeypatch.delenv("DCMDP_SERVER_API_KEY", raising=False)
    keys = []
    server.faults.append(lambda handler, number: keys.append(handler.headers["Authorization"]))
    ask(server, count=1)
    assert keys == [None]


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch):
    monkeypatch.setenv("DCMDP_SERVER_API_KEY", "a\nb")
    with pytest.raises(ValueError, match="^DCMDP_SERVER_API_KEY holds characters"):
        Client("http://127.0.0.1:1")


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ValueError, match=r"pip install 'dcmdp-jax\[server\]'"):
        Client("http://127.0.0.1:1")
