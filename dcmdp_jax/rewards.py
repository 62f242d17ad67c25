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
from dcmdp_jax.verifier_pool import Call, Failure, VerifierPool

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
    if not is_computed(stated) and is_copied(stated, prompt_text(example.prompt), example.answer):
        return 0.0
    return float(judge.equal(example.answer, stated))


def prompt_text(prompt: Any) -> str:
    """Returns the text of a prompt.

    The prompt is a string, or chat messages whose content is a string or parts that may hold text.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict):
        return prompt_text(prompt.get("content", prompt.get("text")))
    return " ".join(map(prompt_text, prompt or ()))


def score(
    rollout: Rollout,
    decode: Callable[[Sequence[int]], str],
    verifier: Callable[..., float] | VerifierPool,
    should_stop: Callable[[], bool] = lambda: False,
) -> Scored:
    """Decodes each completion, without its stop token, and returns the rollout with the rewards.

    A verifier is called with the problem and the text. If it has a parameter `length`, that is the
    number of the completion's tokens, stop token included; if it has one named `stopped`, that is
    False where the length limit cut the completion off, and it judges what was written up to there.
    For a verifier without `stopped` such a completion has not stated an answer: its reward is what
    the verifier gives an empty text, which keeps the verifier's own scale.

    Raises ValueError, with the prompt and the verifier, if that fails or returns no finite number,
    and `Interrupted` if it does not return after `should_stop()` is true. In a pool a call that
    fails, or does not end in time, costs only its completion: it earns what an empty text earns; if
    that fails too, the lowest reward of its prompt's completions, or 0. It is then `failed`, and
    `raised` if the verifier raised; the first such call is printed.
    """
    examples = rollout.prompts.examples
    samples = len(rollout.tokens) // len(examples)
    wanted = _wanted_facts(verifier.verifier if isinstance(verifier, VerifierPool) else verifier)
    texts = [
        decode(ids[:length].tolist()) if stopped or "stopped" in wanted else ""
        for ids, length, stopped in zip(rollout.tokens, rollout.text_lengths, rollout.stopped)
    ]
    facts = [
        {name: value for name, value in zip(_FACTS, values) if name in wanted}
        for values in zip(rollout.stopped.tolist(), rollout.lengths.tolist())
    ]
    calls = [
        Call(examples[i // samples], text, fact) for i, (text, fact) in enumerate(zip(texts, facts))
    ]
    if isinstance(verifier, VerifierPool):
        return Scored(rollout, *_rewards_of_pool(verifier, calls, samples, should_stop))
    reward = np.zeros(len(texts), np.float32)
    with stopping.interruptible(
        should_stop, lambda i: _slow(verifier, examples[i // samples], i)
    ) as watched:
        for i, call in enumerate(calls):
            watched.begin(i)
            reward[i] = reward_of(verifier, *call)
    return Scored(rollout, reward)


def _rewards_of_pool(
    pool: VerifierPool, calls: Sequence[Call], samples: int, should_stop: Callable[[], bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rewards of all calls, `samples` to a prompt, which of them failed, and on which
    the verifier raised.
    """
    outcomes = pool.judge(calls, should_stop)
    failed = np.array([isinstance(outcome, Failure) for outcome in outcomes])
    raised = np.array([isinstance(outcome, Failure) and outcome.raised for outcome in outcomes])
    reward = np.array(
        [np.nan if isinstance(outcome, Failure) else outcome for outcome in outcomes], np.float32
    )
    if not failed.any():
        return reward, failed, raised
    places = np.flatnonzero(failed).tolist()
    _report_failures(pool, outcomes[places[0]], calls[places[0]], len(places), len(calls))
    nothing = [_without_text(calls[i]) for i in places]
    for i, outcome in zip(places, pool.judge(nothing, should_stop)):
        reward[i] = np.nan if isinstance(outcome, Failure) else outcome
    groups = reward.reshape(-1, samples)
    lowest = np.where(np.isnan(groups), np.inf, groups).min(axis=1, keepdims=True)
    groups = np.where(np.isnan(groups), np.where(np.isinf(lowest), 0, lowest), groups)
    return groups.reshape(-1).astype(np.float32), failed, raised


def _without_text(call: Call) -> Call:
    """Returns the call for a completion that has stated nothing."""
    facts = call.facts | {"stopped": False} if "stopped" in call.facts else call.facts
    return call._replace(text="", facts=facts)


def _report_failures(
    pool: VerifierPool, failure: Failure, call: Call, count: int, total: int
) -> None:
    """Prints how many calls failed, and why the first of them did."""
    reason = failure.reason
    if not failure.raised:
        reason = (
            f"the verifier {_name(pool.verifier)} {reason} on a completion of the prompt "
            f"{_short(call.example)}"
        )
    print(
        f"{count} of {total} completions earn what an empty text earns: {reason}",
        file=sys.stderr,
        flush=True,
    )


def _wanted_facts(verifier: Callable[..., float]) -> list[str]:
    """Returns which of `_FACTS` are parameters of a verifier that a partial has not set."""
    try:
        parameters = inspect.signature(verifier).parameters
    except (TypeError, ValueError):  # written in C
        return []
    options = verifier.keywords if isinstance(verifier, functools.partial) else {}
    return [name for name in _FACTS if name in parameters and name not in options]


def reward_of(
    verifier: Callable[..., float], example: Example, text: str, facts: dict[str, Any]
) -> np.float32:
    """Returns the verifier's reward of a text.

    Raises ValueError, with the prompt and the verifier, if it fails or returns no finite number.

    Args:
        facts: what it takes by name, see `score`.
    """
    try:
        returned = verifier(example, text, **facts)
    except Exception as error:
        raise ValueError(
            f"the verifier {_name(verifier)} fails on a completion of the prompt "
            f"{_short(example)}: {errors.describe(error)}; fix the verifier"
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
        f"{_short(example)}, for {stopping.SLOW_SECONDS:.0f} s; data.verifier_timeout limits that",
        file=sys.stderr,
        flush=True,
    )


def _name(verifier: Callable) -> str:
    """Returns a verifier's name, also of a partial."""
    function = getattr(verifier, "func", verifier)  # of a partial
    return getattr(function, "__qualname__", type(function).__qualname__)


def _short(example: Example) -> str:
    """Returns the first characters of a problem's prompt, quoted."""
    prompt = prompt_text(example.prompt)
    return repr(prompt if len(prompt) <= _SHORT else prompt[:_SHORT] + "...")
