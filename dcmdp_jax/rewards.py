"""Verifiers: text in, reward out. Answers are parsed and compared, never evaluated, at a cost bounded in advance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from dcmdp_jax.records import Example, Rollout, Scored

TAIL = 20_000  # characters at the end of a completion in which its answer is looked for
LONGEST_ANSWER = 1_000  # characters; a longer one is compared as it stands
LONGEST_NUMBER = 100  # characters; a longer one is compared as text
LARGEST_EXPONENT = 300

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_STATED = (re.compile(r"####[ \t]*(\S.*)"), re.compile(r"^Answer:[ \t]*(\S.*)", re.MULTILINE))

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{?([+-]?\d{1,4})\}?"
_DECIMAL = re.compile(rf"({_PLAIN})(?:e([+-]?\d{{1,4}})|{_POWER})?", re.IGNORECASE | re.ASCII)
_RATIO = re.compile(rf"()({_PLAIN})\s*/\s*({_PLAIN})", re.ASCII)
_MIXED = re.compile(rf"(\d*)\s*\\frac\s*\{{\s*({_PLAIN})\s*\}}\s*\{{\s*({_PLAIN})\s*\}}", re.ASCII)

_REWRITES = tuple((re.compile(pattern), new) for pattern, new in (
    (r"\\[!,]", ""),  # spacing commands
    (r"\\[;: ]|~", " "),
    (r"\{,\}", ","),
    (r"\\?[$%]|[£€°]|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", ""),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"−", "-"),
))
_VARIABLE = re.compile(r"^\s*[A-Za-z]\s*=")
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WRAPPED_UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?\s*$")
_UNIT = re.compile(r"[A-Za-z]{2,}(?:/[A-Za-z]+)?\.?(?:\^\{?\d\}?)?")
_NOT_A_UNIT = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)s?|hal(?:f|ves)|squared|cubed|pi"
                         r"|or|and|more|less", re.IGNORECASE)


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


def normalize(answer: str) -> str:
    r"""One spelling for equal answers.

    Integers, decimals, `a/b`, `\frac{a}{b}`, mixed numbers and `1.5 \times 10^{3}` become an exact fraction in lowest
    terms ("1,200.0" -> "1200", "0.5" -> "1/2"), after dollar, percent and degree signs, thousands separators, a leading
    `x =` and a trailing unit are taken off. In a list, tuple or interval each element is so treated. Anything else
    loses white space and LaTeX that only changes the looks. Nothing is computed: `2^{10}` stays as it is.
    """
    if len(answer) > LONGEST_ANSWER:
        return answer
    text = answer
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _VARIABLE.sub("", " ".join(text.split()).rstrip(".")).strip()
    value = _number(_without_unit(text))
    if value is not None:
        return str(value)
    text = _WRAPPED.sub(r"\1", text)
    return "".join(map(_element, re.split(r"([()\[\],])", text)))


def math_answer(example: Example, text: str) -> float:
    """1.0 where the answer that `text` states is `example.answer` (see `final_answer` and `normalize`), else 0.0.

    The comparison is exact: 0.33 is not 1/3, and 50% is 50.
    """
    stated = final_answer(text)
    found = "" if stated is None else normalize(stated)
    return float(found != "" and found == normalize(example.answer))


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


def _number(text: str) -> Fraction | None:
    """The exact value of a number as people write it; None for anything else."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    sign = -1 if text.startswith("-") else 1
    text = text[1:].lstrip() if text[:1] in ("+", "-") else text
    parts = _DECIMAL.fullmatch(text)
    if parts:
        digits, *exponents = parts.groups()
        exponent = int(exponents[0] or exponents[1] or 0)
        return None if abs(exponent) > LARGEST_EXPONENT else sign * _plain(digits) * Fraction(10) ** exponent
    parts = _RATIO.fullmatch(text) or _MIXED.fullmatch(text)
    if not parts or not _plain(parts[3]):
        return None
    return sign * (int(parts[1] or 0) + _plain(parts[2]) / _plain(parts[3]))


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix("."))


def _without_unit(text: str) -> str:
    """A number without the unit that follows it; anything else unchanged. A lone letter is a variable unless it is set
    upright, and words such as `million` change the value."""
    head = text
    while True:
        unit = _WRAPPED_UNIT.search(head)
        words = unit[1] if unit else head.rpartition(" ")[2]
        if any(_NOT_A_UNIT.fullmatch(word) for word in words.split()) or not (unit or _UNIT.fullmatch(words)):
            break
        head = (head[:unit.start()] if unit else head[:-len(words)]).rstrip(" /")
    return head if _number(head) is not None else text


def _element(piece: str) -> str:
    value = _number(piece)
    # a space between two digits parts two numbers
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", piece) if value is None else str(value)
