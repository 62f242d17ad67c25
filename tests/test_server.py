"""`dcmdp serve`: JetStream's own client stubs against the engine, and everything that may go wrong
between them.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import signal
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

from dcmdp_jax import cli, tokenizer
from dcmdp_jax.models import weights
from dcmdp_jax.serving import server
from support.serving import (
    GREEDY,
    MODEL,
    NEW,
    POSITIONS,
    PROMPT,
    SLOTS,
    STEPS,
    TOKENIZER,
    Gate,
    fail,
    greedy,
    long_prompts,
    make_engine,
    make_params,
    make_prompts,
    make_weights,
    until,
)


@pytest.fixture(scope="module")
def loop():
    """gRPC's event loop, in a thread, as every server of this process shares it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def started(loop):
    """Starts servers with a driver each: (driver, port)."""
    running = []

    def start(tokenizer=TOKENIZER, waiting=200, rpcs=300):
        driver = server.OrchestratorDriver(
            make_engine(), make_weights(), waiting=waiting, sampling=GREEDY
        )

        async def run():
            grpc_server, port = server.listen("127.0.0.1", 0, rpcs)
            servicer = server.Orchestrator(driver, tokenizer, PROMPT)
            server.add_service(servicer, grpc_server)
            await grpc_server.start()
            return grpc_server, port

        grpc_server, port = asyncio.run_coroutine_threadsafe(run(), loop).result()
        running.append((driver, grpc_server))
        return driver, port

    yield start
    for driver, grpc_server in running:
        asyncio.run_coroutine_threadsafe(grpc_server.stop(None), loop).result()
        assert driver.stop(timeout=60)


def connect(port):
    return grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )


def tokens_request(tokens, max_tokens=NEW, **fields):
    content = jetstream_pb2.DecodeRequest.TokenContent(token_ids=tokens)
    return jetstream_pb2.DecodeRequest(token_content=content, max_tokens=max_tokens, **fields)


def text_request(text, max_tokens=NEW):
    content = jetstream_pb2.DecodeRequest.TextContent(text=text)
    return jetstream_pb2.DecodeRequest(text_content=content, max_tokens=max_tokens)


def decode(port, request, timeout=120):
    """(token ids, text, messages, version of the weights) of one call on a connection of its own."""
    with connect(port) as channel:
        call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request, timeout=timeout)
        samples = [reply.stream_content.samples[0] for reply in call]
        version = int(dict(call.trailing_metadata())["dcmdp-version"])
    return (
        [token for s in samples for token in s.token_ids],
        "".join(s.text for s in samples),
        len(samples),
        version,
    )


def received(call):
    return [token for reply in call for token in reply.stream_content.samples[0].token_ids]


def refusal(port, request):
    with pytest.raises(grpc.RpcError) as caught:
        decode(port, request)
    return caught.value.code(), caught.value.details()


def healthy(port):
    with connect(port) as channel:
        stub = jetstream_pb2_grpc.OrchestratorStub(channel)
        return stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=30).is_live


# Answers


