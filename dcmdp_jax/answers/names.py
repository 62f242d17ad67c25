"""What an equation names: `x` in `x = 5`, `m + n` in `m + n = 9`, `(x, y)` in `(x, y) = (1, 2)`."""

from __future__ import annotations

from dcmdp_jax.answers import values
from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.work import Work

_CONSTANTS = (r"\pi", "e", "i", r"\infty")
_MODULI = ("z", "w", "v", "u")  # `|z| = 5` gives a modulus, while `|x| = 5` is to be solved for x


def expand(node: Node) -> Node:
    r"""Returns an answer without names that its values do not need.

    `(x, y) = (1, 2)` becomes the equations `x = 1, y = 2`; `(x, y) = (1, 2), (3, 4)` the tuples; `x
    \in \{1, 2\}` and `S = \{1, 2\}` the set; `= 5` the value. Any other node stays as it is.
    """
    if node[:2] == ("rel", "in") and (node[2][0] == "var" or _is_tuple_of_names(node[2])):
        return node[3]
    if node[:2] == ("rel", "=") and _is_variable(node[2]) and node[3][0] == "set":
        return node[3]  # `S = \\{1, 2\\}`
    if node[:3] == ("rel", "=", ("var", "")):
        return node[3]  # `= 5`
    if _is_named_tuple(node):
        return "list", *(("rel", "=", *sides) for sides in zip(node[2][3:], node[3][3:]))
    if node[0] == "list" and all(_is_named_tuple(item) or item[0] == "group" for item in node[1:]):
        return "list", *(item[3] if item[0] == "rel" else item for item in node[1:])
    return node


def _is_named_tuple(node: Node) -> bool:
    """Returns True for `(x, y) = (1, 2)`."""
    if node[:2] != ("rel", "=") or not node[2][0] == node[3][0] == "group":
        return False
    return len(node[2]) == len(node[3]) and _is_tuple_of_names(node[2])


def _is_tuple_of_names(node: Node) -> bool:
    """Returns True for `(x, y)`."""
    return node[0] == "group" and all(map(_is_variable, node[3:]))


def named_value(equation: Node, work: Work) -> Node | None:
    """Returns the side of an equation that is the value of the other side, or None if neither is.

    `x + 1 = 5` and `x^2 = 4` give no value: they are still to be solved. An expression in several
    variables, such as `m + n`, cannot be solved, so a number on the other side is its value, unless
    that number is 0 as in the equation of a curve.
    """
    left, right = equation[2:4]
    for name, value in ((left, right), (right, left)):
        if _is_variable(name) or name[0] == "applied" or _is_segment(name) or _is_derivative(name):
            return value
        if _is_probability(name):
            return value
        if name is left and name in (("var", "e"), ("var", "i")):
            return value
        if _is_tuple_of_names(name):
            return value
        if value == ("num", 0) and not _is_sum_of_variables(name):
            continue
        names = values.variables(value, work)
        unknown = {part for part in names if not part[:1].isdigit()}  # `52_8` is a number
        if name[0] == "fn":
            unknown &= values.variables(name, work)
        if _is_name(name, work) and not unknown:
            return value
    return None


def is_curve(equation: Node, work: Work) -> bool:
    """Returns True if an equation, as a right answer, is more than a named value: `x + y = 5`, `x^2
    + y^2 = 25`.
    """
    operator, *sides = equation[1:4]
    if operator != "=" or any(map(_is_variable, sides)):
        return False
    return any(side[0] == "add" and len(values.variables(side, work)) > 1 for side in sides)


def _is_segment(node: Node) -> bool:
    """Returns True for `AB` and `ABC`, which name a length, an area or an angle."""
    if node[0] != "mul" or len(node) < 3:
        return False
    return all(_is_variable(part) and part[1].isupper() for part in node[1:])


def _is_derivative(node: Node) -> bool:
    """Returns True for `dy/dx`."""
    return node[0] == "div" and all(part[:2] == ("mul", ("var", "d")) for part in node[1:])


def _is_probability(node: Node) -> bool:
    """Returns True for `P(X > 2)`."""
    return node[0] == "mul" and node[1] == ("var", "P") and len(node) == 3 and node[2][0] == "rel"


def _is_variable(node: Node) -> bool:
    """Returns True for a variable, but not for a constant."""
    return node[0] == "var" and node[1] not in _CONSTANTS


def _is_name(node: Node, work: Work) -> bool:
    """Returns True for expressions that a problem may ask for as such: `m + n`, `|z|`, `x : y`,
    `sin x`.
    """
    if node[0] == "ratio":
        return all(_is_variable(part) or _is_segment(part) for part in node[1:])
    if node[0] == "fn" and node[1] == "abs":
        inside = node[2]
        if _is_variable(inside):
            is_modulus = "{" in inside[1] or inside[1][:1] in _MODULI  # `\overline{AB}`, `z_1`
            return is_modulus or inside[1].isupper()  # `|A|` of a set or a matrix
        return _is_name(inside, work)
    if node[0] == "fn" and node[1] in ("floor", "ceil"):
        return _is_variable(node[2])
    if node[0] == "fn" and node[1] in ("sin", "cos", "tan", "cot", "sec", "csc"):
        return _is_variable(node[2]) or _is_name(node[2], work)
    return _is_polynomial(node) and len(values.variables(node, work)) > 1


def _is_sum_of_variables(node: Node) -> bool:
    """Returns True for sums and differences of variables."""
    if node[0] in ("add", "neg"):
        return all(map(_is_sum_of_variables, node[1:]))
    return _is_variable(node)


def _is_polynomial(node: Node) -> bool:
    """Returns True for sums, products, quotients and powers of variables without a number as a
    summand.
    """
    kind, *parts = node
    if kind == "add":
        return all(part[0] != "num" and _is_polynomial(part) for part in parts)
    if kind in ("mul", "div", "neg"):
        return all(map(_is_polynomial, parts))
    if kind == "pow":
        return _is_polynomial(parts[0]) and parts[1][0] == "num"
    return kind == "num" or kind == "var"
