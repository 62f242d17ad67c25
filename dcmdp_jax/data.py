"""Problems from files and generated tasks, as batches of tokens."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dcmdp_jax import files, seeds
from dcmdp_jax.records import Columns, Example, Prompts
from dcmdp_jax.rewards import final_answer
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tasks import Task
from dcmdp_jax.tokens.tokenizer import Tokenizer

_LAYOUTS = (
    "GSM8K {question, answer with ####}",
    "evaluation set {problem | question | prompt, answer | final_answer | solution with \\boxed{}}",
    "verl {prompt, reward_model.ground_truth}",
)
_MISSING = ("", "nan", "NaN", "null", "None")  # texts that a missing value leaves
_ENDLESS = 2**62  # problems in a pipeline, more than any run reads

log = logging.getLogger(__name__)


class SupervisedBatch(NamedTuple):
    """Prompts, each followed by the expert's completion, for the warm-up."""

    tokens: np.ndarray  # [B, S] int32, padded on the right
    mask: np.ndarray  # [B, S] bool, True on completion tokens, stop token included


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How the ids of a prompt are made from a problem."""

    chat: bool = False  # wrapped in the tokenizer's chat template
    enable_thinking: bool = False  # passed to the chat template
    # follows each user message, or the plain prompt, on a line of its own
    instruction: str = ""
    # special tokens written in a message are ids, not text; in a plain prompt they always are
    special_tokens_in_text: bool = False


def read(path: str | pathlib.Path) -> list[Example]:
    """Returns the problems of a `.jsonl` or `.parquet` file, in file order.

    Three layouts are read: GSM8K's (the answer follows `####`), that of evaluation sets (`problem`,
    `question` or `prompt`, with `answer`, `final_answer` or a `solution` that ends in `\\boxed{}`),
    and verl's, which DAPO-Math-17k has (chat messages under `prompt`, `reward_model.ground_truth`,
    `data_source`). A row's other columns are in `Example.columns`. A problem that repeats another's
    prompt, answer and source is left out, and the log counts them. Raises ValueError on a missing
    or empty file, bad JSON, and rows of another layout.
    """
    path = pathlib.Path(path)
    seen: dict[str, Example] = {}
    total = 0
    for location, row in rows(path):
        example = _example(row, path.stem, location)
        seen.setdefault(_key(example), example)
        total += 1
    if not total:
        raise ValueError(f"data file {path} is empty")
    if len(seen) < total:
        log.warning(
            "%s: %d of %d problems repeat another and are left out", path, total - len(seen), total
        )
    return list(seen.values())


def rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each row of a `.jsonl` or `.parquet` file.

    Raises ValueError on a missing file, one of another kind, and a row that cannot be read.
    """
    if not path.is_file():
        raise ValueError(
            f"data file {path} does not exist; give the path of a .jsonl or .parquet file"
        )
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"data file {path} is neither .jsonl nor .parquet")
    yield from files.rows(path)


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat = PromptFormat(),
    *,
    max_prompt_tokens: int = 0,
) -> Prompts:
    """Returns one batch of prompts, padded on the right to `max_prompt_tokens`, or the longest (0).

    Raises ValueError on a prompt longer than `max_prompt_tokens`: prompts are never truncated.
    """
    ids = [encode(example, tokenizer, prompt_format) for example in examples]
    lengths = np.array([len(row) for row in ids], np.int32)
    max_prompt_tokens = max_prompt_tokens or int(lengths.max())
    if lengths.max() > max_prompt_tokens:
        raise ValueError(
            f"a prompt has {lengths.max()} tokens, more than "
            f"data.max_prompt_tokens={max_prompt_tokens}"
        )
    return Prompts(pad(ids, max_prompt_tokens, tokenizer.pad_id), lengths, tuple(examples))


