"""Pairs of a prompt and the completion to be learnt after it, from files, as packed batches."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcmdp_jax import data, files, seeds
from dcmdp_jax.data import PromptFormat
from dcmdp_jax.records import Batch, Example, Prompts, Rollout, Sampling, Scored
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tokens import packing
from dcmdp_jax.tokens.tokenizer import Tokenizer

PROMPTS = ("prompt", "problem", "question")  # columns, the first that a row fills is read
COMPLETIONS = ("completion", "response", "solution", "answer")

log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """The ids of a prompt and of the completion to be learnt after it."""

    prompt: list[int]
    completion: list[int]  # what ends it included


def read(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat = PromptFormat(),
    *,
    max_tokens: int,
) -> list[Pair]:
    """Returns the pairs of a `.jsonl` or `.parquet` file, in file order.

    A row has a prompt and a completion, in the first of the columns `PROMPTS` and `COMPLETIONS`
    that it fills, or chat `messages`. Prompts are wrapped as those of rollouts are. Without chat a
    completion is a text, ended by a stop token. With it, each of the assistant's messages in a
    completion, or after the first of `messages`, makes a pair: the prompt is the conversation
    before it with the generation prompt, and the completion all that the chat template writes from
    there to the message's end.

    Pairs of more than `max_tokens` tokens are left out, and the log counts them. Raises ValueError
    on a missing or empty file, on a row that is none of this, and if all pairs are too long.
    """
    path = pathlib.Path(path)
    pairs = []
    for location, row in data.rows(path):
        try:
            pairs += _pairs(row, tokenizer, prompt_format)
        except UnicodeEncodeError:  # no tokenizer could read it
            raise ValueError(
                f"{location} holds half a surrogate pair, which is no text; fix it or leave it out"
            ) from None
        except (TypeError, RecursionError) as error:
            raise ValueError(
                f"{location} holds what JSON cannot ({error}); fix it or leave it out"
            ) from None
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
    if not pairs:
        raise ValueError(f"data file {path} is empty")
    fitting = [pair for pair in pairs if len(pair.prompt) + len(pair.completion) <= max_tokens]
    if not fitting:
        raise ValueError(
            f"{path}: none of {len(pairs)} pairs fits in {max_tokens} tokens; raise "
            "algorithm.row_length"
        )
    if len(fitting) < len(pairs):
        log.warning(
            "%s: %d of %d pairs are longer than %d tokens and are left out",
            path,
            len(pairs) - len(fitting),
            len(pairs),
            max_tokens,
        )
    return fitting


def draw(
    pairs: Sequence[Pair], batch_size: int, seed: int, step: int, *, shuffle: bool = True
) -> list[Pair]:
    """Returns the pairs of step `step`, from 0, of a run with this seed.

    Steps take consecutive pairs of an endless order, in which every epoch has each pair once, in an
    order of its own if `shuffle`. Equal arguments give equal pairs.
    """
    count = len(pairs)
    start = step * batch_size
    epochs = range(start // count, (start + batch_size - 1) // count + 1)
    order = np.concatenate([_order(count, seed, epoch, shuffle) for epoch in epochs])
    first = start % count
    return [pairs[i] for i in order[first : first + batch_size]]


def pack(
    pairs: Sequence[Pair],
    *,
    microbatches: int,
    row_length: int,
    width: int,
    row_divisor: int = 1,
    pad_id: int = 0,
) -> Batch:
    """Returns pairs in packed rows, as `packing.pack` makes them of completions, one minibatch.

    Args:
        width: T, the longest completion of any batch, so that all have one shape.

    The reward, the group and the sampler's log-probs mean nothing.
    """
    asked = np.array([len(pair.prompt) for pair in pairs], np.int32)
    told = np.array([len(pair.completion) for pair in pairs], np.int32)
    rollout = Rollout(
        prompts=Prompts(data.pad([pair.prompt for pair in pairs], asked.max(), pad_id), asked, ()),
        tokens=data.pad([pair.completion for pair in pairs], width, pad_id),
        lengths=told,
        text_lengths=told,
        rollout_logp=np.zeros((len(pairs), width), np.float32),
        stopped=np.ones(len(pairs), bool),
        version=0,
        sampling=Sampling(),
    )
    return packing.pack(
        Scored(rollout, np.zeros(len(pairs), np.float32)),
        minibatches=1,
        microbatches=microbatches,
        row_length=row_length,
        row_divisor=row_divisor,
        pad_id=pad_id,
    )


def _order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Returns the order of the pairs in one epoch."""
    if not shuffle:
        return np.arange(count)
    return np.random.default_rng(seeds.seed(seed, Stream.PAIRS, epoch)).permutation(count)


def _pairs(row: Any, tokenizer: Tokenizer, prompt_format: PromptFormat) -> Iterator[Pair]:
    """Yields the pairs of one row. Raises ValueError, to follow the row's place, if it has none."""
    prompt, completion = _prompt_and_completion(row)
    json.dumps((prompt, completion), ensure_ascii=False).encode()
    if not prompt_format.chat:
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ValueError("holds chat messages; set data.chat=True")
        ids = tokenizer.encode(completion)
        if ids[-1:] != [tokenizer.eos_ids[0]]:
            ids = [*ids, tokenizer.eos_ids[0]]
        yield Pair(data.encode(Example(prompt, ""), tokenizer, prompt_format), ids)
        return
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = data.chat_messages(prompt, prompt_format)
    replies = 0
    for message in data.chat_messages(completion, prompt_format):
        messages = [*messages, message]
        if message["role"] != "assistant":
            continue
        replies += 1
        yield Pair(
            *tokenizer.encode_reply(
                messages,
                enable_thinking=prompt_format.enable_thinking,
                special_tokens_in_text=prompt_format.special_tokens_in_text,
            )
        )
    if not replies:
        raise ValueError("holds no message of the assistant after another message")


def _prompt_and_completion(row: Any) -> tuple[str | list[dict], str | list[dict]]:
    """Returns what a row asks and what is to be learnt, each a text or chat messages."""
    if not isinstance(row, dict):
        raise ValueError(f"is not a JSON object but {files.describe(row)}")
    if row.get("messages"):
        messages = data.read_prompt(row["messages"])
        if isinstance(messages, str):
            raise ValueError("gives its messages as a text; write them as a list")
        return messages[:1], messages[1:]
    prompt = data.read_prompt(next((row[name] for name in PROMPTS if row.get(name)), None))
    completion = next((row[name] for name in COMPLETIONS if row.get(name) is not None), None)
    if isinstance(completion, list) and completion:
        return prompt, data.read_prompt(completion)
    if not isinstance(completion, str) or not completion.strip():
        raise ValueError(
            f"gives no completion as a text or messages in {', '.join(COMPLETIONS)}; it has the "
            f"columns {sorted(row)}"
        )
    return prompt, completion
