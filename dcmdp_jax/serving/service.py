"""JetStream's orchestrator and gRPC service in front of the engine's driver.

Any client of google-jetstream 0.2.2 can use it (`jetstream_pb2_grpc.OrchestratorStub`: `Decode`, a
stream, and `HealthCheck`). A request holds token ids or text and receives the same; `token_ids` end
with the stop token, text does not show it. The message has no field for a temperature, so sampling
is set for the server. The version of the weights is sent as trailing metadata, `dcmdp-version`.

Status codes: INVALID_ARGUMENT for a request that cannot be answered or is no message,
RESOURCE_EXHAUSTED if the queue is full, INTERNAL if the engine failed, UNAVAILABLE at shutdown.

JetStream 0.2.2 itself is not fit for a server that has to last, so two parts of it are replaced:
  - its `Driver` (threads that SIGKILL the process on any exception, `jax.tree_map`, an unbounded
    queue, slots that decode on after their client left) by `serving.driver`;
  - its logging: the import sets the root logger to DEBUG, and `logging.info` gives it a handler.
Its `LLMOrchestrator` does not validate requests, so they are checked before it receives them. It
decodes pieces of text such as `<0x41>` as bytes, so text is passed to it character by character.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from dcmdp_jax.rollout.jetstream import stand_ins
from dcmdp_jax.serving import driver
from dcmdp_jax.serving.streamed_text import StreamedText
from dcmdp_jax.tokens import tokenizer as tokenizers


@contextmanager
def _preserved_root_logger() -> Iterator[None]:
    """Restores the root logger's level and handlers."""
    root = logging.getLogger()
    level = root.level
    handlers = list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


with stand_ins(), _preserved_root_logger():
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2
    from jetstream.core.utils.return_sample import ReturnSample
# The orchestrator calls `logging.info`, which adds a handler to a root logger that has none.
# JetStream has no setting for that, so its module gets a logger of its own in place of `logging`.
orchestrator.logging = logging.getLogger("jetstream")

LONG_TEXT = 8192  # characters; longer texts are encoded one after another


class OrchestratorDriver(driver.Driver):
    """A driver with the method that `LLMOrchestrator` calls."""

    def place_request_on_prefill_queue(self, request: orchestrator.ActiveRequest) -> None:
        """Queues a request. Raises `queue.Full`, and `driver.Closed` after `close`."""
        request.prefill_content.channel = request.return_channel
        self.submit(request.prefill_content)


class StreamedRequest:
    """A checked request: the orchestrator's request and its content, and the driver's `Request`."""

    session_cache = ""
    channel: Any = None  # the orchestrator's, set when the request is queued
    version: int | None = None  # of the weights that sampled the completion

    def __init__(self, tokens: Sequence[int], max_tokens: int, text: StreamedText | None):
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.text = text
        self._unsent = []
        self._disconnected = False

    def cancelled(self) -> bool:
        """Returns True if the client has left."""
        return self._disconnected or self.channel.cancelled()

    def send(self, tokens: list[int], version: int, ended: bool) -> None:
        """Streams tokens to the client; text only at the end of a character."""
        self.version = version
        self._unsent += tokens
        piece = self.text.add(tokens, ended) if self.text else ""
        if piece or ended or not self.text:
            # One character per item: JetStream decodes an item such as <0x41> as a byte.
            self._post(
                self.channel.add_result, [ReturnSample(text=list(piece), token_ids=self._unsent)]
            )
            self._unsent = []
        if ended:
            self._post(self.channel.close)

    def fail(self, error: Exception) -> None:
        """Ends the stream with `error`."""
        self._disconnected = True
        self._post(self.channel.set_exception, error)

    def _post(self, method: Callable, *arguments: Any) -> None:
        try:
            method(*arguments)
        except RuntimeError:  # the client's event loop is closed
            self._disconnected = True


