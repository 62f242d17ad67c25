"""Verifiers: text in, reward out. Answers are read and compared by `answers`, at a cost bounded in advance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from dcmdp_jax.answers import compare
from dcmdp_jax.records import Example, Rollout, Scored

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
    if not compare.is_computed(stated) and (compare.is_computed(example.answer) or _copied(stated, example)):
        return 0.0
    return float(compare.equal(example.answer, stated))


def _copied(stated: str, example: Example) -> bool:
    problem = example.prompt if isinstance(example.prompt, str) else " ".join(m["content"] for m in example.prompt)
    return _bare(stated) in _bare(problem) and _bare(stated) != _bare(example.answer)


def _bare(text: str) -> str:
    """Without white space, the LaTeX that only changes the looks, and a full stop at the end."""
    return re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[\s$]", "", text.replace("dfrac", "frac")).rstrip(".")


def score(rollout: Rollout, decode: Callable[[Sequence[int]], str],
          verifier: Callable[[Example, str], float]) -> Scored:
    """Decodes each completion, stop token left out, and asks the verifier for its reward.

    A completion that the length limit cut off earns 0 unasked: it has not answered. Raises ValueError on a reward that
    is not finite.
    """
    examples = rollout.prompts.examples
    samples = len(rollout.tokens) // len(examples)
    text = tuple(decode(ids[:length].tolist()) for ids, length in zip(rollout.tokens, rollout.text_lengths))
    reward = np.array([verifier(examples[i // samples], text[i]) if stop else 0.0
                       for i, stop in enumerate(rollout.stopped)], np.float32)
    if not np.isfinite(reward).all():
        where = int(np.argmin(np.isfinite(reward)))
        raise ValueError(f"the verifier gave {reward[where]} for completion {where}; a reward must be a finite number")
    return Scored(rollout, reward, text)


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
