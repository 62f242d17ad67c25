"""`dcmdp eval`: a model folder on six sets of mathematical problems, sampled by the engine.

The work folder holds a file of samples for each set, `options.json`, and `summary.json` with the
figures of `scores.summary`. Held-out evaluation during training is `held_out.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import data, files, sharding, sync
from dcmdp_jax.answers import judge
from dcmdp_jax.config import MeshConfig, ModelSource, Precision
from dcmdp_jax.evaluation import eval_set
from dcmdp_jax.evaluation.eval_set import EvalSet, Key
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.records import Example, Prompts, Sampling
from dcmdp_jax.rollout.generate import completion_keys
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.run import lock, staging
from dcmdp_jax.run.record import differences
from dcmdp_jax.tokens import tokenizer as tokenizers

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
MAX_POSITIONS = 1 << 26  # of the completions of one rollout, which are in host memory together
SECONDS_BETWEEN_LINES = 30.0
SUMMARY = "summary.json"
OPTIONS = "options.json"


class Benchmark(NamedTuple):
    """A set of problems as it is published."""

    files: tuple[str, ...]  # names that it has in a data folder
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
    """What an evaluation samples, and how; messages name the options of the command line."""

    model: ModelSource  # its folder, its tokenizer, and if it computes in bfloat16
    data_dir: str
    sets: tuple[str, ...] = tuple(BENCHMARKS)
    k: tuple[
        int, ...
    ] = ()  # samples of a problem: one number, or one for each set; (): the paper's
    limit: int = 0  # only so many problems of each set, from its first on; 0: all
    max_tokens: int = 32_768
    sampling: Sampling = Sampling(0.7)
    precision: Precision = Precision()
    tensor: int = 1  # devices over which the weights are split
    slots: int = 32
    seed: int = 0
    chat: bool = True
    enable_thinking: bool = False
    instruction: str = INSTRUCTION


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation whose inputs and work folder `prepare` has checked."""

    options: Options
    workdir: pathlib.Path
    tokenizer: tokenizers.Tokenizer
    sets: tuple[EvalSet, ...]
    max_length: int  # positions of the longest prompt and its completion
    lock: IO[str] | staging.Lock  # on the work folder, until `run` ends
    mesh: jax.sharding.Mesh


# (prompts, *, samples, key, should_stop, on_completion): calls on_completion(number, ids, stopped)
# for each completion
Sample = Callable[..., Any]


