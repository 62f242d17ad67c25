"""The gRPC service, called by JetStream's own client stubs, and what may go wrong between them."""

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from dcmdp_jax.serving import server, service
from dcmdp_jax.tokens import tokenizer
from support.serving import (
    GREEDY,
    NEW,
    POSITIONS,
    PROMPT,
    SLOTS,
    STEPS,
    TOKENIZER,
    Gate,
    connect,
    decode,
    fail,
    greedy,
    healthy,
    long_prompts,
    make_engine,
    make_prompts,
    make_weights,
    received,
    refusal,
    text_request,
    tokens_request,
    until,
)

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def loop():
    """gRPC's event loop, in a thread; all servers of this process share it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def started(loop):
    """Starts a server with its driver; returns (driver, port)."""
    running = []

    def start(tokenizer=TOKENIZER, waiting=200, rpcs=300):
        driver = service.OrchestratorDriver(
            make_engine(), make_weights(), waiting=waiting, sampling=GREEDY
        )

        async def run():
            grpc_server, port = server.listen("127.0.0.1", 0, rpcs)
            servicer = service.Orchestrator(driver, tokenizer, PROMPT)
            service.add_service(servicer, grpc_server)
            await grpc_server.start()
            return grpc_server, port

        grpc_server, port = asyncio.run_coroutine_threadsafe(run(), loop).result()
        running.append((driver, grpc_server))
        return driver, port

    yield start
    for driver, grpc_server in running:
        asyncio.run_coroutine_threadsafe(grpc_server.stop(None), loop).result()
        assert driver.stop(timeout=60)


# Answers


def test_prompts_include_completions_that_stop_and_that_do_not():
    assert {len(tokens) for tokens in greedy()} != {NEW} and long_prompts()


def test_token_requests_get_the_argmax_of_the_full_forward(started):
    """Prompts of different lengths, more at a time than slots; the stop token is the last id."""
    driver, port = started()
    with ThreadPoolExecutor(8) as pool:
        completions = list(
            pool.map(lambda prompt: decode(port, tokens_request(prompt)), make_prompts())
        )
    assert [tokens for tokens, *_ in completions] == greedy()
    assert all(text == "" and version == 0 for _, text, _, version in completions)
    assert healthy(port) and driver.running == driver.waiting == 0


def test_a_completion_streams_a_message_for_each_dispatch(started):
    _, port = started()
    for prompt in make_prompts()[:6]:
        tokens, _, messages, _ = decode(port, tokens_request(prompt))
        assert messages == -(-len(tokens) // STEPS)


def test_text_requests_get_text_without_the_stop_token(started):
    _, port = started()
    for prompt, expected in zip(make_prompts(), greedy()):
        tokens, text, *_ = decode(port, text_request(TOKENIZER.decode(prompt)))
        assert tokens == expected
        assert text == TOKENIZER.decode(expected[:-1] if expected[-1] == 1 else expected)


def test_text_that_looks_like_a_byte_stays_text(started):
    """JetStream would decode a piece `<0x41>` as A."""

    class Fixed(tokenizer.CharacterTokenizer):
        def decode(self, ids):
            return "<0x41>" * len(ids)

    _, port = started(tokenizer=Fixed(TOKENIZER.alphabet))
    tokens, text, *_ = decode(port, text_request("a", max_tokens=1))
    assert text == "<0x41>" * (len(tokens) - (tokens[-1] == 1)) and tokens


# Refusals

BAD = {
    "empty": (tokens_request([]), "the prompt is empty"),
    "empty text": (text_request(""), "the prompt is empty"),
    "over-long": (
        tokens_request([2] * (PROMPT + 1)),
        f"has {PROMPT + 1} tokens and this server takes {PROMPT}",
    ),
    "over-long text": (
        text_request("a" * 1000),
        f"has 1000 characters; the {PROMPT} tokens that this server takes hold {PROMPT} at most",
    ),
    "one character too many": (text_request("a" * (PROMPT + 1)), f"has {PROMPT + 1} characters"),
    "out of vocabulary": (
        tokens_request([2, 37, 3]),
        "token id 37 is outside the vocabulary; ids go from 0 to 36",
    ),
    "negative": (tokens_request([2, -3]), "token id -3 is outside the vocabulary"),
    "text outside the alphabet": (text_request("A"), "is not in the alphabet"),
    "no new tokens": (tokens_request([2], 0), "max_tokens is 0; it must be at least 1"),
    "fewer than none": (tokens_request([2], -5), "max_tokens is -5"),
    "more than fit": (
        tokens_request([2] * 10, POSITIONS - 9),
        f"after 10 prompt tokens at most {POSITIONS - 10} fit",
    ),
    "far too many": (tokens_request([2], 2**31 - 1), "at most 63 fit"),
    "nothing": (jetstream_pb2.DecodeRequest(max_tokens=3), "the request has no content"),
    "session": (tokens_request([2], session_cache="x"), "session_cache is not kept"),
}


def test_an_impossible_request_is_refused_in_one_sentence_before_the_queue(started, monkeypatch):
    driver, port = started()
    monkeypatch.setattr(
        driver, "submit", lambda request: pytest.fail("a bad request reached the queue")
    )
    for name, (request, sentence) in BAD.items():
        code, details = refusal(port, request)
        assert code == grpc.StatusCode.INVALID_ARGUMENT, name
        assert sentence in details and "\n" not in details, name


def test_a_request_of_too_many_bytes_is_refused(started):
    _, port = started()
    code, details = refusal(port, text_request("a" * server.MAX_REQUEST_BYTES))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details
    assert healthy(port)


def test_a_request_of_all_positions_is_answered(started):
    _, port = started()
    assert decode(port, tokens_request([2] * 10, POSITIONS - 10))[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff",
        b"\x0a\x05ab",
        b"\x08\x01\x9a\x01\xff\xff\xff\xff\x0f",
        b"\x00",
        b"\x12\x04\x0a\x02\xc3\x28",
        b"\x2b",
    ],
)
def test_bytes_that_are_no_message_are_an_invalid_argument(started, data):
    """Broken lengths, tags and UTF-8; a truncated message. The server goes on."""
    _, port = started()
    with connect(port) as channel:
        raw = {"request_serializer": bytes, "response_deserializer": bytes}
        call = channel.unary_stream("/jetstream_proto.Orchestrator/Decode", **raw)
        decoding = call(data, timeout=30)
        assert decoding.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "\n" not in decoding.details()
        # The health check has no such field, and ignores it.
        if data != b"\x12\x04\x0a\x02\xc3\x28":
            checking = channel.unary_unary("/jetstream_proto.Orchestrator/HealthCheck", **raw)
            with pytest.raises(grpc.RpcError) as caught:
                checking(data, timeout=30)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert healthy(port)


def test_a_text_too_long_to_fit_is_refused_before_it_is_encoded(started):
    class Pairs(tokenizer.CharacterTokenizer):
        max_token_chars = 2

        def encode(self, text):
            assert len(text) <= 2 * PROMPT
            return super().encode(text[::2])

    _, port = started(tokenizer=Pairs(TOKENIZER.alphabet))
    code, details = refusal(port, text_request("a" * (2 * PROMPT + 1)))
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            f"the text has {2 * PROMPT + 1} characters; the {PROMPT} tokens that this server takes "
            f"hold {2 * PROMPT} at most; shorten it"
        ),
    )
    assert decode(port, text_request("a" * 2 * PROMPT, 1))[0]


def test_long_texts_delay_neither_health_checks_nor_short_texts(started):
    """They are encoded one at a time, outside the event loop."""
    proceed = threading.Event()
    held = []
    most = []

    class Slow(tokenizer.CharacterTokenizer):
        max_token_chars = server.MAX_REQUEST_BYTES

        def encode(self, text):
            if len(text) > service.LONG_TEXT:
                held.append(text)
                most.append(len(held))
                assert proceed.wait(60)
                held.pop()
            return super().encode(text)

    _, port = started(tokenizer=Slow(TOKENIZER.alphabet))
    with ThreadPoolExecutor(8) as pool:
        request = text_request("a" * (service.LONG_TEXT + 1))
        long = [pool.submit(refusal, port, request) for _ in range(8)]
        until(lambda: held)
        assert healthy(port) and decode(port, text_request("a" * PROMPT, 1))[0]
        assert not any(call.done() for call in long)
        proceed.set()
        for call in long:
            assert call.result()[0] == grpc.StatusCode.INVALID_ARGUMENT
            assert "tokens and this server takes" in call.result()[1]
    assert most == [1] * 8


@pytest.mark.parametrize("channels", [1, 20])
def test_each_of_two_thousand_calls_at_once_is_served_or_refused(started, channels):
    _, port = started(waiting=20)
    with contextlib.ExitStack() as open_channels:
        opened = [open_channels.enter_context(connect(port)) for _ in range(channels)]
        stubs = [jetstream_pb2_grpc.OrchestratorStub(channel) for channel in opened]
        request = tokens_request(make_prompts()[0])
        expected = greedy()[0]
        calls = [stubs[i % channels].Decode(request, timeout=120) for i in range(2000)]
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                assert received(call) == expected
        codes = {call.code() for call in calls}
        assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert healthy(port)


def test_text_is_refused_without_a_tokenizer(started):
    _, port = started(tokenizer=None)
    assert refusal(port, text_request("abc")) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "this server has no tokenizer; send token_content",
    )
    assert decode(port, tokens_request(make_prompts()[1]))[0] == greedy()[1]


@pytest.mark.parametrize("limits", [{"waiting": 2}, {"rpcs": SLOTS + 2}], ids=["queue", "calls"])
def test_a_full_server_refuses_and_recovers(started, monkeypatch, limits):
    gate = Gate(monkeypatch, make_engine())
    driver, port = started(**limits)
    request = tokens_request(make_prompts()[1])
    expected = greedy()[1]
    with ThreadPoolExecutor(SLOTS + 2) as pool:
        held = [pool.submit(decode, port, request) for _ in range(SLOTS + 2)]
        until(lambda: driver.running + driver.waiting == SLOTS + 2)
        assert refusal(port, request)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.open.set()
        assert all(call.result()[0] == expected for call in held)
    assert decode(port, request)[0] == expected


def test_requests_after_stop_are_refused(started):
    driver, port = started()
    driver.stop()
    assert refusal(port, tokens_request([2]))[0] == grpc.StatusCode.UNAVAILABLE and not healthy(
        port
    )


# Clients that leave


def test_a_hundred_clients_of_which_some_leave_or_send_bad_requests(started, monkeypatch):
    """Good ones get the right completion; slots and queue are empty afterwards."""
    engine = make_engine()
    (driver, port) = started()
    evicted = []
    evict = engine.evict
    generate = engine.generate
    monkeypatch.setattr(
        engine, "evict", lambda state, slots: evicted.extend(slots) or evict(state, slots)
    )
    # Slow, so that clients leave in the middle of a completion.
    monkeypatch.setattr(engine, "generate", lambda *a, **kw: time.sleep(0.01) or generate(*a, **kw))
    prompts = make_prompts()
    expected = greedy()
    bad = list(itertools.islice(itertools.cycle(BAD.values()), 25))

    def client(number):
        kind = number % 4
        prompt = number % len(prompts)
        with connect(port) as channel:
            call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(
                bad[number // 4][0] if kind == 3 else tokens_request(prompts[prompt]), timeout=300
            )
            if kind == 0:
                return received(call) == expected[prompt]
            if kind == 3:
                return call.code() == grpc.StatusCode.INVALID_ARGUMENT
            if number % 3:
                next(call)
            else:
                time.sleep(0.002 * (number % 10))  # it may wait for a slot, or have none yet
            if kind == 1:
                call.cancel()
            return True  # kind 2: leaving the `with` closes the connection

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(client, range(100)))
    until(lambda: driver.running == driver.waiting == 0)
    assert healthy(port) and len(evicted) > 10
    assert [decode(port, tokens_request(prompt))[0] for prompt in prompts[:6]] == expected[:6]
    assert not np.asarray(driver._state.active).any()


def test_a_connection_that_closes_frees_its_slot(started, monkeypatch):
    driver, port = started()
    gate = Gate(monkeypatch, make_engine())
    channel = connect(port)
    call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(
        tokens_request(make_prompts()[long_prompts()[0]])
    )
    until(lambda: gate.calls == 1)
    channel.close()
    until(lambda: driver._slots[0] is not None and driver._slots[0].request.cancelled())
    gate.open.set()
    until(lambda: driver.running == 0)
    assert gate.calls == 1 and call.code() == grpc.StatusCode.CANCELLED


@pytest.fixture
def servicer():
    """The orchestrator without gRPC, called in-process."""
    driver = service.OrchestratorDriver(make_engine(), make_weights(), waiting=9, sampling=GREEDY)
    yield service.Orchestrator(driver, TOKENIZER, PROMPT), driver
    assert driver.stop(60)


def test_an_event_loop_that_closes_is_a_client_that_left(servicer):
    """It ends in the middle of a completion; the next request is answered."""
    orchestrator, driver = servicer
    number = long_prompts()[0]
    request = tokens_request(make_prompts()[number])

    async def first_piece():
        async for reply in orchestrator.Decode(request):
            return list(reply.stream_content.samples[0].token_ids)

    async def completion():
        return received([reply async for reply in orchestrator.Decode(request)])

    assert asyncio.run(first_piece()) == greedy()[number][:STEPS]
    until(lambda: driver.running == 0)
    assert asyncio.run(completion()) == greedy()[number] and driver.live


def test_a_bad_request_raises_without_a_context(servicer):
    orchestrator, _ = servicer
    with pytest.raises(RuntimeError, match="the prompt is empty"):
        asyncio.run(orchestrator.Decode(tokens_request([])).__anext__())


# Faults


def test_three_faults_in_a_row_are_unhealthy_until_one_round_succeeds(started, monkeypatch):
    _, port = started()
    request = tokens_request(make_prompts()[1])
    with monkeypatch.context() as broken:
        broken.setattr(make_engine(), "generate", fail)
        for still_healthy in (True, True, False):
            code, details = refusal(port, request)
            assert code == grpc.StatusCode.INTERNAL
            assert "FloatingPointError" in details and "injected" not in details
            assert healthy(port) == still_healthy
    assert decode(port, request)[0] == greedy()[1] and healthy(port)


def test_a_completion_that_cannot_be_decoded_fails_alone(started):
    class Broken(tokenizer.CharacterTokenizer):
        def decode(self, ids):
            return fail()

    _, port = started(tokenizer=Broken(TOKENIZER.alphabet))
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(decode, port, tokens_request(make_prompts()[1]))
        code, details = refusal(port, text_request("abc"))
        assert code == grpc.StatusCode.INTERNAL and "could not be made into text" in details
        assert good.result()[0] == greedy()[1]
    assert healthy(port)


def test_nothing_of_jetstreams_driver_runs(started, monkeypatch):
    """Its threads kill the process over any exception; its `delete_pytree` calls `jax.tree_map`,
    which is no more.
    """
    stock = service.orchestrator
    for owner, name in (
        (stock.os, "kill"),
        (stock, "delete_pytree"),
        (stock.Driver, "__init__"),
        (stock.JetThread, "run"),
        (stock.token_utils, "process_result_tokens"),
        (stock.token_utils, "pad_tokens"),
    ):
        monkeypatch.setattr(owner, name, fail)
    _, port = started()
    with monkeypatch.context() as broken:
        broken.setattr(make_engine(), "generate", fail)
        assert refusal(port, tokens_request([2]))[0] == grpc.StatusCode.INTERNAL
    assert decode(port, tokens_request(make_prompts()[1]))[0] == greedy()[1]
    assert not any(isinstance(thread, stock.JetThread) for thread in threading.enumerate())
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "decode")


def test_an_answer_names_the_version_of_its_weights(started):
    driver, port = started()
    driver.update_weights(make_weights(7))
    tokens, _, _, version = decode(port, tokens_request(make_prompts()[1]))
    assert (tokens, version) == (greedy(7)[1], 7)


# Around the service


def test_the_default_host_is_reachable_from_this_machine_alone(started):
    _, port = started()
    socket.create_connection((server.Options().host, port), timeout=5).close()
    # an address of the machine that a server bound to all addresses would answer
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_importing_and_answering_leave_the_root_logger_unchanged():
    code = """
import asyncio, logging, sys
root = logging.getLogger()
before = root.level, list(root.handlers)
from dcmdp_jax.serving import service
assert before == (root.level, list(root.handlers)), "import"

class Driver:
    live = True
    def place_request_on_prefill_queue(self, request):
        request.return_channel.close()

class Servicer(service.orchestrator.LLMOrchestrator):
    def _get_prefill_content(self, request):
        return [1], True

async def main():
    request = type("Request", (), {"max_tokens": 1, "session_cache": ""})
    assert [reply async for reply in Servicer(Driver()).Decode(request)] == []
asyncio.run(main())
assert before == (root.level, list(root.handlers)), "request"
print([m for m in ("tensorflow", "seqio", "tiktoken", "torch", "transformers") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, "[]"), out.stderr
