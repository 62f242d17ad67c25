"""Completions of prompt texts from a model folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from dcmdp_jax import data, files, sharding, sync
from dcmdp_jax import tokenizer as tokenizers
from dcmdp_jax.config import Precision
from dcmdp_jax.models import weights
from dcmdp_jax.records import Example, Prompts, Sampling
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine

CHUNK = 64  # prompts sampled, and written, together


class Completion(NamedTuple):
    prompt: str
    text: str
    logp: float  # of the whole completion, nats, of the distribution sampled from
    stopped: bool  # by a stop token or string


def read_prompts(path: str) -> list[str]:
    """One prompt a line of a text file, or those of a JSONL or Parquet file. Raises ValueError
    where there are none.
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
    max_tokens: int = 64,
    samples: int = 1,
    sampling: Sampling = Sampling(),
    stop_strings: tuple[str, ...] = (),
    seed: int = 0,
    chat: bool = False,
    start: int = 0,
) -> Iterator[list[Completion]]:
    """`samples` completions of each prompt from number `start` on, `CHUNK` prompts at a time;
    temperature 0 is greedy.

    A completion depends on the seed and its prompt's number, not on `start`. Raises ValueError on
    what cannot work, at the call; weights are read with the first chunk.
    """
    for number, prompt in enumerate(prompts, start=1):
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # such as bytes that are no UTF-8
            raise ValueError(
                f"prompt {number} of {len(prompts)} is not valid Unicode text; correct it"
            )
    mesh = sharding.single_device_mesh()
    shape = weights.read_config(folder)
    tokenizer = tokenizers.load(tokenizer_path or folder, folder)
    tokenizers.check_vocab_size(tokenizer, shape.vocab_size)
    asked = data.tokenize([Example(prompt, "") for prompt in prompts], tokenizer, chat=chat)
    if not asked.lengths.all():
        raise ValueError(
            f"prompt {int(asked.lengths.argmin()) + 1} of {len(prompts)} is empty; leave it out"
        )
    longest = int(asked.lengths.max())
    sync.check(shape, precision, mesh)
    weights.check(folder)
    if longest + max_tokens > shape.max_position:
        raise ValueError(
            f"the longest prompt and --max-tokens take {longest + max_tokens} positions, more than the model's "
            f"{shape.max_position}"
        )

    def chunks() -> Iterator[list[Completion]]:
        model, params = weights.load(folder)
        engine = Engine(
            model,
            slots=min(len(prompts) * samples, 32),
            max_length=longest + max_tokens,
            precision=precision,
            stop_ids=tokenizer.eos_ids,
            mesh=mesh,
        )
        policy = sync.converter(model, precision, mesh)(params, 0)
        for first in range(start, len(prompts), CHUNK):
            chunk = Prompts(*(part[first : first + CHUNK] for part in asked))
            out = rollout(
                engine,
                policy,
                chunk,
                samples=samples,
                key=jax.random.fold_in(jax.random.key(seed), first),
                max_tokens=max_tokens,
                sampling=sampling,
                stop_strings=stop_strings,
                decode=tokenizer.decode,
            )
            yield [
                Completion(
                    prompts[first + i // samples],
                    tokenizer.decode(out.tokens[i, :n]),
                    float(out.rollout_logp[i].sum()),
                    bool(out.stopped[i]),
                )
                for i, n in enumerate(out.text_lengths)
            ]

    return chunks()


def to_file(
    path: pathlib.Path, folder: str, prompts: Sequence[str], *, samples: int = 1, **options
) -> int:
    """Appends a JSON line for each completion to `path`, or goes on where it ends; returns the
    completions added.

    A line that was cut short, and the rest of its chunk, are sampled again. Raises ValueError, and
    leaves `path` as it is, where it holds something else than completions of these prompts by this
    model with these options.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"folder {path.parent} of --output {path.name} does not exist; make it, or give another"
        )
    size = CHUNK * samples
    total = len(prompts) * samples
    made = json.loads(
        json.dumps(
            {"model": str(folder), "samples": samples, **options}, default=dataclasses.asdict
        )
    )
    # After the last newline stands nothing, or a line that was cut short.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [_parsed(line) for line in text.split("\n")[:-1]]
    if lines and lines[0] != {"options": made}:
        raise ValueError(
            f"{path} was not written with these options and this model; give another --output, or those it was "
            "started with"
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
    whole = total if done == total else done // size * size
    kept = "".join(json.dumps(line) + "\n" for line in [{"options": made}, *lines[1 : whole + 1]])
    chunks = (
        texts(folder, prompts, samples=samples, start=whole // samples, **options)
        if whole < total
        else ()
    )
    files.write_atomic(path, kept)
    added = 0
    for chunk in chunks:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(completion._asdict()) + "\n" for completion in chunk)
        added += len(chunk)
    return added


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