def prepare(
    options: Options, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> Evaluation:
    """Reads and checks everything but the weights; makes the work folder, or checks that it belongs
    to this evaluation. `devices` are those that it may use (None: all there are).

    Raises ValueError, in one sentence, on bad input, before anything is compiled.
    """
    _check(options)
    folder = options.model.folder
    model_config = weights.read_config(folder)
    mesh = _mesh(options, jax.devices() if devices is None else devices)
    sync.check(model_config, options.precision, mesh)
    weights.check(folder)
    tokenizer = tokenizers.load(options.model.tokenizer or folder, folder)
    tokenizers.check_vocab_size(tokenizer, model_config.vocab_size)
    sets = tuple(
        _load_set(name, samples, options, tokenizer, model_config.max_position, workdir)
        for name, samples in zip(options.sets, _samples_per_problem(options))
    )
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file; name a folder")
    record = _record(options, sets, tokenizer)
    _check_folder(workdir, record, sets)
    staged = staging.of(workdir)
    folder_lock = staged.take() if staged else lock.take(workdir)
    if staged:  # the last holder of the lock may have written since it was read
        staged.refresh()
    record = _check_folder(workdir, record, sets)
    files.write_atomic(workdir / OPTIONS, json.dumps(record, indent=2) + "\n")
    longest = max(int(item.prompts.lengths.max()) for item in sets)
    max_length = longest + options.max_tokens
    return Evaluation(options, workdir, tokenizer, sets, max_length, folder_lock, mesh)


def start_engine(evaluation: Evaluation) -> Sample:
    """Loads the weights into an engine on the evaluation's devices, and returns what samples from
    it.
    """
    options = evaluation.options
    mesh = evaluation.mesh
    model_config = weights.read_config(options.model.folder)
    model_config = dataclasses.replace(model_config, compute=options.model.compute)
    shapes = jax.eval_shape(functools.partial(decoder.init, config=model_config), jax.random.key(0))
    shardings = sharding.param_shardings(
        decoder.logical_axes(model_config), mesh, sharding.DECODE, shapes
    )
    _, params = weights.load(
        options.model.folder,
        jnp.bfloat16 if options.model.compute.bfloat16 else jnp.float32,
        shardings=shardings,
    )
    sampler = JetStreamSampler(
        model_config,
        evaluation.tokenizer,
        mesh,
        slots=options.slots,
        max_length=evaluation.max_length,
        precision=options.precision,
    )
    sampler.update_weights(params, 0)

    def sample(prompts, *, samples, key, should_stop, on_completion):
        sampler.sample(
            prompts,
            samples=samples,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            keys=key,
            should_stop=should_stop,
            on_end=on_completion,
        )

    return sample


def run(
    evaluation: Evaluation,
    should_stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = lambda line: None,
    *,
    start: Callable[[Evaluation], Sample] = start_engine,
    max_positions: int = MAX_POSITIONS,
) -> dict[str, dict]:
    """Samples what the work folder lacks and returns the figures of each set, which `summary.json`
    then holds.

    A sample depends on the weights, the seed, its set, its problem's place in the set and its own
    number: not on slots, on order or on what was there before. `start` is called only if a sample
    is missing. Raises `Interrupted` if `should_stop()`, with every finished sample written, and
    OSError if a bucket cannot be written to or another run has taken the folder over.
    """
    started = functools.cache(lambda: start(evaluation))
    figures = {}
    library = judge.library()
    given_up_before = library.given_up
    with evaluation.lock, staging.uploaded(evaluation.workdir):
        for item in evaluation.sets:
            samples = _complete(evaluation, item, started, should_stop, log, max_positions)
            figures[item.name] = item.figures(samples)
        path = evaluation.workdir / SUMMARY
        files.write_atomic(path, json.dumps({**_read_object(path), **figures}, indent=2) + "\n")
    if count := library.given_up - given_up_before:
        log(
            f"{count} comparisons took longer than {library.seconds:g} s, or too much memory, and "
            "count as wrong"
        )
    return figures


def _check(options: Options) -> None:
    """Raises ValueError on options that cannot work, whatever the files hold."""
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
    if not pathlib.Path(options.data_dir).is_dir():
        raise ValueError(
            f"--data-dir {options.data_dir} is no folder; name the one that holds the sets' .jsonl "
            "files"
        )


def _samples_per_problem(options: Options) -> tuple[int, ...]:
    if not options.k:
        return tuple(BENCHMARKS[name].samples for name in options.sets)
    return options.k if len(options.k) > 1 else options.k * len(options.sets)


def _load_set(
    name: str,
    samples: int,
    options: Options,
    tokenizer: tokenizers.Tokenizer,
    max_position: int,
    workdir: pathlib.Path,
) -> EvalSet:
    """Reads and tokenizes a set.

    Raises ValueError if its file is missing, or if a prompt and a completion of `max_tokens` have
    more than `max_position` tokens.
    """
    paths = [pathlib.Path(options.data_dir) / file for file in BENCHMARKS[name].files]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"set {name} is not in {options.data_dir}: looked for "
            f"{' and '.join(path.name for path in paths)}; "
            "put the file there, or leave the set out of --sets"
        )
    problems = data.read(path)[: options.limit or None]
    prompt_format = data.PromptFormat(options.chat, options.enable_thinking, options.instruction)
    prompts = data.tokenize(problems, tokenizer, prompt_format)
    longest = int(prompts.lengths.max())
    if longest + options.max_tokens > max_position:
        raise ValueError(
            f"problem {int(prompts.lengths.argmax()) + 1} of {path} has {longest} tokens, which "
            f"with --max-tokens {options.max_tokens} are more than the model's {max_position} "
            "positions; lower --max-tokens"
        )
    return EvalSet(name, prompts, samples, workdir / f"{name}.jsonl")


