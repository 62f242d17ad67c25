"""The engine behind JetStream's orchestrator and gRPC service: what `dcmdp serve` runs.

Any client of google-jetstream 0.2.2 can use it (`jetstream_pb2_grpc.OrchestratorStub`: `Decode`, a
stream, and `HealthCheck`). A request holds token ids or text and gets the same back; `token_ids`
end with the stop token, text does not show it. The message has no field for a temperature: sampling
is the server's. The version of the weights that answered comes as trailing metadata,
`dcmdp-version`. Refusals: INVALID_ARGUMENT for what cannot be answered or is no message,
RESOURCE_EXHAUSTED where the queue is full, INTERNAL where the engine failed, UNAVAILABLE at
shutdown.

After SIGTERM the requests that were accepted have `grace` seconds to end, whether or not their
clients read; what is left then is cut off and the process is gone.

What JetStream 0.2.2 does that a server cannot live with is kept out here. Its `Driver` (threads
that SIGKILL the process on any exception, `jax.tree_map`, an unbounded queue, slots that decode on
for clients that left) is replaced by `rollout.driver`. Its `LLMOrchestrator` answers whatever is
asked, so requests are checked before it sees them. Its import turns the root logger to DEBUG, and
its calls of `logging.info` give the root logger a handler. Text such as `<0x41>` would be taken for
a byte.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from dcmdp_jax import sharding, sync
from dcmdp_jax import tokenizer as tokenizers
from dcmdp_jax.config import Precision
from dcmdp_jax.models import weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout.jetstream import Engine, stand_ins
from dcmdp_jax.serving import driver


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    handlers = list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


with stand_ins(), _root_logger_kept():
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2
    from jetstream.core.utils.return_sample import ReturnSample
# logging.info, of the module, would configure the root logger
orchestrator.logging = logging.getLogger("jetstream")

BODY = 1 << 20  # bytes of a request
# beside those that decode or wait: health checks, and requests on their way to a refusal
SPARE_RPCS = 16
PENDING = 16384  # calls that gRPC keeps until they are looked at; it cancels further ones
LONG_TEXT = 8192  # characters; longer ones are encoded one after another
GRACE = 10.0  # seconds for accepted requests to end
MOST_GRACE = 86400.0


class OrchestratorDriver(driver.Driver):
    """What `LLMOrchestrator` asks of a driver."""

    def place_request_on_prefill_queue(self, request: orchestrator.ActiveRequest) -> None:
        request.prefill_content.channel = request.return_channel
        self.submit(request.prefill_content)


class StreamedRequest:
    """A request that was checked: for the orchestrator both the request and its content, and the
    driver's `Request`.
    """

    session_cache = ""
    channel: Any = None  # the orchestrator's, once it is queued
    version: int | None = None

    def __init__(self, tokens: Sequence[int], max_tokens: int, text: Text | None):
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.text = text
        self._unsent = []
        self._lost = False

    def gone(self) -> bool:
        return self._lost or self.channel.cancelled()

    def send(self, tokens: list[int], version: int, ended: bool) -> None:
        self.version = version
        self._unsent += tokens
        piece = self.text.add(tokens, ended) if self.text else ""
        if piece or ended or not self.text:
            # one character an item: an item such as <0x41> is taken for a byte
            self._post(
                self.channel.add_result, [ReturnSample(text=list(piece), token_ids=self._unsent)]
            )
            self._unsent = []
        if ended:
            self._post(self.channel.close)

    def fail(self, error: Exception) -> None:
        self._lost = True
        self._post(self.channel.set_exception, error)

    def _post(self, method: Callable, *arguments: Any) -> None:
        try:
            method(*arguments)
        except RuntimeError:  # the client's event loop is closed
            self._lost = True


class Text:
    """The text of a completion as it grows: its pieces, joined, are the whole decoded; none ends
    within a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_ids: Sequence[int]):
        self._decode = decode
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self._start = 0
        # tokens of the last piece, and so what decoding depends on, begin and end here
        self._sent = 0

    def add(self, tokens: list[int], ended: bool) -> str:
        """The text that `tokens` add to what was returned so far."""
        self._tokens += (
            tokens[:-1] if ended and tokens[-1:] and tokens[-1] in self._stop_ids else tokens
        )
        before = self._decode(self._tokens[self._start : self._sent])
        now = self._decode(self._tokens[self._start :])
        # nothing yet, or a character's first bytes
        if len(now) <= len(before) or now.endswith("\ufffd") and not ended:
            return ""
        self._start, self._sent = self._sent, len(self._tokens)
        return now[len(before) :]


