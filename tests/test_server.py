"""`dcmdp serve`: its options, its address, and how the process ends."""

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from jetstream.core.proto import jetstream_pb2_grpc

from dcmdp_jax import cli
from dcmdp_jax.models import weights
from dcmdp_jax.serving import server
from dcmdp_jax.tokens import tokenizer
from support.serving import (
    MODEL,
    NEW,
    TOKENIZER,
    connect,
    greedy,
    long_prompts,
    make_params,
    make_prompts,
    received,
    refusal,
    tokens_request,
)

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    weights.save(folder, dataclasses.replace(MODEL, max_position=512), make_params())
    tokenizer.save(TOKENIZER, folder)
    return folder


# Options


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"slots": 0}, "--slots is 0"),
        ({"waiting": -1}, "--queue is -1"),
        ({"steps": 0}, "--steps is 0"),
        ({"grace": -1}, "--grace is -1"),
        ({"grace": float("nan")}, "--grace is nan"),
        ({"grace": float("inf")}, "--grace is inf"),
        ({"port": 65536}, "--port is 65536"),
        ({}, "model folder .*absent does not exist; give a Hugging Face model folder"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        server.serve(str(tmp_path / "absent"), server.Options(**options))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_of_more_than_32_bits_is_refused(tmp_path, seed):
    with pytest.raises(ValueError, match=f"--seed is {seed}; it must lie in 0..4294967295"):
        server.serve(str(tmp_path / "absent"), seed=seed)


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
    "given, expected",
    [
        ((None, None, 40_960), (1024, 2048)),
        ((None, None, 1024), (512, 1024)),
        ((700, None, 1024), (700, 1024)),
        ((None, 4096, 40_960), (2048, 4096)),
        ((2, 3, 3), (2, 3)),
    ],
)
def test_lengths_follow_the_model_by_default(given, expected):
    assert server._lengths(*given) == expected


# The address


@pytest.mark.parametrize(
    "host, reason",
    [
        ("127.0.0.1", "Address already in use"),
        ("localhost", "Address already in use"),
        ("192.0.2.1", "Cannot assign requested address"),
        ("a host", "not known"),
    ],
)
def test_an_address_that_cannot_be_bound_is_named_with_the_reason(capfd, host, reason):
    """In one sentence: gRPC itself prints nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        sentence = (
            f"cannot listen on {host}:{port} \\(.*{reason}\\); choose another --port or --host"
        )
        with pytest.raises(OSError, match=sentence):
            server.listen(host, port, 10)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "host", ["\udcff", "a" * 300, "a..b"], ids=["bytes", "long", "empty label"]
)
def test_an_invalid_host_name_is_refused(host):
    sentence = "is no host name; give one, or an address|cannot listen on"
    with pytest.raises((ValueError, OSError), match=sentence):
        server.listen(host, 0, 10)


# Signals

SERVE = """
import sys
from dcmdp_jax.records import Sampling
from dcmdp_jax.serving import server
options = server.Options(port=0, slots=2, max_prompt=20, steps=1, grace=float(sys.argv[2]))
sys.exit(server.serve(sys.argv[1], options, sampling=Sampling(temperature=0.0)))
"""


@contextlib.contextmanager
def served(folder, grace):
    """Yields a server's process and its port."""
    program = [sys.executable, "-c", SERVE, str(folder), str(grace)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.kill()


@contextlib.contextmanager
def decoding(process, port, max_tokens=480):
    """Yields a call in the middle of its completion, and its tokens up to now, after a SIGTERM."""
    with connect(port) as channel:
        request = tokens_request(make_prompts()[long_prompts()[0]], max_tokens)
        call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request, timeout=120)
        tokens = list(next(call).stream_content.samples[0].token_ids)
        process.terminate()
        line = process.stdout.readline()
        assert "finishing the requests that were accepted, for 600 s at most" in line
        yield call, tokens


def test_after_sigterm_accepted_requests_end_and_new_ones_are_refused(folder):
    with served(folder, 600) as (process, port):
        with decoding(process, port) as (call, tokens):
            assert refusal(port, tokens_request([2]))[0] == grpc.StatusCode.UNAVAILABLE
            tokens += received(call)
            assert tokens[:NEW] == greedy()[long_prompts()[0]]
            assert len(tokens) == 480 or tokens[-1] == 1
        assert process.wait(60) == 0


def test_a_second_sigterm_cuts_requests_off(folder):
    with served(folder, 600) as (process, port):
        with decoding(process, port) as (call, _):
            process.terminate()
            with pytest.raises(grpc.RpcError):
                list(call)
        assert process.wait(60) == 1


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


def test_clients_that_do_not_read_are_cut_off_after_the_grace(folder):
    """Forty calls of a stopped process, which keeps its sockets open and reads nothing."""
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
