"""A conversation with a model through the engine: what `dcmdp chat` does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import generate
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.serving.streamed_text import StreamedText
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tokens.packing import power_of_two

HELP = "/new starts another conversation, /quit or the end of the input ends"


class Chat:
    """A conversation, and the engine that continues it. Its weights are given by `load`."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: tokenizers.Tokenizer,
        *,
        precision: Precision = Precision(),
        max_length: int = 2048,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        system: str = "",
        template: bool = True,
        enable_thinking: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Checks everything but the weights.

        Args:
            max_length: most positions of a conversation; the model's, if it has fewer.
            max_tokens: most tokens of a reply.
            seed: reply number i, from 0, is drawn as `dcmdp generate` draws completion i.
            system: the conversation's first message; "": none.
            template: False completes each text as it stands, without the chat template and what
                was said before.
            devices: the first is used; None: of all there are.

        Raises ValueError on what cannot work.
        """
        mesh = sharding.single_device_mesh(devices)
        sync.check(model, precision, mesh)
        tokenizers.check_vocab_size(tokenizer, model.vocab_size)
        if system and not template:
            raise ValueError("--system needs the chat template; leave --no-chat out")
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._seed = seed
        self._system = [{"role": "system", "content": system}] if system else []
        self._template = template
        self._enable_thinking = enable_thinking
        self._tokenizer = tokenizer
        self._replies = 0
        self.forget()
        if template:
            self._check_template()
        self._sampler = JetStreamSampler(
            model,
            tokenizer,
            mesh,
            slots=1,
            max_length=min(max_length, model.max_position),
            precision=precision,
        )

    def load(self, params: Any) -> None:
        """Converts the decoder's parameters to the engine's weights."""
        device = self._sampler.engine.mesh.devices.flat[0]
        self._sampler.update_weights(jax.device_put(params, device), 0)

    def forget(self) -> None:
        """Starts a new conversation."""
        self._messages: list[dict] = [*self._system]

    def reply(self, text: str) -> Iterator[str]:
        """Yields the reply to a message, piece by piece; it then belongs to the conversation.

        Raises ValueError, and leaves the conversation as it is, if there is no room for a reply.
        """
        engine = self._sampler.engine
        ids = self._encode(text)
        if len(ids) + self._max_tokens > engine.max_length:
            raise ValueError(
                f"the conversation and a reply take {len(ids) + self._max_tokens} positions, more "
                f"than {engine.max_length}; start another with /new, or give a smaller "
                "--max-tokens or a larger --max-length"
            )
        weights = self._sampler.weights
        width = power_of_two(max(len(ids), generate.SMALLEST_BUCKET), engine.max_length)
        padded = np.pad(np.asarray(ids, np.int32), (0, width - len(ids)))
        prefix = engine.prefill(params=weights, padded_tokens=padded, true_length=len(ids))
        keys = generate.completion_keys(jax.random.key(self._seed), 1, self._replies)
        state = engine.bulk_insert(
            prefix, engine.init_decode_state(), [0], [0], keys, self._max_tokens, self._sampling
        )
        self._replies += 1
        streamed = StreamedText(self._tokenizer.decode, self._tokenizer.eos_ids)
        pieces = []
        length = len(ids)
        active = True
        try:
            while active:
                window = power_of_two(length + engine.steps, engine.max_length)
                state, result = engine.generate(weights, state, window=window)
                drawn = engine.read(result)
                tokens = drawn.drawn.token[0][drawn.valid[0]].tolist()
                length += len(tokens)
                active = bool(drawn.active[0])
                pieces.append(streamed.add(tokens, ended=not active))
                yield pieces[-1]
        finally:  # what was said counts, also if the caller stops here
            said = [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "".join(pieces)},
            ]
            self._messages += said

    def _check_template(self) -> None:
        try:
            self._encode("Hello")
        except ValueError as error:
            raise ValueError(f"{error} (here: --no-chat)") from None

    def _encode(self, text: str) -> list[int]:
        if not self._template:
            return self._tokenizer.encode_prompt(text)
        return self._tokenizer.encode_chat(
            [*self._messages, {"role": "user", "content": text}],
            enable_thinking=self._enable_thinking,
        )


def converse(chat: Chat) -> None:
    """Answers each line of standard input on standard output, until it ends."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  (input() then edits the line)

        print(HELP)
    while True:
        try:
            text = input("> " if asks else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if asks else "")
            return
        if text == "/quit":
            return
        if text == "/new":
            chat.forget()
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        for piece in chat.reply(text):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:  # ends the reply alone
        print(" ...")
    except ValueError as error:
        print(f"dcmdp: {error}", file=sys.stderr)
