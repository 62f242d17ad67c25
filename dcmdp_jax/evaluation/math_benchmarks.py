"""`dcmdp eval`: a model folder on the six mathematical evaluation sets, sampled by the engine.

The work folder holds a JSONL file a set, one line a sample, written as completions end;
`options.json`; and `summary.json` with the figures of `scores.summary`. Held-out evaluation during
training is `evaluate.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import data, files, lock, rewards, sharding, sync
from dcmdp_jax import tokenizer as tokenizers
from dcmdp_jax.answers import judge
from dcmdp_jax.config import Compute, MeshConfig, Precision
from dcmdp_jax.evaluation import scores
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.records import Example, Prompts, Sampling, Weights
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.generate import SlotEngine, completion_keys, rollout
from dcmdp_jax.run_record import differences

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
POSITIONS = 1 << 26  # of completions that one rollout has room for on the host
EVERY = 30.0  # seconds between two lines of progress
SUMMARY = "summary.json"
JUDGED = {"answer", "right", "stopped", "tokens"}  # what the figures are made of

Key = tuple[int, int]  # a problem's place in its set, from 0, and the sample's number


class Benchmark(NamedTuple):
    files: tuple[str, ...]  # names in the data folder, the first that is there is read
    samples: int  # the paper's k


BENCHMARKS = {
    "aime24": Benchmark(("aime24.jsonl",), 32),
    "aime25": Benchmark(("aime25.jsonl",), 32),
    "amc23": Benchmark(("amc23.jsonl",), 32),
    "math500": Benchmark(("math500.jsonl",), 4),
    "minerva": Benchmark(("minerva.jsonl", "minerva_math.jsonl"), 4),
    "olympiad": Benchmark(("olympiad.jsonl", "olympiadbench.jsonl"), 4),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked, and how it is answered; the names are the command line's."""

    folder: str  # a Hugging Face folder
    data_dir: str
    tokenizer: str = ""  # folder or file; empty: the model's folder
    sets: tuple[str, ...] = tuple(BENCHMARKS)
    # samples a problem: one number for all sets, or one for each; none: the paper's
    k: tuple[int, ...] = ()
    limit: int = 0  # problems of a set, the first ones; 0: all
    max_tokens: int = 32_768
    sampling: Sampling = Sampling(0.7)
    precision: Precision = Precision()
    bfloat16: bool = False  # compute in bfloat16
    tensor: int = 1  # devices over which the weights are split
    slots: int = 32
    seed: int = 0
    chat: bool = True
    enable_thinking: bool = False
    instruction: str = INSTRUCTION