def prompt_batches(
    source: Sequence[Example] | Task,
    tokenizer: Tokenizer,
    prompt_format: PromptFormat = PromptFormat(),
    *,
    batch_size: int,
    max_prompt_tokens: int,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Prompts]:
    """Returns an endless iterator over batches of prompts.

    A list of problems is shuffled anew in each epoch; a generated task gives new problems forever.
    `batch_size` counts the prompts of all processes; each process gets its contiguous share of
    every batch, so that the order of problems does not depend on the number of processes. Problems
    longer than `max_prompt_tokens` are left out, and the log counts them. The iterator's
    `get_state()` is a small dict for JSON, and `set_state(state)` continues exactly there. Raises
    ValueError if `batch_size` does not divide by the number of processes, or no problem is short
    enough.
    """
    if batch_size % process_count:
        raise ValueError(
            f"data.prompts_per_step={batch_size} does not divide over {process_count} processes"
        )
    if isinstance(source, Sequence):
        problems = _fitting(source, tokenizer, prompt_format, max_prompt_tokens)
        order = grain.MapDataset.range(len(problems)).seed(seed)
        order = (order.shuffle() if shuffle else order).repeat(_ENDLESS // len(problems))
        problem = problems.__getitem__
    else:
        order = grain.MapDataset.range(_ENDLESS)
        problem = functools.partial(source.example, seed=seed)
    local = batch_size // process_count

    def load(indices: np.ndarray) -> Prompts:
        own = indices[process_index * local : (process_index + 1) * local].tolist()
        examples = [problem(i) for i in own]
        return tokenize(examples, tokenizer, prompt_format, max_prompt_tokens=max_prompt_tokens)

    batches = order.batch(batch_size).map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def supervised_batch(
    task: Task, tokenizer: Tokenizer, batch_size: int, seed: int, step: int
) -> SupervisedBatch:
    """Returns batch number `step` of the expert's solutions, each ended by the stop token.

    S is the longest row of the batch. Equal arguments give equal batches.

    Args:
        seed: `Config.seed`; problems and solutions are drawn from streams of their own.
    """
    rng = np.random.default_rng(seeds.seed(seed, Stream.WARMUP_SOLUTIONS, step))
    problem_seed = seeds.seed(seed, Stream.WARMUP_PROBLEMS, step)
    examples = [task.example(i, problem_seed) for i in range(batch_size)]
    prompts = [tokenizer.encode_prompt(example.prompt) for example in examples]
    solutions = [
        tokenizer.encode(task.solution(example, rng)) + [tokenizer.eos_ids[0]]
        for example in examples
    ]
    starts = np.array([len(ids) for ids in prompts])[:, None]
    stops = starts + np.array([len(ids) for ids in solutions])[:, None]
    column = np.arange(stops.max())
    tokens = pad(
        [prompt + solution for prompt, solution in zip(prompts, solutions)],
        stops.max(),
        tokenizer.pad_id,
    )
    return SupervisedBatch(tokens, (column >= starts) & (column < stops))


def pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Returns rows of ids as an array [B, width], padded on the right."""
    padded = np.full((len(rows), width), pad_id, np.int32)
    for line, row in zip(padded, rows):
        line[: len(row)] = row
    return padded


def encode(example: Example, tokenizer: Tokenizer, prompt_format: PromptFormat) -> list[int]:
    """Returns the ids of one prompt."""
    if not prompt_format.chat:
        if not isinstance(example.prompt, str):
            raise ValueError(
                f"the prompts of {example.source!r} are chat messages; set data.chat=True"
            )
        return tokenizer.encode_prompt(example.prompt + _tail(prompt_format))
    return tokenizer.encode_chat(
        chat_messages(example.prompt, prompt_format),
        enable_thinking=prompt_format.enable_thinking,
        special_tokens_in_text=prompt_format.special_tokens_in_text,
    )


def chat_messages(prompt: str | list[dict], prompt_format: PromptFormat) -> list[dict]:
    """Returns a prompt as chat messages, those of the user with the instruction."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tail = _tail(prompt_format)
    return [{**m, "content": m["content"] + tail} if m["role"] == "user" else m for m in messages]


def _tail(prompt_format: PromptFormat) -> str:
    """Returns what follows a plain prompt or a user's message."""
    return f"\n{prompt_format.instruction}" if prompt_format.instruction else ""


def _fitting(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    max_prompt_tokens: int,
) -> list[Example]:
    """Returns the problems of at most `max_prompt_tokens` tokens; the log counts the others."""
    fitting = [
        example
        for example in examples
        if len(encode(example, tokenizer, prompt_format)) <= max_prompt_tokens
    ]
    if not fitting:
        raise ValueError(
            f"none of {len(examples)} problems fits in data.max_prompt_tokens={max_prompt_tokens}; "
            "raise it"
        )
    if len(fitting) < len(examples):
        log.warning(
            "%d of %d problems are longer than data.max_prompt_tokens=%d and are left out",
            len(examples) - len(fitting),
            len(examples),
            max_prompt_tokens,
        )
    return fitting


def _example(row: Any, source: str, location: str) -> Example:
    """Returns a row of any of the layouts as an Example; `location` names it in messages."""
    if not isinstance(row, dict):
        raise ValueError(f"{location} is not a JSON object but {files.describe(row)}")
    prompt_column = next(
        (name for name in ("problem", "question", "prompt") if row.get(name)), None
    )
    answer_column = None
    if isinstance(row.get("reward_model"), dict):
        answer = row["reward_model"].get("ground_truth")
        if isinstance(row.get("data_source"), str):
            source = row["data_source"] or source
    else:
        answer_column = next(
            (name for name in ("answer", "final_answer") if row.get(name) is not None), None
        )
        answer = row.get(answer_column)
        if answer is None and isinstance(row.get("solution"), str):
            answer = final_answer(row["solution"])
    if isinstance(answer, str) and "####" in answer:
        answer = final_answer(answer)
    others = {
        name: value for name, value in row.items() if name not in (prompt_column, answer_column)
    }
    try:
        example = Example(
            read_prompt(row.get(prompt_column)), _answer(answer), source, Columns(others)
        )
        _key(example).encode()
    except UnicodeEncodeError:  # no tokenizer and no log could write it
        raise ValueError(
            f"{location} holds half a surrogate pair, which is no text; fix it or leave it out"
        ) from None
    except (TypeError, RecursionError) as error:
        raise ValueError(
            f"{location} holds what JSON cannot ({error}); fix it or leave it out"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{location} {error}; it has the fields {sorted(row)}; known layouts: "
            f"{'; '.join(_LAYOUTS)}"
        ) from None
    return example


def _key(example: Example) -> str:
    """Returns prompt, answer and source as one text."""
    return json.dumps((example.prompt, example.answer, example.source), ensure_ascii=False)


def read_prompt(prompt: Any) -> str | list[dict]:
    """Returns a prompt as a text, or as chat messages whose contents are texts.

    Raises ValueError on anything else.
    """
    if isinstance(prompt, str) and prompt.strip():
        if _holds_messages(prompt):
            raise ValueError("gives its messages in a string; write them as a list")
        return prompt
    if not isinstance(prompt, list):
        raise ValueError("gives no problem")
    messages = [_message(message, number) for number, message in enumerate(prompt, start=1)]
    if not any(message["content"].strip() for message in messages):
        raise ValueError("gives no problem")
    return messages


def _message(message: Any, number: int) -> dict:
    """Returns a chat message whose content is one text.

    Text parts are joined; null beside tool calls becomes the empty text. Raises ValueError on
    content of another kind. `number` counts messages from 1.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"gives no problem: message {number} has no role and content")
    role = message["role"]
    content = message["content"]
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"gives no problem: the role of message {number} is {files.describe(role)}"
        )
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"gives no problem: the content of message {number} is {files.describe(content)}"
        )
    if role == "user" and _holds_messages(content):
        raise ValueError("gives its parts in a string; write them as a list")
    return {**message, "content": content}


def _part(part: Any, number: int) -> str:
    """Returns the text of one part of a message's content. Raises ValueError on other parts."""
    if (
        not isinstance(part, dict)
        or part.get("type") != "text"
        or not isinstance(part.get("text"), str)
    ):
        kind = part.get("type") if isinstance(part, dict) else files.describe(part)
        raise ValueError(f"gives no problem: message {number} has a part that is not text ({kind})")
    return part["text"]


def _answer(answer: Any) -> str:
    """Returns a right answer as the text that completions are compared with.

    Raises ValueError on what no answer can equal.
    """
    if isinstance(answer, list) and answer and not any(isinstance(item, list) for item in answer):
        return ", ".join(_answer(item) for item in answer)
    if isinstance(answer, str) and answer.strip() not in _MISSING:
        if _is_structure(answer.strip()):
            raise ValueError(
                f"gives an answer that is JSON in a string, {answer.strip()[:60]!r}; write the "
                "answer itself"
            )
        return answer.strip()
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else str(answer)
    if type(answer) is int:
        return str(answer)
    if answer is None or answer == []:
        raise ValueError("gives no answer")
    if isinstance(answer, (str, float)):
        raise ValueError(f"gives no answer: it says {str(answer).strip()!r}")
    raise ValueError(f"gives no answer: what stands there is {files.describe(answer)}")


def _is_structure(text: str) -> bool:
    """True if a text is a JSON object, or a JSON list other than of several numbers.

    A list of numbers, [0, 1], may be an interval.
    """
    if text.startswith(("['", "{'")):  # as Python prints a list or a dict
        return True
    value = _json_in(text)
    if isinstance(value, list):
        return len(value) < 2 or any(isinstance(item, (str, dict, list, bool)) for item in value)
    return isinstance(value, dict)


def _holds_messages(text: str) -> bool:
    """True if the entire text is a chat message, a part of one, or a list of them.

    It may be written in JSON, or as Python or NumPy prints it.
    """
    printed = re.sub(r"^array\(|,\s+dtype=object\)$", "", text.strip())
    if printed.startswith(("{'", "[{'")) and printed.endswith(("}", "}]")):
        return "'role':" in printed or "'type':" in printed
    value = _json_in(text)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not {"role", "type"}.isdisjoint(first)


def _json_in(text: str) -> Any:
    """Returns the JSON list or object that the entire text is, or None."""
    if text.strip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # an ordinary text
        return None
