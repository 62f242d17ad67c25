"""Verifiers: a completion's text in, its reward out."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dcmdp_jax import errors, stopping
from dcmdp_jax.answers import compare, judge
from dcmdp_jax.answers.computed import is_computed, is_number
from dcmdp_jax.answers.copied import is_copied
from dcmdp_jax.answers.stated import final_answer
from dcmdp_jax.records import Example, Rollout, Scored

_SHORT = 60  # characters of a prompt in a message
_FACTS = ("stopped", "length")  # of a completion, which a verifier may take by name

_CHOICE = re.compile(r"(?:\\text\w*\s*\{)?\(?[A-J]\)?\}?")
# a choice with its text, as in (B) 12
_CHOSEN = re.compile(
    r"(?:\\(?:text|math)\w*\s*\{)?\s*(?:\(([A-J])\)|([A-J])(?:[).:]|(?=\}|\\q?quad)))"
    r"(?!.*(?:\b(?:and|or)\b|\b[A-J]\)))[\s}~.:]*[\w$\\(]"
)


def math_answer(example: Example, text: str) -> float:
    """Returns 1.0 if the answer that `text` states is judged equal to `example.answer`, else 0.0.

    Training and evaluation both use it. An expression with something left to compute, `2 + 2` or
    `(x + 1)(x - 1)`, earns nothing if the right answer is a number, or if it is copied from the
    problem and is not how the right answer is written. Numbers are compared by our reader alone,
    the rest by `answers.judge`.
    """
    stated = final_answer(text)
    if not stated:
        return 0.0
    if is_number(example.answer):
        return float(is_computed(stated) and compare.equal(example.answer, stated))
    if _CHOICE.fullmatch(example.answer) and (chosen := _CHOSEN.match(stated)):
        stated = chosen[1] or chosen[2]
    if not is_computed(stated) and is_copied(stated, _words(example.prompt), example.answer):
        return 0.0
    return float(judge.equal(example.answer, stated))


def _words(prompt: Any) -> str:
    """Returns the text of a prompt.

    The prompt is a string, or chat messages whose content is a string or parts that may hold text.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict):
        return _words(prompt.get("content", prompt.get("text")))
    return " ".join(map(_words, prompt or ()))


def score(
    rollout: Rollout,
    decode: Callable[[Sequence[int]], str],
    verifier: Callable[..., float],
    should_stop: Callable[[], bool] = lambda: False,
) -> Scored:
    """Decodes each completion, without its stop token, and returns the rollout with the rewards.

    A verifier is called with the problem and the text. If it has a parameter `length`, that is the
    number of the completion's tokens, stop token included; if it has one named `stopped`, that is
    False where the length limit cut the completion off, and it judges what was written up to there.
    For a verifier without `stopped` such a completion has not stated an answer: its reward is what
    the verifier gives an empty text, which keeps the verifier's own scale.

    Raises ValueError, with the prompt and the verifier, if that fails or returns no finite number,
    and `Interrupted` if it does not return after `should_stop()` is true.
    """
    examples = rollout.prompts.examples
    samples = len(rollout.tokens) // len(examples)
    wanted = _wanted_facts(verifier)
    texts = [
        decode(ids[:length].tolist()) if stopped or "stopped" in wanted else ""
        for ids, length, stopped in zip(rollout.tokens, rollout.text_lengths, rollout.stopped)
    ]
    facts = [
        {name: value for name, value in zip(_FACTS, values) if name in wanted}
        for values in zip(rollout.stopped.tolist(), rollout.lengths.tolist())
    ]
    reward = np.zeros(len(texts), np.float32)
    with stopping.interruptible(
        should_stop, lambda i: _slow(verifier, examples[i // samples], i)
    ) as calls:
        for i, text in enumerate(texts):
            calls.begin(i)
            reward[i] = _reward(verifier, examples[i // samples], text, facts[i])
    return Scored(rollout, reward)


def _wanted_facts(verifier: Callable[..., float]) -> list[str]:
    """Returns which of `_FACTS` are parameters of a verifier that a partial has not set."""
    try:
        parameters = inspect.signature(verifier).parameters
    except (TypeError, ValueError):  # written in C
        return []
    options = verifier.keywords if isinstance(verifier, functools.partial) else {}
    return [name for name in _FACTS if name in parameters and name not in options]


def _reward(
    verifier: Callable[..., float], example: Example, text: str, facts: dict[str, Any]
) -> np.float32:
    """Returns the verifier's reward of a text. Raises ValueError if there is none."""
    try:
        returned = verifier(example, text, **facts)
    except Exception as error:
        raise ValueError(
            f"the verifier {_name(verifier)} fails on a completion of the prompt "
            f"{_short(example)}: {errors.describe(error)}"
        ) from error
    try:
        with np.errstate(over="ignore"):
            reward = np.float32(returned)
    except (TypeError, ValueError):
        reward = np.float32("nan")
    if np.ndim(reward) or not np.isfinite(reward):
        raise ValueError(
            f"the verifier {_name(verifier)} gives {returned!r:.80} for a completion of "
            f"the prompt {_short(example)}; a reward must be one finite number"
        )
    return reward


def _slow(verifier: Callable[..., float], example: Example, number: int) -> None:
    """Prints that the verifier has been at a completion for a long time."""
    print(
        f"the verifier {_name(verifier)} has been at completion {number}, of the prompt "
        f"{_short(example)}, for {stopping.SLOW_SECONDS:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _name(verifier: Callable) -> str:
    """Returns a verifier's name, also of a partial."""
    function = getattr(verifier, "func", verifier)  # of a partial
    return getattr(function, "__qualname__", type(function).__qualname__)


def _short(example: Example) -> str:
    """Returns the first characters of a problem's prompt, quoted."""
    prompt = _words(example.prompt)
    return repr(prompt if len(prompt) <= _SHORT else prompt[:_SHORT] + "...")