def test_token_requests_get_the_argmax_of_the_full_forward(started):
    """Ragged prompts, more at a time than slots; the stop token is the last id."""
    driver, port = started()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda prompt: decode(port, tokens_request(prompt)), make_prompts())
        )
    assert [tokens for tokens, *_ in answers] == greedy()
    assert all(text == "" and version == 0 for _, text, _, version in answers)
    assert all(messages == -(-len(tokens) // STEPS) for tokens, _, messages, _ in answers), (
        "a message a dispatch"
    )
    assert {len(tokens) for tokens in greedy()} != {NEW} and long_prompts(), (
        "some completions stop, some do not"
    )
    assert healthy(port) and driver.running == driver.waiting == 0


def test_text_requests_get_text_without_the_stop_token(started):
    _, port = started()
    for prompt, expected in zip(make_prompts(), greedy()):
        tokens, text, *_ = decode(port, text_request(TOKENIZER.decode(prompt)))
        assert tokens == expected
        assert text == TOKENIZER.decode(expected[:-1] if expected[-1] == 1 else expected)


def test_text_that_looks_like_a_byte_stays_text(started):
    """JetStream would turn a piece `<0x41>` into A."""

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


def test_what_cannot_be_answered_is_refused_in_one_sentence(started, monkeypatch):
    driver, port = started()
    monkeypatch.setattr(
        driver, "submit", lambda request: pytest.fail("a bad request reached the queue")
    )
    for name, (request, sentence) in BAD.items():
        code, details = refusal(port, request)
        assert (
            code == grpc.StatusCode.INVALID_ARGUMENT and sentence in details and "\n" not in details
        ), name
    code, details = refusal(port, text_request("a" * server.BODY))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details
    monkeypatch.undo()
    assert decode(port, tokens_request([2] * 10, POSITIONS - 10))[0][:1] and healthy(port)


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
def test_what_is_no_message_is_an_invalid_argument(started, data):
    """Broken lengths, tags and UTF-8; a message cut short. The server goes on."""
    _, port = started()
    with connect(port) as channel:
        raw = {"request_serializer": bytes, "response_deserializer": bytes}
        call = channel.unary_stream("/jetstream_proto.Orchestrator/Decode", **raw)
        decoding = call(data, timeout=30)
        assert decoding.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "\n" not in decoding.details()
        # a field that the health check does not have, and so does not read
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


def test_long_texts_hold_up_neither_health_nor_short_texts(started):
    """They are encoded one at a time, beside the loop."""
    going = threading.Event()
    held = []
    most = []

    class Slow(tokenizer.CharacterTokenizer):
        max_token_chars = server.BODY

        def encode(self, text):
            if len(text) > server.LONG_TEXT:
                held.append(text)
                most.append(len(held))
                assert going.wait(60)
                held.pop()
            return super().encode(text)

    _, port = started(tokenizer=Slow(TOKENIZER.alphabet))
    with ThreadPoolExecutor(8) as pool:
        request = text_request("a" * (server.LONG_TEXT + 1))
        long = [pool.submit(refusal, port, request) for _ in range(8)]
        until(lambda: held)
        assert healthy(port) and decode(port, text_request("a" * PROMPT, 1))[0]
        assert not any(call.done() for call in long)
        going.set()
        for call in long:
            assert call.result()[0] == grpc.StatusCode.INVALID_ARGUMENT
            assert "tokens and this server takes" in call.result()[1]
    assert most == [1] * 8


@pytest.mark.parametrize("channels", [1, 20])
def test_two_thousand_calls_at_once_are_served_or_refused_none_dropped(started, channels):
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


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"slots": 0}, "--slots is 0"),
        ({"waiting": -1}, "--queue is -1"),
        ({"steps": 0}, "--steps is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**32}, "--seed is 4294967296"),
        ({"grace": -1}, "--grace is -1"),
        ({"grace": float("nan")}, "--grace is nan"),
        ({"grace": float("inf")}, "--grace is inf"),
        ({"port": 65536}, "--port is 65536"),
        ({}, "model folder .*absent does not exist; give a Hugging Face model folder"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        server.serve(str(tmp_path / "absent"), **options)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            ["--max-length", "513"],
            "--max-length is 513; it must lie in 2..512, the positions of the model",
        ),
        (["--max-length", "1"], "--max-length is 1; it must lie in 2..512"),
        (
            ["--max-prompt", "512"],
            "--max-prompt is 512; it must be at least 1 and less than --max-length, 512",
        ),
        (["--max-prompt", "0"], "--max-prompt is 0"),
        (["--max-prompt", "40", "--max-length", "40"], "less than --max-length, 40"),
    ],
)
def test_lengths_beyond_the_model_are_refused(folder, capfd, options, sentence):
    assert cli.main(["serve", str(folder), "--port", "0", *options]) == 2
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize(
    "given, taken",
    [
        ((None, None, 40_960), (1024, 2048)),
        ((None, None, 1024), (512, 1024)),
        ((700, None, 1024), (700, 1024)),
        ((None, 4096, 40_960), (2048, 4096)),
        ((2, 3, 3), (2, 3)),
    ],
)
def test_lengths_not_given_follow_the_model(given, taken):
    assert server._lengths(*given) == taken


# Clients that leave


def test_a_hundred_clients_some_of_whom_misbehave(started, monkeypatch):
    """Good ones get the right answer; slots and queue are empty afterwards."""
    engine = make_engine()
    (driver, port) = started()
    evicted = []
    evict = engine.evict
    generate = engine.generate
    monkeypatch.setattr(
        engine, "evict", lambda state, slots: evicted.extend(slots) or evict(state, slots)
    )
    # slow enough to be left in the midst
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
    until(lambda: driver._held[0] is not None and driver._held[0].request.gone())
    gate.open.set()
    until(lambda: driver.running == 0)
    assert gate.calls == 1 and call.code() == grpc.StatusCode.CANCELLED


def test_an_event_loop_that_closes_is_a_client_that_left():
    """The orchestrator called in-process, without gRPC, ends with its event loop in the middle of a
    completion.
    """
    driver = server.OrchestratorDriver(make_engine(), make_weights(), waiting=9, sampling=GREEDY)
    servicer = server.Orchestrator(driver, TOKENIZER, PROMPT)
    number = long_prompts()[0]

    async def first():
        async for reply in servicer.Decode(tokens_request(make_prompts()[number])):
            return list(reply.stream_content.samples[0].token_ids)

    async def whole():
        return received(
            [reply async for reply in servicer.Decode(tokens_request(make_prompts()[number]))]
        )

    assert asyncio.run(first()) == greedy()[number][:STEPS]
    until(lambda: driver.running == 0)
    assert asyncio.run(whole()) == greedy()[number] and driver.live
    with pytest.raises(RuntimeError, match="the prompt is empty"):
        asyncio.run(servicer.Decode(tokens_request([])).__anext__())
    assert driver.stop(60)


# Faults


