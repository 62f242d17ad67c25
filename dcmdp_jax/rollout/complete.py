"""Completions of prompt texts from a model folder."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from dcmdp_jax import data, sharding, sync, tokenizer
from dcmdp_jax.config import Precision
from dcmdp_jax.models import weights
from dcmdp_jax.records import Example, Sampling
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine

CHUNK = 64  # prompts sampled, and written, together


class Completion(NamedTuple):
    prompt: str
    text: str
    logp: float  # of the whole completion, nats, of the distribution sampled from
    stopped: bool  # by a stop token or string


def read_prompts(path: str) -> list[str]:
    """One prompt a line of a text file, or those of a JSONL or Parquet file. Raises ValueError where there are none."""
    if pathlib.Path(path).suffix in (".jsonl", ".json", ".parquet"):
        prompts = [example.prompt for example in data.read(path)]
    else:
        prompts = [line for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path} holds no prompts, or chat messages where texts are wanted")
    return prompts


def texts(folder: str, prompts: Sequence[str], *, tokenizer_path: str = "", precision: Precision = Precision(),
          max_tokens: int = 64, samples: int = 1, sampling: Sampling = Sampling(), stop_strings: tuple[str, ...] = (),
          seed: int = 0, chat: bool = False, start: int = 0) -> Iterator[list[Completion]]:
    """`samples` completions of each prompt from number `start` on, `CHUNK` prompts at a time; temperature 0 is greedy.

    A completion depends on the seed and its prompt's number, not on `start`. Raises ValueError on what cannot work.
    """
    vocabulary = tokenizer.load(tokenizer_path or folder)
    tokenizer.check_vocabulary(vocabulary, weights.read_config(folder).vocab_size)
    asked = [Example(vocabulary.chat([{"role": "user", "content": prompt}], enable_thinking=False) if chat else prompt, "")
             for prompt in prompts]
    longest = max(len(vocabulary.encode(example.prompt)) for example in asked)
    mesh = sharding.single_device_mesh()
    model, params = weights.load(folder)
    engine = Engine(model, slots=min(len(prompts) * samples, 32), max_length=longest + max_tokens, precision=precision,
                    stop_ids=vocabulary.eos_ids, mesh=mesh)
    policy = sync.make(model, precision, mesh)(params, 0)
    for first in range(start, len(prompts), CHUNK):
        chunk = data.tokenize(asked[first:first + CHUNK], vocabulary, max_prompt_tokens=longest)
        out = rollout(engine, policy, chunk, samples=samples, key=jax.random.fold_in(jax.random.key(seed), first),
                      max_tokens=max_tokens, sampling=sampling, stop_strings=stop_strings, decode=vocabulary.decode)
        yield [Completion(prompts[first + i // samples], vocabulary.decode(out.tokens[i, :n]),
                          float(out.rollout_logp[i].sum()), bool(out.stopped[i])) for i, n in enumerate(out.text_lengths)]


def to_file(path: pathlib.Path, folder: str, prompts: Sequence[str], *, samples: int = 1, **options) -> int:
    """Appends a JSON line for each completion to `path`, or goes on where it ends; returns the completions added.

    Raises ValueError where `path` holds something else than completions of these prompts.
    """
    size = CHUNK * samples
    lines = path.read_text().splitlines() if path.exists() else []
    whole = len(lines) if len(lines) == len(prompts) * samples else len(lines) // size * size
    for number, line in enumerate(lines[:whole]):
        try:
            matches = json.loads(line)["prompt"] == prompts[number // samples]
        except (ValueError, KeyError, TypeError, IndexError):
            matches = False
        if not matches:
            raise ValueError(f"line {number + 1} of {path} is no completion of the prompt it should be of; "
                             "give another --output, or the prompts and --samples it was started with")
    if whole < len(lines):
        path.write_text("".join(line + "\n" for line in lines[:whole]))
    if whole == len(prompts) * samples:
        return 0
    added = 0
    for chunk in texts(folder, prompts, samples=samples, start=whole // samples, **options):
        with path.open("a") as file:
            file.writelines(json.dumps(completion._asdict(), ensure_ascii=False) + "\n" for completion in chunk)
        added += len(chunk)
    return added