def _mesh(options: Options, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    if options.tensor > len(devices):
        raise ValueError(
            f"--tensor {options.tensor} are more devices than the {len(devices)} there are"
        )
    return sharding.make_mesh(MeshConfig(tensor=options.tensor), devices[: options.tensor])


def _record(
    options: Options, sets: Sequence[EvalSet], tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """Returns all that the samples of a work folder depend on, by the names of the options."""
    names = ("max_tokens", "seed", "chat", "enable_thinking", "instruction")
    return {
        **{name: getattr(options, name) for name in names},
        "bfloat16": options.model.compute.bfloat16,
        **options.sampling._asdict(),
        **dataclasses.asdict(options.precision),
        "tokenizer": [tokenizer.vocab_size, *tokenizer.eos_ids],
        "model": _fingerprint(pathlib.Path(options.model.folder)),
        "sets": {
            item.name: {
                "k": item.samples,
                "limit": len(item.prompts.lengths),
                "data_dir": _digest(item.prompts.examples),
            }
            for item in sets
        },
    }


def _check_folder(workdir: pathlib.Path, record: dict, sets: Sequence[EvalSet]) -> dict:
    """Returns the record of an evaluation with the sets that its work folder holds beside.

    Raises ValueError if the folder is not this evaluation's, or a file in it is damaged.
    """
    path = workdir / OPTIONS
    if path.is_file():
        before = _read_object(path)
        if not isinstance(before.get("sets"), dict):
            raise ValueError(f"{path} is no record of an evaluation; give another --workdir")
        _check_same(before, record, workdir)
        record = {**record, "sets": {**before["sets"], **record["sets"]}}
    elif stray := [item.file for item in sets if item.file.exists()]:
        raise ValueError(
            f"{stray[0]} is there but {path} is not; give another --workdir, or move the file away"
        )
    for item in sets:
        item.read()  # raises on a damaged file before anything is sampled
    _read_object(workdir / SUMMARY)
    return record


def _digest(problems: Sequence[Example]) -> str:
    """Returns a hash of all that a sample of these problems depends on."""
    texts = [[problem.prompt, problem.answer, problem.source] for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _fingerprint(folder: pathlib.Path) -> str:
    """Returns a hash of a model's weights, from 64 KiB at 64 places of each file: it differs
    between checkpoints of the same shape.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def _check_same(before: dict, now: dict, workdir: pathlib.Path) -> None:
    """Raises ValueError, with the names of the options, if a work folder was made with others.

    An option of another version counts only if it was set.
    """
    before = {name: value for name, value in before.items() if value or name in now}
    if unknown := before.keys() - now.keys():
        raise ValueError(
            f"{workdir} was made with {', '.join(sorted(unknown))}, which is not "
            "known here; give another --workdir"
        )
    common = before["sets"].keys() & now["sets"].keys()
    before, now = (
        {**record, "sets": {name: record["sets"][name] for name in common}}
        for record in (before, now)
    )
    changed = []
    for name, (old, new) in differences(before, now).items():
        *set_name, option = name.removeprefix("sets.").split(".")
        values = ", ".join([repr(old), f"now {new!r}", *set_name])
        changed.append(f"--{option.replace('_', '-')} ({values})")
    if changed:
        raise ValueError(
            f"{workdir} was made with another {', '.join(changed)}; give another --workdir, or the "
            "options it was started with"
        )


def _complete(
    evaluation: Evaluation,
    item: EvalSet,
    started: Callable[[], Sample],
    should_stop: Callable[[], bool],
    log: Callable[[str], None],
    max_positions: int,
) -> list[dict]:
    """Samples, judges and writes what the file of a set lacks; returns all its samples in order."""
    samples = item.read()
    keys = item.keys()
    missing = [key for key in keys if key not in samples]
    last_line = time.monotonic()
    item.write(samples.values())  # without a line that was cut short
    with item.file.open("a", encoding="utf-8") as file:
        for batch in _batches(
            missing, item.samples, max_positions // evaluation.options.max_tokens
        ):

            def on_completion(number: int, ids: np.ndarray, stopped: bool, batch=batch) -> None:
                nonlocal last_line
                key = batch.keys[number]
                text = evaluation.tokenizer.decode(ids.tolist())
                samples[key] = item.judge(key, text, len(ids), stopped)
                file.write(eval_set.to_lines([samples[key]]))
                file.flush()
                if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    right = sum(sample["right"] for sample in samples.values())
                    log(f"{item.name}: {len(samples)} of {len(keys)} samples, {right} right")

            problems = [problem for problem, _ in batch.keys[:: batch.samples]]
            sample = started()
            sample(
                Prompts(
                    item.prompts.tokens[problems],
                    item.prompts.lengths[problems],
                    tuple(item.prompts.examples[problem] for problem in problems),
                ),
                samples=batch.samples,
                key=_sample_keys(evaluation.options.seed, item, batch.keys),
                should_stop=should_stop,
                on_completion=on_completion,
            )
    ordered = [samples[key] for key in keys]
    item.write(ordered)
    return ordered


class _Batch(NamedTuple):
    """Completions that one rollout samples."""

    keys: list[Key]
    samples: int  # of each problem, next to each other


def _batches(missing: list[Key], samples: int, size: int) -> list[_Batch]:
    """Splits the missing samples into batches of at most `size`, or of one problem.

    The samples of a problem that has none yet stay together, so that they share a prefill.
    """
    by_problem: dict[int, list[Key]] = {}
    for key in missing:
        by_problem.setdefault(key[0], []).append(key)
    untouched = [key for keys in by_problem.values() if len(keys) == samples for key in keys]
    partial = [key for keys in by_problem.values() if len(keys) < samples for key in keys]
    size = max(size // samples, 1) * samples
    return [
        _Batch(keys[i : i + size], together)
        for keys, together in ((partial, 1), (untouched, samples))
        for i in range(0, len(keys), size)
    ]


def _sample_keys(seed: int, item: EvalSet, keys: list[Key]) -> np.ndarray:
    """Returns a random key for each (problem, sample), [N, 2] uint32, whatever else is sampled."""
    name = np.uint32(zlib.crc32(item.name.encode()))
    set_key = jax.random.fold_in(jax.random.key(seed), name)
    problem_keys = {
        problem: completion_keys(jax.random.fold_in(set_key, problem), item.samples)
        for problem in dict.fromkeys(problem for problem, _ in keys)
    }
    return np.stack([problem_keys[problem][i] for problem, i in keys])


def _read_object(path: pathlib.Path) -> dict:
    """Returns the JSON object in a file of the work folder; {} if the file does not exist."""
    try:
        return files.read_json_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; move it away") from None
