"""Whether an answer is copied from the problem."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.read import read
from dcmdp_jax.answers.tokens import plain
from dcmdp_jax.answers.work import Unreadable, Work

PROBLEMS = 256  # whose expressions are remembered

_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORDS = re.compile(
    r"(?<![^\s(])(?:[A-Za-z]{3,}|(?i:as|at|be|by|do|if|in|is|it|of|on|or|so|to|we))"
    r"(?![A-Za-z^_])|[,;:?!]|\.(?!\d)"
)
_NOTHING = {"add": ("num", Fraction(0)), "mul": ("num", Fraction(1))}


def is_copied(answer: str, problem: str, gold: str) -> bool:
    """True if an answer is an expression of the problem, and not the gold as it is written: in
    another order, with a name or a unit, or with other marks, it is the same expression."""
    if plain(answer) == plain(gold):
        return False
    try:
        found = _value(read(answer, Work()))
    except Unreadable:
        return plain(answer).rpartition("=")[2] in "".join(map(plain, _pieces(problem)))
    try:
        if found == _value(read(gold, Work())):
            return False
    except Unreadable:
        pass
    return found in _expressions(problem)


@functools.lru_cache(PROBLEMS)
def _expressions(problem: str) -> frozenset[Node]:
    """All expressions in the formulas of a problem, and in what stands between its words."""
    found: set[Node] = set()
    work = Work()
    for piece in _pieces(problem):
        try:
            _collect(_ordered(read(piece, work)), found)
        except Unreadable:
            continue
    return frozenset(found)


def _pieces(problem: str) -> list[str]:
    formulas = ["".join(filter(None, groups)) for groups in _FORMULA.findall(problem)]
    between = _WORDS.split(_FORMULA.sub(" ; ", problem))
    return [piece.strip() for piece in (*formulas, *between) if piece.strip()]


def _collect(node: Node, found: set[Node]) -> None:
    found.add(node)
    for part in node[1:]:
        if type(part) is tuple and part and isinstance(part[0], str):
            _collect(part, found)


def _value(node: Node) -> Node:
    """An answer without its name and its unit, in one order of summands and factors."""
    if node[:2] == ("rel", "="):
        return _value(node[3])
    if node[0] in ("quantity", "percent"):
        return _value(node[1])
    return _ordered(node)


def _ordered(node: Node) -> Node:
    kind, *parts = node
    parts = [
        _ordered(part) if type(part) is tuple and part and isinstance(part[0], str) else part
        for part in parts
    ]
    if kind == "div" and parts[1] == _NOTHING["mul"]:
        return parts[0]
    if kind in _NOTHING:
        parts = sorted((part for part in parts if part != _NOTHING[kind]), key=repr)
        if len(parts) == 1:
            return parts[0]
    return kind, *parts
