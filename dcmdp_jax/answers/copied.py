"""Decides whether an answer is copied from the problem."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.read import read
from dcmdp_jax.answers.tokens import plain
from dcmdp_jax.answers.work import Unreadable, Work

CACHED_PROBLEMS = 256

_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORDS = re.compile(
    r"(?<![^\s(])(?:[A-Za-z]{3,}|(?i:as|at|be|by|do|if|in|is|it|of|on|or|so|to|we))"
    r"(?![A-Za-z^_])|[,;:?!]|\.(?!\d)"
)
_NEUTRAL = {"add": ("num", Fraction(0)), "mul": ("num", Fraction(1))}


def is_copied(answer: str, problem: str, gold: str) -> bool:
    """Returns True if an answer is an expression of the problem and not the gold as it is written.

    The order of summands and factors, a name, a unit, and typography make no difference.
    """
    if plain(answer) == plain(gold):
        return False
    try:
        value = _value(read(answer, Work()))
    except Unreadable:
        return plain(answer).rpartition("=")[2] in "".join(map(plain, _pieces(problem)))
    try:
        if value == _value(read(gold, Work())):
            return False
    except Unreadable:
        pass
    return value in _expressions(problem)


@functools.lru_cache(CACHED_PROBLEMS)
def _expressions(problem: str) -> frozenset[Node]:
    """Returns all expressions in the formulas of a problem and between its words."""
    nodes: set[Node] = set()
    work = Work()
    for piece in _pieces(problem):
        try:
            _collect(_ordered(read(piece, work)), nodes)
        except Unreadable:
            continue
    return frozenset(nodes)


def _pieces(problem: str) -> list[str]:
    """Returns the formulas of a problem, and the texts between its words and punctuation."""
    formulas = ["".join(filter(None, groups)) for groups in _FORMULA.findall(problem)]
    between = _WORDS.split(_FORMULA.sub(" ; ", problem))
    return [piece.strip() for piece in (*formulas, *between) if piece.strip()]


def _collect(node: Node, nodes: set[Node]) -> None:
    """Adds a node and all nodes in it to `nodes`."""
    nodes.add(node)
    for part in node[1:]:
        if type(part) is tuple and part and isinstance(part[0], str):
            _collect(part, nodes)


def _value(node: Node) -> Node:
    """Returns an answer without its name and unit, with summands and factors sorted."""
    if node[:2] == ("rel", "="):
        return _value(node[3])
    if node[0] in ("quantity", "percent"):
        return _value(node[1])
    return _ordered(node)


def _ordered(node: Node) -> Node:
    """Returns a node with summands and factors sorted, and without the zeros and ones that change
    nothing.
    """
    kind, *parts = node
    parts = [
        _ordered(part) if type(part) is tuple and part and isinstance(part[0], str) else part
        for part in parts
    ]
    if kind == "div" and parts[1] == _NEUTRAL["mul"]:
        return parts[0]
    if kind in _NEUTRAL:
        parts = sorted((part for part in parts if part != _NEUTRAL[kind]), key=repr)
        if len(parts) == 1:
            return parts[0]
    return kind, *parts