def test_three_faults_in_a_row_are_unhealthy_until_one_round_succeeds(started, monkeypatch):
    _, port = started()
    request = tokens_request(make_prompts()[1])
    with monkeypatch.context() as broken:
        broken.setattr(make_engine(), "generate", fail)
        for healthy_still in (True, True, False):
            code, details = refusal(port, request)
            assert (
                code == grpc.StatusCode.INTERNAL
                and "FloatingPointError" in details
                and "injected" not in details
            )
            assert healthy(port) == healthy_still
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
    stock = server.orchestrator
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


# The process


def test_it_listens_to_this_machine_alone(started):
    _, port = started()
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    # an address of the machine that a server bound to all would answer
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert server.serve.__kwdefaults__["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    "host, reason",
    [
        ("127.0.0.1", "Address already in use"),
        ("localhost", "Address already in use"),
        ("192.0.2.1", "Cannot assign requested address"),
        ("a host", "not known"),
    ],
)
def test_an_address_that_cannot_be_had_is_said_in_one_sentence(started, loop, capfd, host, reason):
    """gRPC writes nothing above it."""
    _, port = started()

    async def again():
        server.listen(host, port, 10)

    with pytest.raises(
        OSError,
        match=f"cannot listen on {host}:{port} \\(.*{reason}\\); choose another --port or --host",
    ):
        asyncio.run_coroutine_threadsafe(again(), loop).result()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "host", ["\udcff", "a" * 300, "a..b"], ids=["bytes", "long", "empty label"]
)
def test_what_is_no_host_name_is_said_in_one_sentence(host):
    said = "is no host name; give one, or an address|cannot listen on"
    with pytest.raises((ValueError, OSError), match=said):
        server.listen(host, 0, 10)


@pytest.mark.parametrize("prompt", ["\udcff", "a\ud800b"])
def test_a_prompt_that_is_no_unicode_is_refused_by_its_number(folder, capsys, prompt):
    assert cli.main(["generate", str(folder), "abc", prompt]) == 2
    assert "dcmdp: prompt 2 of 2 is not valid Unicode text" in capsys.readouterr().err


def test_importing_and_answering_leave_the_root_logger_alone():
    code = """
import asyncio, logging, sys
root = logging.getLogger()
before = root.level, list(root.handlers)
from dcmdp_jax.rollout import serve
assert before == (root.level, list(root.handlers)), "import"

class Driver:
    live = True
    def place_request_on_prefill_queue(self, request):
        request.return_channel.close()

class Servicer(serve.orchestrator.LLMOrchestrator):
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


SERVE = """
import sys
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import serve
sys.exit(serve.run(sys.argv[1], port=0, slots=2, max_prompt=20, steps=1, grace=float(sys.argv[2]),
                   sampling=Sampling(temperature=0.0)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    weights.save(folder, dataclasses.replace(MODEL, max_position=512), make_params())
    tokenizer.save(TOKENIZER, folder)
    return folder


@contextlib.contextmanager
def served(folder, grace):
    """The process and its port."""
    program = [sys.executable, "-c", SERVE, str(folder), str(grace)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.kill()


@pytest.mark.parametrize(
    "signals, status", [(1, 0), (2, 1)], ids=["drains", "a second signal cuts it short"]
)
def test_sigterm(folder, signals, status):
    number = long_prompts()[0]
    asked = 480
    with served(folder, 600) as (process, port):
        with connect(port) as channel:
            call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(
                tokens_request(make_prompts()[number], asked), timeout=120
            )
            tokens = list(next(call).stream_content.samples[0].token_ids)
            process.terminate()
            said = process.stdout.readline()
            assert "finishing the requests that were accepted, for 600 s at most" in said
            assert refusal(port, tokens_request([2]))[0] == grpc.StatusCode.UNAVAILABLE
            if signals == 1:
                tokens += received(call)
                assert tokens[:NEW] == greedy()[number]
                assert len(tokens) == asked or tokens[-1] == 1
            else:
                process.terminate()
                with pytest.raises(grpc.RpcError):
                    list(call)
        assert process.wait(60) == status


READS_NOTHING = """
import json, sys, time
import grpc
from dcmdp_jax.rollout.jetstream import stand_ins
with stand_ins():
    from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
channel = grpc.insecure_channel(sys.argv[1])
content = jetstream_pb2.DecodeRequest.TokenContent(token_ids=json.loads(sys.argv[2]))
request = jetstream_pb2.DecodeRequest(token_content=content, max_tokens=480)
calls = [jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request) for _ in range(40)]
next(calls[0])
print("reads", flush=True)
time.sleep(60)
"""


def test_clients_that_do_not_read_are_waited_for_no_longer_than_the_grace(folder):
    """Forty calls of a process that is stopped: its sockets stay open, and nobody reads them."""
    prompt = make_prompts()[long_prompts()[0]]
    with served(folder, 1) as (process, port):
        program = [sys.executable, "-c", READS_NOTHING, f"127.0.0.1:{port}", str(prompt)]
        client = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout.readline() == "reads\n"
            client.send_signal(signal.SIGSTOP)
            process.terminate()
            began = time.monotonic()
            assert process.wait(60) == 1
            assert 1 <= time.monotonic() - began < 1 + 3
        finally:
            client.kill()
            client.communicate()
