"""Samples completions of prompt texts from a model folder: what `dcmdp generate` does."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dcmdp_jax import data, files, sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import weights
from dcmdp_jax.records import Example, Prompts, Sampling
from dcmdp_jax.rollout import server_sampler, servers
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.tokens import tokenizer as tokenizers

CHUNK = 64  # prompts that are sampled, and written, together
SLOTS = 32  # sequences decoded together, at most


class Completion(NamedTuple):
    """A prompt's text and one completion of it."""

    prompt: str
    text: str
    logp: float  # of the completion's tokens together, nats, of the distribution sampled from
    stopped: bool  # ended by a stop token or string, not by the length limit


def read_prompts(path: str) -> list[str]:
    """Returns the prompts of a file: the lines of a text file, or the rows of JSONL or Parquet.

    Raises ValueError if there are none.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"file of prompts {path} does not exist")
    if pathlib.Path(path).suffix in (".jsonl", ".json", ".parquet"):
        prompts = [example.prompt for example in data.read(path)]
    else:
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        prompts = [line for line in lines if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path} holds no prompts, or chat messages where texts are wanted")
    return prompts


def texts(
    folder: str,
    prompts: Sequence[str],
    *,
    tokenizer_path: str = "",
    precision: Precision = Precision(),
    server: str = "",
    max_tokens: int = 64,
    samples: int = 1,
    sampling: Sampling = Sampling(),
    stop_strings: tuple[str, ...] = (),
    seed: int = 0,
    chat: bool = False,
    start: int = 0,
    chunk_size: int = CHUNK,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[list[Completion]]:
    """Returns an iterator over the completions of `chunk_size` prompts at a time.

    Args:
        folder: a Hugging Face model folder.
        prompts: texts.
        tokenizer_path: file or folder of the tokenizer; empty: the model's folder.
        precision: of the engine.
        server: address of a server that samples in the place of the engine, with the folder's
            weights (see `servers.connect`).
        max_tokens: the longest completion.
        samples: completions of each prompt.
        sampling: how tokens are drawn; a temperature of 0 is greedy.
        stop_strings: texts that end a completion.
        seed: completion j of prompt i depends on `seed`, i and j alone, not on `start`.
        chat: whether each prompt is put into the model's chat template as a user's message.
        start: number of the first prompt to complete.
        devices: the first is used; None: of all there are.

    Raises ValueError, at the call, if the arguments do not fit. Weights are read with the first
    chunk.
    """
    _check_text(prompts)
    mesh = sharding.single_device_mesh(devices)
    model_config = weights.read_config(folder)
    tokenizer = tokenizers.load(tokenizer_path or folder, folder)
    tokenizers.check_vocab_size(tokenizer, model_config.vocab_size)
    tokenized = data.tokenize(
        [Example(prompt, "") for prompt in prompts], tokenizer, data.PromptFormat(chat=chat)
    )
    max_length = int(tokenized.lengths.max()) + max_tokens
    _check_lengths(tokenized.lengths, max_length, model_config.max_position)
    sync.check(model_config, precision, mesh)
    weights.check(folder)

    connected = servers.connect(server) if server else None
    if connected is not None:
        server_sampler.check_support(sampling, f"{connected.client.name} at {server}")
        connected.label(lambda: False)  # raises where the server takes no weights

    def chunks() -> Iterator[list[Completion]]:
        model, params = weights.load(folder)
        if connected is not None:
            sampler = server_sampler.ServerSampler(model, tokenizer, connected)
        else:
            sampler = JetStreamSampler(
                model,
                tokenizer,
                mesh,
                slots=min(len(prompts) * samples, SLOTS),
                max_length=max_length,
                precision=precision,
            )
        sampler.update_weights(params, 0)
        for first in range(start, len(prompts), chunk_size):
            chunk = Prompts(*(field[first : first + chunk_size] for field in tokenized))
            rollout = sampler.sample(
                chunk,
                samples=samples,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_strings=stop_strings,
                seed=seed,
                offset=first * samples,
                should_stop=lambda: False,
            )
            yield [
                Completion(
                    prompts[first + i // samples],
                    tokenizer.decode(rollout.tokens[i, :length]),
                    float(rollout.rollout_logp[i].sum()),
                    bool(rollout.stopped[i]),
                )
                for i, length in enumerate(rollout.text_lengths)
            ]

    return chunks()


def _check_text(prompts: Sequence[str]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError:  # the shell was given bytes that are not UTF-8
            raise ValueError(
                f"prompt {number} of {len(prompts)} is not valid Unicode text; correct it"
            ) from None


def _check_lengths(lengths: np.ndarray, max_length: int, max_position: int) -> None:
    if not lengths.all():
        empty = int(lengths.argmin()) + 1
        raise ValueError(f"prompt {empty} of {len(lengths)} is empty; leave it out")
    if max_length > max_position:
        raise ValueError(
            f"the longest prompt and --max-tokens take {max_length} positions, more than the "
            f"model's {max_position}"
        )


def to_file(
    path: pathlib.Path,
    folder: str,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    chunk_size: int = CHUNK,
    devices: Sequence[jax.Device] | None = None,
    **options,
) -> int:
    """Writes a JSON line for each completion to `path`, or goes on where the file ends.

    The first line holds the options. A truncated line, and the rest of its chunk, are sampled
    again. `options` are those of `texts`.

    Returns the number of completions added. Raises ValueError, and leaves `path` as it is, if it
    holds something other than completions of these prompts by this model with these options.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"folder {path.parent} of --output {path.name} does not exist; make it, or give another"
        )
    chunk_lines = chunk_size * samples
    total = len(prompts) * samples
    record = {"model": str(folder), "samples": samples, **options}
    header = {"options": json.loads(json.dumps(record, default=dataclasses.asdict))}
    # After the last newline comes nothing, or a truncated line.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [_parsed(line) for line in text.split("\n")[:-1]]
    if lines and lines[0] != header:
        raise ValueError(
            f"{path} was not written with these options and this model; give another --output, or "
            "those it was started with"
        )
    for number, line in enumerate(lines[1:]):
        if (
            number >= total
            or not isinstance(line, dict)
            or line.get("prompt") != prompts[number // samples]
        ):
            raise ValueError(
                f"line {number + 2} of {path} is no completion of the prompt it should be of; "
                "give another --output, or the prompts it was started with"
            )
    done = len(lines) - 1 if lines else 0
    reusable = total if done == total else done // chunk_lines * chunk_lines  # complete chunks
    chunks = ()
    if reusable < total:
        start = reusable // samples
        chunks = texts(
            folder,
            prompts,
            samples=samples,
            start=start,
            chunk_size=chunk_size,
            devices=devices,
            **options,
        )
    reused = [header, *lines[1 : reusable + 1]]
    files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in reused))
    added = 0
    for chunk in chunks:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(completion._asdict()) + "\n" for completion in chunk)
        added += len(chunk)
    return added


def _parsed(line: str) -> object:
    """Returns the line's JSON value, or None if it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
