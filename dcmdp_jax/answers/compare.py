r"""Whether two answers are equal.

Numbers, fractions, decimals and expressions are equal where their values are; 0.33 is not 1/3. Top-level lists and sets
are unordered, tuples and intervals ordered, with brackets that match; `\cup` joins pieces in any order; `1 \pm x` is two
answers; `x \ge 2` is `[2, \infty)`. `x = 5` equals 5 and `f(x) = 2x` equals `2x`; two equations are equal where they are
multiples of each other. Units are converted where both sides have known ones and left out where one has none; 50\% is
50 and 1/2. Words are equal but for case. Digits in a base, `52_8`, are a name of their own.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from dcmdp_jax.answers import units, values
from dcmdp_jax.answers.read import Node, read
from dcmdp_jax.answers.tokens import Unreadable, plain

MOST = 100  # items of a list or pieces of a union
_DEFINED = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?\s*\(\s*([A-Za-z])\s*\)")
INFINITY = ("var", r"\infty")


class Verdict(enum.Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNREADABLE = "cannot read"


def compare(gold: str, answer: str) -> Verdict:
    """Compares two answers by what is read here alone, at a cost that is bounded in advance.

    Returns EQUAL where both are spelled alike but for what only changes the looks, or have one value. Returns DIFFERENT
    where one of them is empty, or where both are read and have different values. Returns UNREADABLE where one of them is
    of no known form, or where comparing them has no result or would cost too much.
    """
    if not plain(answer) or not plain(gold):
        return Verdict.DIFFERENT
    if plain(gold) == plain(answer):
        return Verdict.EQUAL
    try:
        return Verdict.EQUAL if _same(read(gold), read(answer)) else Verdict.DIFFERENT
    except (Unreadable, values.Unknown):
        return Verdict.UNREADABLE


def equal(gold: str, answer: str) -> bool:
    """True if `compare` finds `answer` equal to `gold`."""
    return compare(gold, answer) is Verdict.EQUAL


def is_computed(text: str) -> bool:
    r"""True if an answer has nothing left to compute: a number, a name, words, a constant such as `\pi/2`, a surd in
    lowest terms, or a list, tuple, set, interval or relation of such. False for `2+2`, `2^{10}` and `(x+1)(x-1)`."""
    try:
        return _is_computed(read(text))
    except Unreadable:
        return False


def _is_computed(node: Node) -> bool:
    kind, *parts = node
    if kind in ("num", "var", "text"):
        return True
    if kind in ("quantity", "percent", "neg"):
        return _is_computed(parts[0])
    if kind == "rel":
        return _is_computed(parts[2]) and (parts[0] == "=" or _is_computed(parts[1]))
    if kind in ("list", "set", "union"):
        return all(map(_is_computed, parts))
    if kind == "group":
        return all(map(_is_computed, parts[2:]))
    if kind == "div":
        return parts[1][0] == "num" and _is_computed(parts[0])
    if kind == "mul":
        return len(parts) == 2 and parts[0][0] == "num" and (
            parts[1][0] == "root" or parts[1][0] == "var" or
            parts[1][:2] == ("pow", ("num", Fraction(10))) and parts[1][2][0] == "num")
    return False


def _same(one: Node, other: Node) -> bool:
    return _matched(_items(one), _items(other), _element)


def _items(node: Node) -> list[Node]:
    """The answers that a list, a set or a `\\pm` holds, or the one that it is."""
    items = list(node[1:]) if node[0] in ("list", "set") else [node]
    return [way for item in items for way in _ways(item)]


def _ways(node: Node) -> list[Node]:
    """A node without `\\pm`: two of them, where it has any."""
    if not _holds(node, "pm", "mp"):
        return [node]
    return [_signed(node, upper) for upper in (True, False)]


def _holds(node: Node, *kinds: str) -> bool:
    return node[0] in kinds or any(_holds(part, *kinds) for part in _parts(node))


def _parts(node: Node) -> list[Node]:
    """The nodes right under a node."""
    if node[0] == "matrix":
        return [cell for row in node[1:] for cell in row]
    if node[0] in ("quantity", "percent"):
        return [node[1]]
    return [part for part in node[1:] if isinstance(part, tuple)]


def _signed(node: Node, upper: bool) -> Node:
    if node[0] in ("pm", "mp"):
        inner = _signed(node[1], upper)
        return inner if upper == (node[0] == "pm") else ("neg", inner)
    if node[0] == "quantity":
        return ("quantity", _signed(node[1], upper), node[2])
    if node[0] == "matrix":
        return ("matrix", *(tuple(_signed(cell, upper) for cell in row) for row in node[1:]))
    return tuple(_signed(part, upper) if isinstance(part, tuple) else part for part in node)


def _matched(ones: Sequence[Node], others: Sequence[Node], same: Callable[[Node, Node], bool]) -> bool:
    """Whether the items pair off, in whatever order."""
    left = list(others)
    if len(ones) != len(left) or len(left) > MOST:
        return False
    for one in ones:
        found = next((i for i, other in enumerate(left) if same(one, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _element(one: Node, other: Node) -> bool:
    """Of a list: neither is one."""
    if one[0] == other[0] == "rel":
        return _relations(one, other)
    if "rel" in (one[0], other[0]):
        relation, bare = (one, other) if one[0] == "rel" else (other, one)
        named = _named(relation)
        return named is not None and _element(named, bare)
    if "text" in (one[0], other[0]):
        return _letters(one) == _letters(other) != ""
    if one[0] == other[0] == "group":
        return one[1:3] == other[1:3] and len(one) == len(other) and all(map(_same, one[3:], other[3:]))
    if one[0] == other[0] == "union":
        return _matched(one[1:], other[1:], _element)
    if one[0] == other[0] == "set":
        return _same(one, other)
    if one[0] == other[0] == "matrix":
        rows = list(zip(one[1:], other[1:]))
        return len(one) == len(other) and all(len(a) == len(b) and all(map(_element, a, b)) for a, b in rows)
    return _quantities(one, other)


def _quantities(one: Node, other: Node) -> bool:
    """Values with units, percentages, and plain values."""
    if "quantity" in (one[0], other[0]):
        (a, u), (b, v) = _measured(one), _measured(other)
        if u is None or v is None:
            one, other = a, b
        elif u.powers != v.powers:
            return False
        else:
            one, other = ("mul", a, ("num", u.factor)), ("mul", b, ("num", v.factor))
    if "percent" in (one[0], other[0]) and one[0] != other[0]:
        share, bare = (one[1], other) if one[0] == "percent" else (other[1], one)
        return values.equal(share, bare) or values.equal(("div", share, ("num", Fraction(100))), bare)
    if one[0] == "percent":
        one, other = one[1], other[1]
    return values.equal(one, other)


def _measured(node: Node) -> tuple[Node, units.Unit | None]:
    """A value and its unit. Beside a quantity, the letter of `5 m` or `5 m^2` is one, too."""
    if node[0] == "quantity":
        return node[1], node[2]
    if node[0] == "mul" and not values.variables(node[:-1]):
        last, power = node[-1][1:] if node[-1][0] == "pow" else (node[-1], ("num", 1))
        if last[0] == "var" and power[0] == "num":
            unit = units.read(f"{last[1]}^{power[1]}")
            if unit is not None and unit.known:
                return node[:-1], unit
    return node, None


def _relations(one: Node, other: Node) -> bool:
    """Two equations, inequalities, or memberships."""
    if one[1] == other[1] == "=":
        first, second = (_DEFINED.fullmatch(side[4]) for side in (one, other))
        if first and second:
            return _same(one[3], _renamed(other[3], second[1], first[1]))
        if _same(one[2], other[2]):
            return _same(one[3], other[3])
        differences = [("add", side[2], ("neg", side[3])) for side in (one, other)]
        return values.proportional(*differences)
    a, b = _named(one), _named(other)
    if a is not None and b is not None and one[1] != "=" != other[1]:
        return _element(a, b)
    return one[1] == other[1] and _same(one[2], other[2]) and _same(one[3], other[3])


def _named(relation: Node) -> Node | None:
    """What a relation says of its variable: the value of `x = 5` or `f(x) = 2x`, the interval of `x > 2`."""
    _, operator, left, right, written = relation
    if operator == "in":
        return right
    if operator == "=":
        if left[0] == "var" or _DEFINED.fullmatch(written):
            return right
        return left if right[0] == "var" and right[1] not in (r"\pi", "e", "i") else None
    if operator == "!=":
        return None
    if " " in operator:  # a < x < b, whose middle is not kept
        low, high, (first, second) = left, right, operator.split()
        if first[0] == ">":
            low, high, first, second = high, low, second, first
        return "group", _open(first), {"(": ")", "[": "]"}[_open(second)], low, high
    if left[0] != "var":
        left, right, operator = right, left, operator.translate(str.maketrans("<>", "><"))
    if left[0] != "var":
        return None
    if operator[0] == "<":
        return "group", "(", {"(": ")", "[": "]"}[_open(operator)], ("neg", INFINITY), right
    return "group", _open(operator), ")", right, INFINITY


def _open(operator: str) -> str:
    return "[" if operator.endswith("=") else "("


def _renamed(node: Node, old: str, new: str) -> Node:
    if node == ("var", old):
        return "var", new
    if node[0] == "quantity":
        return "quantity", _renamed(node[1], old, new), node[2]
    return tuple(_renamed(part, old, new) if isinstance(part, tuple) else part for part in node)


def _letters(node: Node) -> str:
    """The word that a text, or a product of variables, spells."""
    if node[0] == "text":
        return node[1]
    if node[0] == "var":
        return node[1].casefold()
    if node[0] == "mul":
        parts = [_letters(part) for part in node[1:]]
        return "".join(parts) if all(parts) else ""
    return ""


def is_number(text: str) -> bool:
    r"""True if an answer is one number with nothing left to compute: an integer, decimal or fraction, `1.5 \times 10^3`."""
    try:
        return _is_number(read(text))
    except Unreadable:
        return False


def _is_number(node: Node) -> bool:
    kind, *parts = node
    if kind in ("quantity", "percent", "neg"):
        return _is_number(parts[0])
    if kind == "rel":
        return parts[0] == "=" and _is_number(parts[2])
    if kind == "div":
        return all(part[0] == "num" for part in parts)
    if kind == "mul":
        return _is_computed(node) and parts[1][0] == "pow"
    return kind == "num"