class Orchestrator(orchestrator.LLMOrchestrator):
    """JetStream's servicer, asked only what can be answered."""

    def __init__(
        self, slots: OrchestratorDriver, tokenizer: tokenizers.Tokenizer | None, max_prompt: int
    ):
        super().__init__(slots)
        self._engine = slots.engine
        self._tokenizer = tokenizer
        self._max_prompt = max_prompt
        self._long_texts = ThreadPoolExecutor(1)

    async def HealthCheck(self, request: Any, context: grpc.aio.ServicerContext | None = None):
        if request is None:
            await orchestrator._abort_or_raise(
                context, grpc.StatusCode.INVALID_ARGUMENT, "the request is no HealthCheckRequest"
            )
        return await super().HealthCheck(request, context)

    async def Decode(self, request: Any, context: grpc.aio.ServicerContext | None = None):
        """Streams a completion; see `DecodeRequest` of jetstream_pb2."""
        try:
            checked = await self._checked(request)
        except ValueError as error:
            await orchestrator._abort_or_raise(
                context, grpc.StatusCode.INVALID_ARGUMENT, str(error)
            )
        try:
            async for reply in super().Decode(checked, context):
                yield reply
        except CancelledError:  # the client left
            return
        except driver.Closed as error:
            await orchestrator._abort_or_raise(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except driver.Failed as error:
            await orchestrator._abort_or_raise(context, grpc.StatusCode.INTERNAL, str(error))
        if context is not None:
            context.set_trailing_metadata((("dcmdp-version", str(checked.version)),))

    def _get_prefill_content(self, request: StreamedRequest) -> tuple[StreamedRequest, bool]:
        return request, request.text is None

    async def _checked(self, request: Any) -> StreamedRequest:
        """Raises ValueError, with what to send instead, where the engine cannot answer."""
        if request is None:
            raise ValueError("the request is no DecodeRequest of google-jetstream 0.2.2; send one")
        if request.session_cache:
            raise ValueError("session_cache is not kept by this server; send the whole prompt")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if request.WhichOneof("content") is None:
            raise ValueError("the request has no content; set token_content or text_content")
        text = None
        if request.WhichOneof("content") == "token_content":
            tokens = list(request.token_content.token_ids)
        elif self._tokenizer is None:
            raise ValueError("this server has no tokenizer; send token_content")
        else:
            tokens = await self._encoded(request.text_content.text)
            text = Text(self._tokenizer.decode, self._engine.stop_ids)
        self._check_prompt(tokens, request.max_tokens)
        return StreamedRequest(tokens, request.max_tokens, text)

    async def _encoded(self, text: str) -> list[int]:
        """Token ids, made beside the event loop. Raises ValueError where a text is too long to be
        worth the work: longer than as many of the longest tokens as a prompt may have."""
        longest = self._max_prompt * self._tokenizer.max_token_chars
        if len(text) > longest:
            raise ValueError(
                f"the text has {len(text)} characters; the {self._max_prompt} tokens "
                f"that this server takes hold {longest} at most; shorten it"
            )
        pool = self._long_texts if len(text) > LONG_TEXT else None  # short ones do not wait
        return await asyncio.get_running_loop().run_in_executor(pool, self._tokenizer.encode, text)

    def _check_prompt(self, tokens: list[int], max_tokens: int) -> None:
        count = len(tokens)
        vocab_size = self._engine.config.vocab_size
        positions = self._engine.max_length
        if not count:
            raise ValueError("the prompt is empty; send at least one token")
        if count > self._max_prompt:
            raise ValueError(
                f"the prompt has {count} tokens and this server takes {self._max_prompt}; shorten it"
            )
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary; ids go from 0 to {vocab_size - 1}"
                )
        if count + max_tokens > positions:
            raise ValueError(
                f"max_tokens is {max_tokens}; after {count} prompt tokens at most {positions - count} fit"
            )


