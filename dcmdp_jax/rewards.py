"""Verifiers: text in, reward out. Answers are read and compared by `answers`, at a cost bounded in advance."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from dcmdp_jax import faults, stopping
from dcmdp_jax.answers import compare
from dcmdp_jax.records import Example, Rollout, Scored

SHORT = 60  # characters of a prompt in a message
TAIL = 20_000  # characters at the end of a completion in which its answer is looked for

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_STATED = (re.compile(r"####[ \t]*(\S.*)"), re.compile(r"^Answer:[ \t]*(\S.*)", re.MULTILINE))


def final_answer(text: str) -> str | None:
    r"""The answer that a completion states: its last balanced `\boxed{...}`, else what follows the last `####` on its
    line, else what follows `Answer:` on the last such line; None without any. Only the last 20,000 characters are
    read."""
    text = text[-TAIL:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for pattern in _STATED:
        stated = pattern.findall(text)
        if stated:
            return stated[-1].strip()
    return None


def math_answer(example: Example, text: str) -> float:
    """1.0 where the answer that `text` states equals `example.answer` (see `final_answer` and `answers.compare`), else 0.0.

    Where a number is asked for, a number must be stated: `2 + 2` or `2^{10}`, copied from the problem, earns nothing. Nor does
    any other expression that stands in the problem, unless it is written as the answer is.
    """
    stated = final_answer(text)
    if stated is None:
        return 0.0
    if not compare.is_number(stated) and (compare.is_number(example.answer) or _copied(stated, example)):
        return 0.0
    return float(compare.equal(example.answer, stated))


def _copied(stated: str, example: Example) -> bool:
    problem = example.prompt if isinstance(example.prompt, str) else " ".join(m["content"] for m in example.prompt)
    return _bare(stated) in _bare(problem) and _bare(stated) != _bare(example.answer)


def _bare(text: str) -> str:
    """Without white space, the LaTeX that only changes the looks, and a full stop at the end."""
    return re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[\s$]", "", text.replace("dfrac", "frac")).rstrip(".")


def score(rollout: Rollout, decode: Callable[[Sequence[int]], str], verifier: Callable[[Example, str], float],
          asked: Callable[[], bool] = lambda: False) -> Scored:
    """Decodes each completion, stop token left out, and asks the verifier for its reward.

    A completion that the length limit cut off has stated nothing: it earns what the verifier gives to an empty text, so that
    the verifier's own scale holds. Raises ValueError, with the prompt and the verifier, where that fails or gives no finite
    number, and `Interrupted` where it does not return after `asked()` says so.
    """
    examples = rollout.prompts.examples
    samples = len(rollout.tokens) // len(examples)
    text = tuple(decode(ids[:length].tolist()) for ids, length in zip(rollout.tokens, rollout.text_lengths))
    reward = np.zeros(len(text), np.float32)
    with stopping.watched(asked, lambda i: _slow(verifier, examples[i // samples], i)) as watch:
        for i, stopped in enumerate(rollout.stopped):
            watch.begin(i)
            reward[i] = _reward(verifier, examples[i // samples], text[i] if stopped else "")
    return Scored(rollout, reward, text)


def _reward(verifier: Callable[[Example, str], float], example: Example, text: str) -> np.float32:
    try:
        given = verifier(example, text)
    except Exception as error:
        raise ValueError(f"the verifier {_name(verifier)} fails on a completion of the prompt {_short(example)}: "
                         f"{faults.described(error)}") from error
    try:
        with np.errstate(over="ignore"):
            reward = np.float32(given)
    except (TypeError, ValueError):
        reward = np.float32("nan")
    if np.ndim(reward) or not np.isfinite(reward):
        raise ValueError(f"the verifier {_name(verifier)} gives {given!r:.80} for a completion of the prompt "
                         f"{_short(example)}; a reward must be one finite number")
    return reward


def _slow(verifier: Callable[[Example, str], float], example: Example, number: int) -> None:
    print(f"the verifier {_name(verifier)} has been at completion {number}, of the prompt {_short(example)}, for "
          f"{stopping.SLOW:.0f} s", file=sys.stderr, flush=True)


def _name(verifier: Callable) -> str:
    function = getattr(verifier, "func", verifier)  # of a partial
    return getattr(function, "__qualname__", type(function).__qualname__)


def _short(example: Example) -> str:
    prompt = example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
    return repr(prompt if len(prompt) <= SHORT else prompt[:SHORT] + "...")


def _last_boxed(text: str) -> str | None:
    r"""Inside of the `\boxed{...}` that opens last among those that close; escaped braces do not count."""
    opened: list[int] = []  # where each open brace's inside starts; negative unless it belongs to \boxed
    start, end = -1, -1
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.startswith("\\boxed") and token.endswith("{"):
            opened.append(match.end())
        elif token == "{":
            opened.append(-1)
        elif token == "}" and opened:
            inside = opened.pop()
            if inside > start:
                start, end = inside, match.start()
    return text[start:end] if start >= 0 else None
