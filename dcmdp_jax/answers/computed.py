"""Decides whether an answer has anything left to compute."""

from __future__ import annotations

import itertools
from fractions import Fraction

from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.read import read
from dcmdp_jax.answers.work import Unreadable

_CONSTANTS = (r"\pi", "e", "i", r"\infty")
_TO_TENS = ("pow", ("num", Fraction(10)))
MAX_RADICAND = 10**6  # of a root that is checked for square factors


def is_computed(text: str) -> bool:
    r"""Returns True if an answer has nothing left to compute.

    That is so for numbers, fractions and powers of ten after a number, in any typeface and with any
    unit; for names, words and choices; for constants and roots in lowest terms, such as `\pi/2` and
    `1 + 2\sqrt{3}`; for lists, sets, tuples, intervals and relations of these. Of an equation the
    last side counts, or a number on the first. It is not so for `2 + 2`, `2^{10}`, `\sqrt{4}` and
    `(x+1)(x-1)`, nor for what cannot be read.
    """
    try:
        return _is_computed(read(text))
    except Unreadable:
        return False


def is_number(text: str) -> bool:
    """Returns True if an answer is one number, with or without a name or a unit, but no root and no
    constant.
    """
    try:
        node = read(text)
    except Unreadable:
        return False
    return _is_number(node[3] if node[:2] == ("rel", "=") else node)


def _is_number(node: Node) -> bool:
    """Returns True for a number, a fraction, or a number times a power of ten."""
    while node[0] in ("quantity", "percent", "neg"):
        node = node[1]
    tens = node[0] == "mul" and len(node) == 3 and node[2][:2] == _TO_TENS  # 1.5 \times 10^3
    parts = node[1:2] if tens else node[1:] if node[0] == "div" else [node]
    return all(part[0] == "num" for part in parts)


def _is_computed(node: Node) -> bool:
    """Returns True if a tree has nothing left to compute."""
    kind, *parts = node
    if kind in ("text", "reals", "clock"):
        return True
    if kind in ("quantity", "qualified", "percent"):
        return _is_computed(parts[0])
    if kind == "neg" and parts[0][0] in ("quantity", "percent"):
        return _is_computed(parts[0])
    if kind == "rel" and parts[0] == "=":
        left, right = parts[1:]
        return _is_number(left) or _is_computed(right)  # `5 = m + n`, `x = 5`
    if kind == "rel":
        return all(map(_is_computed, parts[1:]))
    if kind in ("list", "set", "union", "without", "both", "either", "ratio", "residue"):
        return all(map(_is_computed, parts))
    if kind == "such":
        return _is_computed(parts[1])
    if kind == "group":
        return all(map(_is_computed, parts[2:]))
    if kind == "matrix":
        return all(_is_computed(cell) for row in parts for cell in row)
    if kind == "add" and all(part[0] == "quantity" for part in parts):
        return all(map(_is_computed, parts))  # `6 ft 2 in`
    return _is_in_lowest_terms(node)


def _is_in_lowest_terms(node: Node) -> bool:
    """Returns True for a term, or a sum of terms of which no two can be added, possibly over an
    integer.
    """
    if node[0] == "div" and node[2][0] == "num" and node[1][0] == "add":
        node = node[1]
    if node[0] in ("neg", "pm", "mp"):
        node = node[1]
    if node[0] != "add":
        return _term(node) is not None
    terms = [_term(part[1] if part[0] in ("neg", "pm", "mp") else part) for part in node[1:]]
    if None in terms:
        return False
    names = {factor[1] for term in terms for factor in term if factor[0] == "var"}
    if not names.issubset(_CONSTANTS):
        return False
    kinds = [frozenset(factor for factor in term if factor[:2] != _TO_TENS) for term in terms]
    return len(set(kinds)) == len(kinds)


def _term(node: Node) -> frozenset[Node] | None:
    """Returns what a term is a multiple of: constants, a root, variables, or nothing.

    Returns None if there is something left to compute.
    """
    over, under, others = _factors(node)
    if None in others or over > 1 or under > 1:
        return None
    roots = [factor for factor in others if factor[0] == "root"]
    variables = [factor for factor in others if factor[0] == "var" and factor[1] != r"\pi"]
    if len(roots) > 1:
        return None
    word = len(variables) == len(others) and not over and not under  # `noon`
    if len(set(others)) < len(others) and not word:
        return None
    return frozenset(others)


def _factors(node: Node) -> tuple[int, int, list[Node | None]]:
    """Returns how many numbers a product has, how many divide it, and its other factors.

    A factor that is still to be computed is None.
    """
    kind, *parts = node
    if kind == "num":
        return 1, 0, []
    if kind == "neg":
        return _factors(parts[0])
    if kind == "var":
        return 0, 0, [node]
    if kind == "root":
        return 0, 0, [node if _is_simple_root(*parts) else None]
    if kind == "pow":
        constant = node[:2] == _TO_TENS or parts[0][0] == "var" and parts[0][1] in _CONSTANTS
        return 0, 0, [node if constant and parts[1][0] == "num" else None]
    if kind == "div":
        over, under, others = _factors(parts[0])
        if parts[1][0] == "num":
            return over, under + 1, others
        constant = parts[1][0] == "var" and parts[1][1] in _CONSTANTS
        return over, under, [*others, ("div", parts[1]) if constant else None]
    if kind == "mul":
        over, under, others = zip(*map(_factors, parts))
        return sum(over), sum(under), [factor for part in others for factor in part]
    return 0, 0, [None]


def _is_simple_root(degree: Node, inside: Node) -> bool:
    """Returns True for the root of an integer or a variable that does not simplify."""
    if inside[0] == "var":
        return True
    if not inside[0] == degree[0] == "num":
        return False
    if not inside[1].denominator == degree[1].denominator == 1:
        return False
    n = int(inside[1])
    power = int(degree[1])
    if not 2 <= power <= 20 or not 2 <= n <= MAX_RADICAND:
        return False
    factors = itertools.takewhile(lambda factor: factor**power <= n, itertools.count(2))
    return all(n % factor**power for factor in factors)
