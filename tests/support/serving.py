"""Shared by the tests of the driver, the service and the server.

A tiny model, its greedy completions, an engine that can be held up, and a client.
"""

import functools
import threading
import time

import grpc
import jax
import numpy as np
import pytest
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.tokens import tokenizer
from support.random_params import random_params

MODEL = ModelConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
TOKENIZER = tokenizer.CharacterTokenizer(
    "<0x41>é日🙂 abcdefghijklmnopqrstuvwyz"
)  # ids 2 to 36; 1 stops
SLOTS = 4
POSITIONS = 64
PROMPT = 20
STEPS = 4
NEW = 24
GREEDY = Sampling(temperature=0.0)


@functools.cache
def make_engine():
    return Engine(MODEL, slots=SLOTS, max_length=POSITIONS, stop_ids=TOKENIZER.eos_ids, steps=STEPS)


@functools.cache
def make_params(version=0):
    """Weights far from a uniform distribution; those of another version are reversed."""
    params = random_params(MODEL, 0.16, norms=1.0)
    return params if version == 0 else jax.tree.map(lambda w: w[..., ::-1], params)


@functools.cache
def make_weights(version=0):
    return sync.converter(MODEL, Precision(), sharding.single_device_mesh())(
        make_params(version), version
    )


@functools.cache
def make_prompts():
    """24 prompts of different lengths, one of a single token and one of the maximum."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, 37, n).tolist() for n in [1, PROMPT, *rng.integers(1, PROMPT + 1, 22)]]


@functools.cache
def greedy(version=0):
    """Every prompt's completion by the argmax of the full forward pass.

    At most NEW tokens, a stop token included.
    """
    forward = jax.jit(lambda params, rows: decoder.logits(params, rows, MODEL))
    prompts = make_prompts()
    rows = np.zeros((len(prompts), POSITIONS), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(rows, prompts):
        row[: len(prompt)] = prompt
    for step in range(NEW):
        at = np.arange(len(rows)), lengths + step
        rows[at] = np.asarray(forward(make_params(version), rows))[at[0], at[1] - 1].argmax(-1)
    completions = [row[n : n + NEW].tolist() for row, n in zip(rows, lengths)]
    return [tokens[: tokens.index(1) + 1] if 1 in tokens else tokens for tokens in completions]


def long_prompts():
    """Numbers of the prompts whose completion ends at the length limit."""
    return [i for i, tokens in enumerate(greedy()) if 1 not in tokens]


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def fail(*args, **kwargs):
    raise FloatingPointError("injected")


class Gate:
    """Blocks an engine's `generate` until `open` is set, and counts its calls."""

    def __init__(self, monkeypatch, engine):
        self.open = threading.Event()
        self.calls = 0
        generate = engine.generate

        def gated(*args, **kwargs):
            self.calls += 1
            assert self.open.wait(60)
            return generate(*args, **kwargs)

        monkeypatch.setattr(engine, "generate", gated)


class Listener:
    """A `driver.Request` for prompt `number` that records what it receives."""

    def __init__(self, number, max_tokens=NEW):
        self.tokens = make_prompts()[number]
        self.max_tokens = max_tokens
        self.received = []
        self.versions = set()
        self.left = False
        self.error = None
        self.ended = threading.Event()

    def cancelled(self):
        return self.left

    def send(self, tokens, version, ended):
        self.received += tokens
        self.versions.add(version)
        if ended:
            self.ended.set()

    def fail(self, error):
        self.error = error
        self.ended.set()


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
    """Returns token ids, text, number of messages and version of the weights of one call."""
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
    """Returns the token ids of a call's replies."""
    return [token for reply in call for token in reply.stream_content.samples[0].token_ids]


def refusal(port, request):
    """Returns status code and details of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        decode(port, request)
    return caught.value.code(), caught.value.details()


def healthy(port):
    with connect(port) as channel:
        stub = jetstream_pb2_grpc.OrchestratorStub(channel)
        return stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=30).is_live
