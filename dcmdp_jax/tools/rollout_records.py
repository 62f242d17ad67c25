"""Files of recorded completions with the log-probs that an engine reported for their tokens.

Three layouts are read, as JSON lines or as the rows of a Parquet file; none of them is a pickle.
    own        {"prompt_ids", "token_ids", "logprobs"}, and, if known, "trainer_logprobs" of the
               same tokens and "temperature", "top_k", "top_p", "min_p"
    prime-rl   a token export (`trainer.enable_token_export`), token_exports/step_N/rank_R.jsonl:
               {"token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs"} of prompt and
               completion together
    slime      the fields {"tokens", "response_length", "rollout_log_probs"} of its Sample, and its
               "loss_mask": a token where that is 0 was not sampled, as a tool's
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from dcmdp_jax import files

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
ROUND_OFF = 1e-6  # nats that a log-prob of 0 may lie above it
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
CONVERT = (
    "it is a pickle, which can run code as it is read; write JSON lines where it was made: for "
    'slime, for s in torch.load(FILE, weights_only=False)["samples"]: print(json.dumps({k: s[k] '
    'for k in ("tokens", "response_length", "rollout_log_probs", "loss_mask")}))'
)
WANTED = (
    "record {prompt_ids, token_ids, logprobs} of each completion as JSON lines, see docs/doctor.md"
)


class Record(NamedTuple):
    """One completion."""

    prompt: list[int]
    tokens: list[int]
    logp: list[float]  # what the engine reported for each token; NaN where it reported nothing
    trainer_logp: list[float] | None  # of the program that wrote the file


class Records(NamedTuple):
    """The completions of a file."""

    records: list[Record]
    sampling: dict[str, float]  # the fields of `records.Sampling` that the file states
    more: bool  # whether the file goes on after the last one read


def read(path: pathlib.Path, limit: int, vocab_size: int, max_position: int) -> Records:
    """Returns the first `limit` completions of a file; the rest of it is not read.

    Completions without a token are left out. Numbers are log-probs, at most 0, unless all of a file
    are positive, as probabilities are.

    Raises ValueError, with the line and the field, on what is no such record of this model.
    """
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is not read: {CONVERT}")
    if not path.is_file():
        is_folder = path.is_dir()
        what = "is a folder; name a file in it" if is_folder else "does not exist; name another"
        raise ValueError(f"file of recorded completions {path} {what}")
    rows = files.rows(path)
    return parse(rows, limit, vocab_size, max_position, str(path))


def parse(
    rows: Iterable[tuple[str, Any]], limit: int, vocab_size: int, max_position: int, source: str
) -> Records:
    """Returns the first `limit` of the rows of `source`, given with their places; see `read`."""
    found: list[Record] = []
    sampling: dict[str, float] = {}
    positive = ""
    negative = False
    first = ""
    more = False
    for place, row in rows:
        if len(found) == limit:
            more = True
            break
        record = _record(row, place)
        _check_ids(record, place, vocab_size, max_position)
        stated = {name: _setting(row, name, place) for name in SAMPLING if name in row}
        if found and stated != sampling:
            raise ValueError(
                f"{place} was sampled with {stated or 'no stated settings'}, and {first} with "
                f"{sampling or 'no stated settings'}; give a file for each"
            )
        if not record.tokens:
            continue
        sampling = stated
        first = first or place
        found.append(record)
        highest = max((x for x in record.logp if not math.isnan(x)), default=0.0)
        if highest > ROUND_OFF and not positive:
            positive = f"{place} has a log-prob of {highest:.6g}"
        negative = negative or any(x < 0 for x in record.logp)
    if not found:
        raise ValueError(f"{source} holds no completion; {WANTED}")
    if positive and negative:
        raise ValueError(
            f"{positive}, above 0, and others are below; log-probs are at most 0: correct what "
            "wrote it, or the engine reports logits (vLLM: set --logprobs-mode processed_logprobs, "
            "not processed_logits or raw_logits)"
        )
    return Records(found, sampling, more)


def _record(row: Any, place: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {files.describe(row)}, not an object; {WANTED}")
    if "rollout_log_probs" in row:
        return _slime(row, place)
    if "inference_logprobs" in row:
        return _prime_rl(row, place)
    if "logprobs" not in row and "token_ids" not in row:
        texts = {"input", "output"} <= row.keys() or {"prompt", "completion"} <= row.keys()
        said = (
            "holds texts without token ids and log-probs, as the dumps of verl and TRL do"
            if texts
            else f"has the fields {', '.join(sorted(map(str, row)))[:80] or '(none)'}"
        )
        raise ValueError(f"{place} {said}; {WANTED}")
    tokens = _ids(row, "token_ids", place)
    trainer = _numbers(row, "trainer_logprobs", place) if row.get("trainer_logprobs") else None
    record = Record(
        _ids(row, "prompt_ids", place), tokens, _numbers(row, "logprobs", place), trainer
    )
    _check_length(record.logp, "logprobs", tokens, "token_ids", place)
    if trainer:
        _check_length(trainer, "trainer_logprobs", tokens, "token_ids", place)
    return record


def _prime_rl(row: dict, place: str) -> Record:
    """Token i of the sequence has entry i of every list; tokens that are not trained count as
    prompt before the first that is, and as not reported after it.
    """
    ids = _ids(row, "token_ids", place)
    mask = _list(row, "loss_mask", place)
    reported = _numbers(row, "inference_logprobs", place)
    trainer = _numbers(row, "trainer_logprobs", place)
    for name, values in (
        ("loss_mask", mask),
        ("inference_logprobs", reported),
        ("trainer_logprobs", trainer),
    ):
        _check_length(values, name, ids, "token_ids", place)
    start = next((i for i, trained in enumerate(mask) if trained), len(ids))
    return Record(ids[:start], ids[start:], _where(mask[start:], reported[start:]), trainer[start:])


def _slime(row: dict, place: str) -> Record:
    """`tokens` are those of prompt and response, `rollout_log_probs` those of the response."""
    ids = _ids(row, "tokens", place)
    reported = _numbers(row, "rollout_log_probs", place)
    length = row.get("response_length")
    if type(length) is not int or not 0 <= length <= len(ids):
        raise ValueError(
            f"{place} has response_length {length!r:.40} for {len(ids)} tokens; it must be an "
            "integer and at most their number"
        )
    start = len(ids) - length
    _check_length(reported, "rollout_log_probs", ids[start:], "response tokens", place)
    if row.get("loss_mask") is not None:
        mask = _list(row, "loss_mask", place)
        _check_length(mask, "loss_mask", ids[start:], "response tokens", place)
        reported = _where(mask, reported)
    return Record(ids[:start], ids[start:], reported, None)


def _where(mask: list, values: list[float]) -> list[float]:
    return [value if kept else math.nan for kept, value in zip(mask, values, strict=True)]


def _list(row: dict, name: str, place: str) -> list:
    value = row.get(name)
    if not isinstance(value, list):
        is_what = "is missing" if name not in row else f"is {files.describe(value)}, not a list"
        raise ValueError(f"{place}: {name} {is_what}; {WANTED}")
    return value


def _ids(row: dict, name: str, place: str) -> list[int]:
    values = _list(row, name, place)
    for i, value in enumerate(values):
        if type(value) is not int:
            raise ValueError(
                f"{place}: {name}[{i}] is {value!r:.40}, not a token id; write ids, not texts"
            )
    return values


def _numbers(row: dict, name: str, place: str) -> list[float]:
    """Returns numbers, NaN for null."""
    values = _list(row, name, place)
    for i, value in enumerate(values):
        if value is not None and type(value) not in (int, float):
            raise ValueError(
                f"{place}: {name}[{i}] is {files.describe(value)}, not a number; write the "
                "log-prob of the sampled token, or null where there is none"
            )
        if value is not None and (math.isnan(value) or value == math.inf):
            raise ValueError(
                f"{place}: {name}[{i}] is {value}; write null where the engine reported none, and "
                "look why it did not"
            )
    return [math.nan if value is None else float(value) for value in values]


def _check_length(values: list, name: str, others: list, other: str, place: str) -> None:
    if len(values) != len(others):
        raise ValueError(
            f"{place} has {len(values)} {name} for {len(others)} {other}; write one for each "
            "token, and null where there is none"
        )


def _check_ids(record: Record, place: str, vocab_size: int, max_position: int) -> None:
    if not record.prompt and record.tokens:
        raise ValueError(
            f"{place} has no prompt; a completion needs one token before it, such as BOS"
        )
    for token in (*record.prompt, *record.tokens):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{place} has token id {token}, outside the model's vocabulary of {vocab_size}; "
                "name the folder of the model that sampled"
            )
    length = len(record.prompt) + len(record.tokens)
    if length > max_position:
        raise ValueError(
            f"{place} has {length} tokens, more than the model's {max_position} positions; name "
            "the folder of the model that sampled"
        )


def _setting(row: dict, name: str, place: str) -> float:
    value = row[name]
    if not files.matches(value, files.NUMBER):
        raise ValueError(f"{place}: {name} is {value!r:.40}, not a finite number; correct it")
    if name == "top_k" and value == -1:  # "all" for vLLM, SGLang and TRL
        return 0.0
    return float(value)


def write(path: pathlib.Path, records: list[Record], sampling: dict[str, float]) -> None:
    """Writes completions as JSON lines of the own layout, which `read` returns again."""
    lines = [
        json.dumps(
            {
                "prompt_ids": record.prompt,
                "token_ids": record.tokens,
                "logprobs": [None if math.isnan(x) else x for x in record.logp],
                **sampling,
            }
        )
        for record in records
    ]
    files.write_atomic(path, "".join(line + "\n" for line in lines))