class EvalSet(NamedTuple):
    """One set, ready to be asked."""

    name: str
    prompts: Prompts
    samples: int  # k
    file: pathlib.Path  # of its samples


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `prepare` has found to be in order."""

    options: Options
    workdir: pathlib.Path
    tokenizer: tokenizers.Tokenizer
    sets: tuple[EvalSet, ...]
    max_length: int  # positions of the longest prompt and its completion
    lock: IO[str]  # on the work folder, until `run` ends


def prepare(options: Options, workdir: pathlib.Path) -> Evaluation:
    """Reads and checks everything but the weights, and makes the work folder or finds it to belong
    to this evaluation.

    Raises ValueError, in one sentence, on whatever cannot work; nothing is compiled before.
    """
    _check(options)
    folder = options.folder
    shape = weights.read_config(folder)
    sync.check(shape, options.precision, _mesh(options))
    weights.check(folder)
    tokenizer = tokenizers.load(options.tokenizer or folder, folder)
    tokenizers.check_vocab_size(tokenizer, shape.vocab_size)
    room = shape.max_position - options.max_tokens
    sets = tuple(
        _ask(name, k, options, tokenizer, room, workdir)
        for name, k in zip(options.sets, _samples(options))
    )
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file; name a folder")
    record = _record(options, sets, tokenizer)
    path = workdir / "options.json"
    if path.is_file():
        before = _read(path)
        if not isinstance(before.get("sets"), dict):
            raise ValueError(f"{path} is no record of an evaluation; give another --workdir")
        _same(before, record, workdir)
        record = {**record, "sets": {**before["sets"], **record["sets"]}}
    elif stray := [item.file for item in sets if item.file.exists()]:
        raise ValueError(
            f"{stray[0]} is there but {path} is not; give another --workdir, or move the file away"
        )
    for item in sets:
        _kept(item)  # so that a strange line is named now
    _read(workdir / SUMMARY)  # and a damaged summary
    held = lock.take(workdir)
    files.write_atomic(path, json.dumps(record, indent=2) + "\n")
    longest = max(int(item.prompts.lengths.max()) for item in sets)
    return Evaluation(options, workdir, tokenizer, sets, longest + options.max_tokens, held)


def run(
    evaluation: Evaluation,
    asked: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """Samples what the work folder lacks and returns the figures of each set, which `summary.json`
    then holds.

    A sample depends on the weights, the seed, its set, its problem's place in the set and its own
    number: not on slots, on order or on what was there before. Raises `Interrupted` where `asked()`
    says so, with every ended sample written.
    """
    # the weights are read where there is something to sample
    started = functools.cache(lambda: _start(evaluation))
    figures = {}
    library = judge.library()
    given_up = library.given_up
    with evaluation.lock:
        for item in evaluation.sets:
            lines = _fill(evaluation, item, started, asked, say)
            figures[item.name] = _figures(item, lines)
    if count := library.given_up - given_up:
        say(
            f"{count} comparisons took longer than {library.seconds:g} s, or too much memory, and "
            "count as wrong"
        )
    path = evaluation.workdir / SUMMARY
    files.write_atomic(path, json.dumps({**_read(path), **figures}, indent=2) + "\n")
    return figures


def _check(options: Options) -> None:
    """Refuses what can be refused from the options alone."""
    for name in options.sets:
        if name not in BENCHMARKS:
            raise ValueError(
                f"there is no set {name!r}; --sets takes names out of {','.join(BENCHMARKS)}"
            )
    if len(set(options.sets)) < len(options.sets) or not options.sets:
        raise ValueError("--sets names no set, or one twice")
    if len(options.k) not in (0, 1, len(options.sets)):
        raise ValueError(
            f"--k takes one number for all sets or one for each of the {len(options.sets)}, "
            f"not {len(options.k)}"
        )
    for name, value, least in (
        ("k", min(options.k, default=1), 1),
        ("max-tokens", options.max_tokens, 1),
        ("slots", options.slots, 1),
        ("limit", options.limit, 0),
        ("tensor", options.tensor, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if options.tensor > len(jax.devices()):
        raise ValueError(
            f"--tensor {options.tensor} are more devices than the {len(jax.devices())} there are"
        )
    if not pathlib.Path(options.data_dir).is_dir():
        raise ValueError(
            f"--data-dir {options.data_dir} is no folder; name the one that holds the sets' .jsonl files"
        )


def _samples(options: Options) -> tuple[int, ...]:
    if not options.k:
        return tuple(BENCHMARKS[name].samples for name in options.sets)
    return options.k if len(options.k) > 1 else options.k * len(options.sets)


def _ask(
    name: str,
    k: int,
    options: Options,
    tokenizer: tokenizers.Tokenizer,
    room: int,
    workdir: pathlib.Path,
) -> EvalSet:
    """A set, read and tokenized. Raises ValueError where its file is missing, or a prompt has more
    than `room` tokens.
    """
    paths = [pathlib.Path(options.data_dir) / file for file in BENCHMARKS[name].files]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"set {name} is not in {options.data_dir}: looked for {' and '.join(path.name for path in paths)}; "
            "put the file there, or leave the set out of --sets"
        )
    problems = data.read(path)[: options.limit or None]
    prompts = data.tokenize(
        problems,
        tokenizer,
        chat=options.chat,
        enable_thinking=options.enable_thinking,
        instruction=options.instruction,
    )
    longest = int(prompts.lengths.max())
    if longest > room:
        raise ValueError(
            f"problem {int(prompts.lengths.argmax()) + 1} of {path} has {longest} tokens, which with "
            f"--max-tokens {options.max_tokens} are more than the model's {room + options.max_tokens} "
            "positions; lower --max-tokens"
        )
    return EvalSet(name, prompts, k, workdir / f"{name}.jsonl")


def _mesh(options: Options) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(tensor=options.tensor), jax.devices()[: options.tensor])


def _record(
    options: Options, sets: Sequence[EvalSet], tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """What a work folder is made with, all that its samples depend on, by the names of the options."""
    given = {
        name: getattr(options, name)
        for name in ("max_tokens", "bfloat16", "seed", "chat", "enable_thinking", "instruction")
    }
    asked = {
        item.name: {
            "k": item.samples,
            "limit": len(item.prompts.lengths),
            "data_dir": _digest(item.prompts.examples),
        }
        for item in sets
    }
    return {
        **given,
        **options.sampling._asdict(),
        **dataclasses.asdict(options.precision),
        "tokenizer": [tokenizer.vocab_size, *tokenizer.eos_ids],
        "model": _fingerprint(pathlib.Path(options.folder)),
        "sets": asked,
    }


def _digest(problems: Sequence[Example]) -> str:
    texts = [(problem.prompt, problem.answer, problem.source) for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _fingerprint(folder: pathlib.Path) -> str:
    """Of a model's weights: 64 places of each file, so that another checkpoint of the same shape is
    told apart.
    """
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                found.update(file.read(1 << 16))
    return found.hexdigest()[:16]


def _same(before: dict, now: dict, workdir: pathlib.Path) -> None:
    """Raises ValueError, with the names of the options, where a work folder was made otherwise.

    An option that is not known today is left out where it was not set.
    """
    before = {name: value for name, value in before.items() if value or name in now}
    if unknown := before.keys() - now.keys():
        raise ValueError(
            f"{workdir} was made with {', '.join(sorted(unknown))}, which is not "
            "known here; give another --workdir"
        )
    both = before["sets"].keys() & now["sets"].keys()
    before, now = (
        {**record, "sets": {name: record["sets"][name] for name in both}}
        for record in (before, now)
    )
    changed = []
    for name, (old, new) in differences(before, now).items():
        *of_set, option = name.removeprefix("sets.").split(".")
        changed.append(
            f"--{option.replace('_', '-')} ({', '.join([repr(old), f'now {new!r}', *of_set])})"
        )
    if changed:
        raise ValueError(
            f"{workdir} was made with another {', '.join(changed)}; give another --workdir, or the options "
            "it was started with"
        )


def _start(evaluation: Evaluation) -> tuple[SlotEngine, Weights]:
    """The engine and its weights, on their devices."""
    options, mesh = evaluation.options, _mesh(evaluation.options)
    shape = weights.read_config(options.folder)
    model = dataclasses.replace(shape, compute=Compute(bfloat16=options.bfloat16))
    shapes = jax.eval_shape(functools.partial(decoder.init, config=model), jax.random.key(0))
    places = sharding.param_shardings(decoder.logical_axes(model), mesh, sharding.DECODE, shapes)
    _, params = weights.load(
        options.folder, jnp.bfloat16 if options.bfloat16 else jnp.float32, shardings=places
    )
    engine = jetstream.Engine(
        model,
        slots=options.slots,
        max_length=evaluation.max_length,
        precision=options.precision,
        stop_ids=evaluation.tokenizer.eos_ids,
        mesh=mesh,
    )
    return engine, sync.converter(model, options.precision, mesh)(params, 0)


def _kept(item: EvalSet) -> dict[Key, dict]:
    """The samples that a set's file holds, by problem and number; what stands after the last
    newline was cut short.

    Raises ValueError on a line that is none of them.
    """
    found = {}
    wanted = _wanted(item)
    lines = item.file.read_bytes().split(b"\n")[:-1] if item.file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            sample = files.parse_json(line, str(item.file))
            key = sample["problem"], sample["sample"]
            strange = sample["set"] != item.name or key in found or key not in wanted
            strange = strange or not sample.keys() >= JUDGED
        except (ValueError, KeyError, TypeError):
            strange = True
        if strange:
            raise ValueError(
                f"line {number} of {item.file} is no sample of this evaluation, or one that is there already; "
                "take it out, or give another --workdir"
            )
        found[key] = sample
    return found


def _wanted(item: EvalSet) -> dict[Key, None]:
    """Every key of a set, in order."""
    return dict.fromkeys(
        (i, j) for i in range(len(item.prompts.lengths)) for j in range(item.samples)
    )


def _fill(
    evaluation: Evaluation,
    item: EvalSet,
    started: Callable[[], tuple[SlotEngine, Weights]],
    asked: Callable[[], bool],
    say: Callable[[str], None],
) -> list[dict]:
    """All samples of a set in order, of which those that its file lacks are sampled, judged and
    written.
    """
    options = evaluation.options
    kept = _kept(item)
    wanted = _wanted(item)
    spoke = time.monotonic()
    turns = _turns(
        [key for key in wanted if key not in kept], item.samples, POSITIONS // options.max_tokens
    )
    files.write_atomic(item.file, _text(kept.values()))  # without a line that was cut short
    with item.file.open("a", encoding="utf-8") as file:
        for keys, samples in turns:

            def ended(number: int, ids: np.ndarray, stopped: bool, keys=keys) -> None:
                nonlocal spoke
                text = evaluation.tokenizer.decode(ids.tolist())
                kept[keys[number]] = sample = _judged(item, keys[number], text, len(ids), stopped)
                file.write(_text([sample]))
                file.flush()
                if time.monotonic() - spoke > EVERY:
                    spoke = time.monotonic()
                    right = sum(sample["right"] for sample in kept.values())
                    say(f"{item.name}: {len(kept)} of {len(wanted)} samples, {right} right")

            engine, policy = started()
            rows = [problem for problem, _ in keys[::samples]]
            prompts = Prompts(
                item.prompts.tokens[rows],
                item.prompts.lengths[rows],
                tuple(item.prompts.examples[problem] for problem in rows),
            )
            rollout(
                engine,
                policy,
                prompts,
                samples=samples,
                key=_sample_keys(options.seed, item, keys),
                max_tokens=options.max_tokens,
                sampling=options.sampling,
                asked=asked,
                ended=ended,
            )
    ordered = [kept[key] for key in wanted]
    files.write_atomic(item.file, _text(ordered))
    return ordered


def _turns(missing: list[Key], samples: int, most: int) -> list[tuple[list[Key], int]]:
    """Parts of at most `most` completions (one problem's at the least), with the samples of a
    problem that stand together: all where none has been made, so that they share a prefill, else
    one.
    """
    of = {}
    for key in missing:
        of.setdefault(key[0], []).append(key)
    fresh = [key for keys in of.values() if len(keys) == samples for key in keys]
    begun = [key for keys in of.values() if len(keys) < samples for key in keys]
    size = max(most // samples, 1) * samples
    return [
        (keys[i : i + size], each)
        for keys, each in ((begun, 1), (fresh, samples))
        for i in range(0, len(keys), size)
    ]


def _sample_keys(seed: int, item: EvalSet, keys: list[Key]) -> np.ndarray:
    """A random key for each (problem, sample), [N, 2] uint32, whatever else is sampled."""
    of_set = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(item.name.encode())))
    of = {
        i: completion_keys(jax.random.fold_in(of_set, i), item.samples)
        for i in dict.fromkeys(i for i, _ in keys)
    }
    return np.stack([of[i][j] for i, j in keys])


def _judged(item: EvalSet, key: Key, text: str, tokens: int, stopped: bool) -> dict:
    """The sample that a file holds.

    A completion that was cut off is judged by what it states, as is usual for avg@k; training gives
    its verifier an empty text instead (`rewards.score`).
    """
    example = item.prompts.examples[key[0]]
    return {
        "set": item.name,
        "problem": key[0],
        "sample": key[1],
        "gold": example.answer,
        "answer": rewards.final_answer(text),
        "right": rewards.math_answer(example, text) == 1.0,
        "stopped": stopped,
        "tokens": tokens,
        "text": text,
    }


def _figures(item: EvalSet, lines: list[dict]) -> dict[str, Any]:
    """`scores.summary` of a set's samples, all of them in order."""
    shape = len(item.prompts.lengths), item.samples
    names = ("right", "stopped", "tokens")
    right, stopped, tokens = (
        np.array([line[name] for line in lines]).reshape(shape) for name in names
    )
    answers = [
        [line["answer"] for line in lines[i : i + shape[1]]] for i in range(0, len(lines), shape[1])
    ]
    vote = np.stack([scores.votes(row, good, judge.equal) for row, good in zip(answers, right)])
    return {
        "problems": shape[0],
        "samples": shape[1],
        **scores.summary(scores.Samples(right, stopped, tokens, vote)),
    }


def _text(lines: Iterable[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read(path: pathlib.Path) -> dict:
    """The object that a file of the work folder holds; none where it is not there."""
    try:
        return files.read_json_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; move it away") from None
