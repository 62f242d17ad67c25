"""The text of an answer, without what only changes its looks, cut into tokens."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 1_000  # characters
LARGEST_EXPONENT = 300  # of a number as 1.5e10 writes it


class Unreadable(ValueError):
    """Not an answer of the forms known here."""


class Token(NamedTuple):
    kind: str  # num, word, text, cmd, or the character itself
    text: str
    start: int
    end: int


_LOOKS = tuple((re.compile(pattern), new) for pattern, new in (
    (r"\\\\", r"\\cr "),  # the end of a matrix's row
    (r"\{,\}", ","),
    (r"\$\s*,\s*\$", ", "),
    (r",\\!\s*", ","),  # thousands
    (r"\\[!,;:>]|\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?|q?quad)(?![A-Za-z])|~|\\ ", " "),
    (r"\\[()\[\]]|(?<!\\)\$", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|\\degree(?![A-Za-z])|°", r"\\text{degrees}"),
    (r"−|–", "-"), (r"π", r"\\pi "), (r"∞", r"\\infty "), (r"×|·|⋅|\*\*(?=\D)", "*"), (r"\*\*", "^"), (r"÷", "/"),
    (r"≤", r"\\le "), (r"≥", r"\\ge "), (r"∪", r"\\cup "), (r"∈", r"\\in "), (r"±", r"\\pm "), (r"[£€]", ""),
    (r"np\.(?=[a-z])", ""),
))
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|hbox|operatorname|boldsymbol|bf|rm)"
_TOKEN = re.compile(r"\s*(?:(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?)"
                    rf"|(?P<text>{_TEXT}\s*\{{[^{{}}]*\}})"
                    r"|(?P<cmd>\\(?:[A-Za-z]+|[{}%$|\\]))|(?P<word>[A-Za-z]+)|(?P<sign>.))", re.DOTALL | re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def plain(text: str) -> str:
    """The answer without white space and LaTeX that only changes the looks; a longer one than `LONGEST` as it stands."""
    if len(text) > LONGEST:
        return text
    text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r" \1 ", _looked(text)).strip()
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)  # a space between two digits parts two numbers


def split(text: str) -> tuple[str, list[Token]]:
    """The answer as it is read, and its tokens, which stand for places in it. Raises Unreadable where it is too long."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    text = _looked(text)
    others = re.sub(r",\s", "", _THOUSANDS.sub("", text))
    if "," not in others and not re.search(r"[(\[{]", text):
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    tokens = []
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup
        start, end = found.span(kind)
        tokens.append(Token(found[kind] if kind == "sign" else kind, found[kind], start, end))
    return text, tokens


def _looked(text: str) -> str:
    """The text without LaTeX that only changes its looks, and without the full stop."""
    for pattern, new in _LOOKS:
        text = pattern.sub(new, text)
    return text.strip().rstrip(". ")


def inside(token: str) -> str:
    """What `\\text{...}` holds; any other token as it is."""
    return token[token.index("{") + 1:-1].strip(" ~") if token.endswith("}") and "{" in token else token


def number(text: str) -> Fraction:
    digits, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > LARGEST_EXPONENT or len(digits) > 100:
        raise Unreadable("too large a number")
    return Fraction(digits.rstrip(".") if digits.endswith(".") else digits) * Fraction(10) ** int(exponent or 0)