def add_service(servicer: Orchestrator, server: grpc.aio.Server) -> None:
    """Registers the service. The servicer is given None for what is no message of the right type:
    gRPC itself would answer UNKNOWN."""
    handlers = {
        "Decode": grpc.unary_stream_rpc_method_handler(
            servicer.Decode,
            partial(_parsed, jetstream_pb2.DecodeRequest),
            jetstream_pb2.DecodeResponse.SerializeToString,
        ),
        "HealthCheck": grpc.unary_unary_rpc_method_handler(
            servicer.HealthCheck,
            partial(_parsed, jetstream_pb2.HealthCheckRequest),
            jetstream_pb2.HealthCheckResponse.SerializeToString,
        ),
    }
    service = jetstream_pb2.DESCRIPTOR.services_by_name["Orchestrator"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def _parsed(kind: type[Message], data: bytes) -> Message | None:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def listen(host: str, port: int, rpcs: int) -> tuple[grpc.aio.Server, int]:
    """A server that is bound, not started, and its port; port 0 takes a free one. Raises OSError on
    failure to bind.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        _try_to_bind(host, port)
    except OSError as error:
        raise OSError(
            f"cannot listen on {address} ({error.strerror}); choose another --port or --host"
        ) from None
    except UnicodeError:
        raise ValueError(f"--host {host!r:.100} is no host name; give one, or an address") from None
    server = grpc.aio.server(
        maximum_concurrent_rpcs=rpcs,
        options=[
            ("grpc.max_receive_message_length", BODY),
            ("grpc.server.max_pending_requests", PENDING),
            ("grpc.server.max_pending_requests_hard_limit", PENDING),
            (
                "grpc.so_reuseport",
                0,
            ),  # or two servers share a port, and each gets some of the requests
            # a client's machine may vanish
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ],
    )
    try:
        return server, server.add_insecure_port(address)
    except RuntimeError as error:  # somebody was quicker
        raise OSError(
            f"cannot listen on {address} ({error}); choose another --port or --host"
        ) from None


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError where gRPC could not bind: it would write a line of its own to stderr, and
    give no reason.
    """
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failures = []
    for family, kind, _, _, place in places:
        try:
            with socket.socket(family, kind) as probe:
                # connections of a server that ended may linger
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            failures.append(error)
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    # of the addresses of a name, such as localhost's in IPv6, some may be missing
    if taken or len(failures) == len(places):
        raise (taken or failures)[0]


def serve(
    model: str,
    *,
    tokenizer_path: str = "",
    tokens_only: bool = False,
    precision: Precision = Precision(),
    host: str = "127.0.0.1",
    port: int = 9000,
    slots: int = 8,
    waiting: int = 64,
    max_prompt: int | None = None,
    max_length: int | None = None,
    steps: int = 8,
    grace: float = GRACE,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> int:
    """Serves a Hugging Face folder until SIGTERM or SIGINT and returns an exit status: 0 once all
    accepted requests have ended, 1 where `grace` or a second signal cut some off.

    Args:
      tokens_only: needs no tokenizer; text is refused, and completions end with max_tokens alone.
      host: other than a loopback address opens the server to the network, without encryption or
          passwords.
      slots: sequences decoded together.
      waiting: requests that may wait for a slot; more are refused with RESOURCE_EXHAUSTED.
      max_prompt: tokens; None takes half of max_length.
      max_length: tokens of prompt and completion together; memory is taken for all of it in every
          slot. None takes
        2,048, or as many as the model has positions.
      steps: tokens that are decoded, and then streamed, at a time.
      grace: seconds after the signal for accepted requests to end.
      sampling, seed: how tokens of every request are drawn; request number n has the key (seed, n).

    Raises ValueError and OSError before weights are read.
    """
    _check_range("port", port, 0, 65535)
    _check_range("slots", slots, 1)
    _check_range("queue", waiting, 0)
    _check_range("steps", steps, 1)
    _check_range("grace", grace, 0, MOST_GRACE)
    _check_range("seed", seed, 0, 2**32 - 1)
    shape = weights.read_config(model)
    max_prompt, max_length = _lengths(max_prompt, max_length, shape.max_position)
    tokenizer = None if tokens_only else tokenizers.load(tokenizer_path or model, model)
    if tokenizer is not None:
        tokenizers.check_vocab_size(tokenizer, shape.vocab_size)
    sync.check(shape, precision, sharding.single_device_mesh())

    def load() -> OrchestratorDriver:
        mesh = sharding.single_device_mesh()
        config, params = weights.load(model)
        engine = Engine(
            config,
            slots=slots,
            max_length=max_length,
            steps=steps,
            precision=precision,
            mesh=mesh,
            stop_ids=tokenizer.eos_ids if tokenizer else (),
        )
        policy = sync.converter(config, precision, mesh)(params, 0)
        return OrchestratorDriver(engine, policy, waiting=waiting, sampling=sampling, seed=seed)

    async def serve() -> int:
        server, bound = listen(host, port, slots + waiting + SPARE_RPCS)
        running = load()
        add_service(Orchestrator(running, tokenizer, max_prompt), server)
        await server.start()
        print(f"serving {model} on {host}:{bound}", flush=True)
        status = await _until_stopped(server, running, grace)
        if status:
            os._exit(status)  # a thread inside XLA holds up, or aborts, the interpreter's own exit
        return status

    return asyncio.run(serve())


async def _until_stopped(server: grpc.aio.Server, running: OrchestratorDriver, grace: float) -> int:
    """Waits for a signal, then `grace` seconds for the requests that were accepted; a second signal
    ends those too. Returns an exit status."""
    asked = asyncio.Event()
    hurried = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (hurried if asked.is_set() else asked).set()
        )
    await asked.wait()
    running.close()
    print(
        f"finishing the requests that were accepted, for {grace:g} s at most; a second signal "
        "stops at once",
        flush=True,
    )
    drained = asyncio.create_task(_drain(server, running))
    cut = asyncio.create_task(hurried.wait())
    await asyncio.wait({drained, cut}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    cut.cancel()
    if drained.done():
        return 0
    await server.stop(None)
    return 1


async def _drain(server: grpc.aio.Server, running: OrchestratorDriver) -> None:
    """Ends the driver first: to new requests it answers UNAVAILABLE, where a gRPC server that stops
    may say CANCELLED.
    """
    await asyncio.to_thread(running.stop)
    await server.stop(MOST_GRACE)


def _lengths(max_prompt: int | None, max_length: int | None, positions: int) -> tuple[int, int]:
    """`run`'s max_prompt and max_length, of a model with so many positions. Raises ValueError where
    they do not fit.
    """
    if max_length is None:
        max_length = min(2048, positions)
    if not 2 <= max_length <= positions:
        raise ValueError(
            f"--max-length is {max_length}; it must lie in 2..{positions}, the positions of the model"
        )
    if max_prompt is None:
        max_prompt = max_length // 2
    if not 1 <= max_prompt < max_length:
        raise ValueError(
            f"--max-prompt is {max_prompt}; it must be at least 1 and less than --max-length, {max_length}"
        )
    return max_prompt, max_length


def _check_range(name: str, value: float, least: float, most: float = 2**31 - 1) -> None:
    if not least <= value <= most:
        raise ValueError(f"--{name} is {value}; it must lie in {least}..{most}")
