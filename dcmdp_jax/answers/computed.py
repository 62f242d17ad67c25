"""Whether an answer has anything left to compute."""

from __future__ import annotations

import math
from fractions import Fraction

from dcmdp_jax.answers.read import Node, read
from dcmdp_jax.answers.work import Unreadable

LARGEST_RADICAND = 10**6  # whose square factors are looked for


def is_computed(text: str) -> bool:
    r"""True if an answer has nothing left to compute.

    So it is with numbers, fractions and powers of ten behind a number, whatever their type face or unit; with names, words
    and choices; with constants and roots in lowest terms, such as `\pi/2` and `1 + 2\sqrt{3}`; and with lists, sets, tuples,
    intervals and relations of such, of an equation the last side. Not so with `2 + 2`, `2^{10}`, `\sqrt{4}` and
    `(x+1)(x-1)`. What cannot be read has.
    """
    try:
        return _is_computed(read(text))
    except Unreadable:
        return False


def is_number(text: str) -> bool:
    r"""True if an answer is one number with nothing left to compute, named or with a unit or not; no root and no constant."""
    try:
        node = read(text)
    except Unreadable:
        return False
    while node[0] in ("quantity", "percent", "neg", "rel"):
        node = node[3] if node[0] == "rel" else node[1]
    return _kind_of_term(node) == ("num", 1)


def _is_computed(node: Node) -> bool:
    kind, *parts = node
    if kind in ("text", "reals", "clock"):
        return True
    if kind in ("quantity", "percent") or kind == "neg" and parts[0][0] in ("quantity", "percent"):
        return _is_computed(parts[0])
    if kind == "rel" and parts[0] == "=":
        return _is_computed(parts[1] if parts[2][0] == "var" and parts[1][0] != "var" else parts[2])
    if kind == "rel":
        return all(map(_is_computed, parts[1:]))
    if kind in ("list", "set", "union", "without", "both", "either", "ratio"):
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
    """True of a sum of terms that no two of have a root, a constant or nothing in common, over a number or not."""
    if node[0] == "div" and node[2][0] == "num":
        node = node[1]
    if node[0] in ("neg", "pm", "mp"):
        node = node[1]
    if node[0] != "add":
        return _kind_of_term(node) is not None
    kinds = [_kind_of_term(part[1] if part[0] in ("neg", "pm", "mp") else part) for part in node[1:]]
    return None not in kinds and len(set(kinds)) == len(kinds) and not any(kind[0] == "var" for kind in kinds)


def _kind_of_term(node: Node) -> Node | None:
    """What a term is a multiple of: a variable, a constant, a root, or ("num", 1); None where it has to be computed."""
    kind, *parts = node
    if kind == "num":
        return "num", 1
    if kind == "neg":
        return _kind_of_term(parts[0])
    if kind == "var":
        return ("constant", parts[0]) if parts[0] in (r"\pi", "e", "i", r"\infty") else node
    if kind == "root":
        return node if _is_simple_root(*parts) else None
    if kind == "div":
        return _kind_of_term(parts[0]) if parts[1][0] == "num" else None
    if kind == "mul":
        return _kind_of_product(parts)
    return None


def _kind_of_product(parts: list[Node]) -> Node | None:
    *numbers, last = parts
    if len(numbers) == 1 and _is_number(numbers[0]):
        if last[0] == "pow" and last[1] == ("num", Fraction(10)) and last[2][0] == "num":
            return "num", 1
        return _kind_of_term(last) if last[0] in ("var", "root") else None
    return None


def _is_number(node: Node) -> bool:
    return node[0] == "num" or node[0] == "div" and node[1][0] == node[2][0] == "num"


def _is_simple_root(degree: Node, inside: Node) -> bool:
    """True of the root of a whole number, or of a variable, from which no factor can be drawn."""
    if inside[0] == "var":
        return True
    if inside[0] != "num" or degree[0] != "num" or inside[1].denominator > 1 or degree[1].denominator > 1:
        return False
    n = int(inside[1])
    power = int(degree[1])
    if not 2 <= power <= 20 or not 2 <= n <= LARGEST_RADICAND:
        return False
    return all(n % factor ** power for factor in range(2, math.isqrt(n) + 1) if factor ** power <= n)
