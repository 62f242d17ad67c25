r"""Sets of real numbers: what `x > 2`, `x \ne 1`, `\mathbb{R} \setminus \{0\}` and `(-\infty, 1)
\cup (2, 3]` describe.

A set is a tuple of intervals in ascending order that do not touch; a point is an interval. The ends
are numbers rounded to 40 digits.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from dcmdp_jax.answers import values
from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.work import Work

DIGITS = 40
STEP_COST = 5  # operations to look at an interval
INFINITY = ("var", r"\infty")
MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_CONDITIONS = {"reals", "union", "without", "such", "both", "either"}


class Interval(NamedTuple):
    """An interval with its ends, and whether they belong to it."""

    low: Decimal
    low_inside: bool
    high: Decimal
    high_inside: bool


Domain = tuple[Interval, ...]

EVERYTHING = Interval(Decimal("-Infinity"), False, Decimal("Infinity"), False)


def describes(node: Node) -> bool:
    """Returns True if a node describes a set of numbers by a condition or an operation on sets."""
    if node[0] == "list":
        return any(map(_is_inequality, node[1:])) and all(part[0] == "rel" for part in node[1:])
    return node[0] in _CONDITIONS or _is_inequality(node) or node[:2] == ("rel", "in")


def domain(node: Node, work: Work) -> Domain | None:
    """Returns the set of real numbers that a node describes, or None if there is none with known
    ends.
    """
    kind, *parts = node
    if kind == "reals":
        return (EVERYTHING,)
    if kind == "group" and len(parts) == 4:
        return _interval(*parts, work)
    if kind == "set":
        ends = [_end(part, work) for part in parts]
        return None if None in ends else _union(map(_point, ends), work)
    if kind in ("union", "either", "both"):
        return _combined(kind, [domain(part, work) for part in parts], work)
    if kind == "without":
        all_numbers, excluded = (domain(part, work) for part in parts)
        if all_numbers is None or excluded is None:
            return None
        return _intersection(all_numbers, _complement(excluded, work), work)
    if kind == "such":
        return domain(parts[1], work)
    if kind == "rel":
        return _of_relation(node, work)
    if kind == "list" and describes(node):  # a comma is an `and` if both conditions can hold
        sets = [domain(part, work) for part in parts]
        return _combined("both", sets, work) or _combined("either", sets, work)
    return None


def _is_inequality(node: Node) -> bool:
    """Returns True for a relation other than an equation or a membership."""
    return node[0] == "rel" and node[1] not in ("=", "in")


def _combined(kind: str, sets: list[Domain | None], work: Work) -> Domain | None:
    """Returns the intersection of sets if `kind` is `both`, else the union; None if one is."""
    if None in sets:
        return None
    if kind != "both":
        return _union((interval for part in sets for interval in part), work)
    common: Domain = (EVERYTHING,)
    for part in sets:
        common = _intersection(common, part, work)
    return common


def _interval(opening: str, closing: str, low: Node, high: Node, work: Work) -> Domain | None:
    """Returns an interval as a set, or None if it is no interval, or one with unknown ends."""
    ends = _end(low, work), _end(high, work)
    if None in ends or ends[0] >= ends[1]:
        return None  # a tuple
    return (Interval(ends[0], opening == "[", ends[1], closing == "]"),)


def _end(node: Node, work: Work) -> Decimal | None:
    """Returns an end of an interval as a real number; None if it is not real or has variables."""
    if node == INFINITY:
        return EVERYTHING.high
    if node == ("neg", INFINITY):
        return EVERYTHING.low
    if node[0] in ("quantity", "percent"):
        node = node[1]
    if node[0] == "rel" and node[1] == "=":
        node = node[3]  # `x = 1` among excluded numbers
    if values.variables(node, work):
        return None
    try:
        return _rounded(values.value(node, {}, work))
    except values.Unknown:
        return None


def _point(at: Decimal) -> Interval:
    """Returns the interval of one point."""
    return Interval(at, True, at, True)


def _rounded(value: values.Number) -> Decimal | None:
    """Returns a real number rounded to DIGITS, or None if the number is not real."""
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emax=10**6, Emin=-(10**6))):
        if isinstance(value, Fraction):
            return Decimal(value.numerator) / Decimal(value.denominator)
        return +value[0] if abs(value[1]) < values.ZERO_BELOW else None


def _of_relation(node: Node, work: Work) -> Domain | None:
    """Returns the set of numbers for which a relation holds, or None if that is unknown."""
    operator, left, right = node[1:4]
    if operator == "in":
        return domain(right, work)
    if " " in operator:
        first, second = operator.split()
        conditions = ("rel", first, left, node[4]), ("rel", second, node[4], right)
        return _combined("both", [_of_relation(condition, work) for condition in conditions], work)
    bounded = left != ("neg", INFINITY) and right != INFINITY
    if operator[0] == "<" and not bounded and "var" in (left[0], right[0]):
        return (EVERYTHING,)
    if right[:2] == ("fn", "abs"):
        operator, left, right = MIRRORED.get(operator, operator), right, left
    if left[:2] == ("fn", "abs") and operator != "=":
        inside = left[2]
        upper = _of_relation(("rel", operator, inside, right), work)
        lower = _of_relation(("rel", MIRRORED[operator], inside, ("neg", right)), work)
        return _combined("either" if operator[0] == ">" else "both", [upper, lower], work)
    solution = _solved(("add", left, ("neg", right)), work)
    if solution is None:
        return None
    root, rising = solution
    if operator == "=":
        return (_point(root),)
    if operator == "!=":
        return _complement((_point(root),), work)
    if not rising:
        operator = MIRRORED[operator]
    inside = operator.endswith("=")
    if operator[0] == "<":
        return (EVERYTHING._replace(high=root, high_inside=inside),)
    return (EVERYTHING._replace(low=root, low_inside=inside),)


def _solved(node: Node, work: Work) -> tuple[Decimal, bool] | None:
    """Returns the zero of an expression that is linear in one variable, and whether it rises.

    Returns None for any other expression.
    """
    names = values.variables(node, work)
    if len(names) != 1 or values.functions(node, work) or ("var", r"\infty") in (node[1], node[2]):
        return None
    (name,) = names
    try:
        at = [values.value(node, {name: Fraction(x)}, work) for x in (0, 1, 2, 5)]
        start = "num", at[0]
        rises = [values.value(("add", ("num", y), ("neg", start)), {}, work) for y in at[1:]]
        slope = rises[0]
        twice, five_times = (
            values.value(("mul", ("num", slope), ("num", Fraction(x))), {}, work) for x in (2, 5)
        )
        straight = values.agree(rises[1], twice) and values.agree(rises[2], five_times)
        root = _rounded(values.value(("div", ("neg", start), ("num", slope)), {}, work))
    except values.Unknown:
        return None
    way = _rounded(slope)
    return (root, way > 0) if straight and root is not None and way is not None else None


def _union(intervals: Iterable[Interval], work: Work) -> Domain:
    """Returns the union of intervals."""
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda interval: (interval.low, not interval.low_inside)):
        work.spend(STEP_COST)
        last = merged[-1] if merged else None
        inside = last and (interval.low_inside or last.high_inside)
        if last and (interval.low < last.high or interval.low == last.high and inside):
            high, inside = max((last.high, last.high_inside), (interval.high, interval.high_inside))
            merged[-1] = last._replace(high=high, high_inside=inside)
        else:
            merged.append(interval)
    return tuple(merged)


def _intersection(left: Domain, right: Domain, work: Work) -> Domain:
    """Returns the intersection of two sets."""
    common = []
    for a in left:
        for b in right:
            work.spend(STEP_COST)
            low, outside = max((a.low, not a.low_inside), (b.low, not b.low_inside))
            high, inside = min((a.high, a.high_inside), (b.high, b.high_inside))
            if low < high or low == high and inside and not outside:
                common.append(Interval(low, not outside, high, inside))
    return tuple(common)


def _complement(intervals: Domain, work: Work) -> Domain:
    """Returns all real numbers outside of the intervals."""
    outside: Domain = (EVERYTHING,)
    for interval in intervals:
        below = EVERYTHING._replace(high=interval.low, high_inside=not interval.low_inside)
        above = EVERYTHING._replace(low=interval.high, low_inside=not interval.high_inside)
        outside = _intersection(
            outside, tuple(part for part in (below, above) if part.low < part.high), work
        )
    return outside