class Orchestrator(orchestrator.LLMOrchestrator):
    """JetStream's servicer, behind a check of every request."""

    def __init__(
        self,
        running: OrchestratorDriver,
        tokenizer: tokenizers.Tokenizer | None,
        max_prompt: int,
    ):
        """Args:
        running: the driver of the engine.
        tokenizer: None refuses texts.
        max_prompt: tokens of the longest prompt.
        """
        super().__init__(running)
        self._engine = running.engine
        self._tokenizer = tokenizer
        self._max_prompt = max_prompt
        self._long_texts = ThreadPoolExecutor(1)

    async def HealthCheck(self, request: Any, context: grpc.aio.ServicerContext | None = None):
        """Returns `is_live`; see `Driver.live`."""
        if request is None:
            message = "the request is no HealthCheckRequest"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, message)
        return await super().HealthCheck(request, context)

    async def Decode(self, request: Any, context: grpc.aio.ServicerContext | None = None):
        """Streams a completion; see `DecodeRequest` of jetstream_pb2."""
        try:
            checked = await self._checked(request)
        except ValueError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            async for reply in super().Decode(checked, context):
                yield reply
        except CancelledError:  # the client left
            return
        except driver.Closed as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except driver.Failed as error:
            await _abort(context, grpc.StatusCode.INTERNAL, str(error))
        if context is not None:
            context.set_trailing_metadata((("dcmdp-version", str(checked.version)),))

    # Overrides a private method: `LLMOrchestrator.Decode` reads a request's content only through
    # it, and `checked` is already that content.
    def _get_prefill_content(self, request: StreamedRequest) -> tuple[StreamedRequest, bool]:
        return request, request.text is None

    async def _checked(self, request: Any) -> StreamedRequest:
        """Returns the request with its tokens.

        Raises ValueError, which says what to send instead, if the engine cannot answer it.
        """
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
            text = StreamedText(self._tokenizer.decode, self._engine.stop_ids)
        self._check_prompt(tokens, request.max_tokens)
        return StreamedRequest(tokens, request.max_tokens, text)

    async def _encoded(self, text: str) -> list[int]:
        """Returns the token ids of `text`, encoded outside the event loop.

        Raises ValueError without encoding if the text is longer than the longest tokens of a full
        prompt together.
        """
        longest = self._max_prompt * self._tokenizer.max_token_chars
        if len(text) > longest:
            raise ValueError(
                f"the text has {len(text)} characters; the {self._max_prompt} tokens "
                f"that this server takes hold {longest} at most; shorten it"
            )
        # Long texts share one thread, so that short ones do not wait for them.
        pool = self._long_texts if len(text) > LONG_TEXT else None
        encode = self._tokenizer.encode_prompt
        return await asyncio.get_running_loop().run_in_executor(pool, encode, text)

    def _check_prompt(self, tokens: list[int], max_tokens: int) -> None:
        count = len(tokens)
        vocab_size = self._engine.config.vocab_size
        positions = self._engine.max_length
        if not count:
            raise ValueError("the prompt is empty; send at least one token")
        if count > self._max_prompt:
            raise ValueError(
                f"the prompt has {count} tokens and this server takes {self._max_prompt}; "
                "shorten it"
            )
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary; ids go from 0 to {vocab_size - 1}"
                )
        if count + max_tokens > positions:
            raise ValueError(
                f"max_tokens is {max_tokens}; after {count} prompt tokens at most "
                f"{positions - count} fit"
            )


async def _abort(
    context: grpc.aio.ServicerContext | None, code: grpc.StatusCode, details: str
) -> None:
    """Ends an RPC with an error. Raises RuntimeError if there is no context, as JetStream does."""
    if context is None:
        raise RuntimeError(details)
    await context.abort(code, details)


def add_service(servicer: Orchestrator, server: grpc.aio.Server) -> None:
    """Registers the service.

    The servicer receives None for bytes that are no message of the right type: gRPC itself would
    answer UNKNOWN.
    """
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
