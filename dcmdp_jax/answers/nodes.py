"""Arithmetic on the nodes of expressions."""

from __future__ import annotations

from fractions import Fraction

from dcmdp_jax.answers.cursor import Node


def mixed_number(integer: Node, fraction: Node) -> Node | None:
    """Returns the mixed number of an integer and a fraction, or None if they make none."""
    if integer[0] != "num" or integer[1].denominator > 1 or fraction[0] != "div":
        return None
    top, bottom = fraction[1:]
    if not top[0] == bottom[0] == "num" or not 0 < top[1] < bottom[1]:
        return None
    part = top[1] / bottom[1]
    return "num", integer[1] - part if integer[1] < 0 else integer[1] + part


def is_part_of(smaller: Node, larger: Node) -> bool:
    """Returns True if both are quantities of one kind, and the first has the smaller unit."""
    if not smaller[0] == larger[0] == "quantity" or not smaller[2].known:
        return False
    return smaller[2].powers == larger[2].powers and smaller[2].factor < larger[2].factor


def with_sign(sign: str, value: Node) -> Node:
    """Returns a value with a sign, which may be empty."""
    if sign == "-":
        if value[0] == "matrix":
            return multiply(("num", Fraction(-1)), value)
        if value[0] in ("percent", "quantity"):
            return value[0], with_sign(sign, value[1]), *value[2:]
        return ("num", -value[1]) if value[0] == "num" else ("neg", value)
    return {r"\pm": ("pm", value), r"\mp": ("mp", value)}.get(sign, value)


def multiply(product: Node, factor: Node) -> Node:
    """Returns a product; the cells of a matrix are multiplied one by one."""
    for matrix, scale in ((factor, product), (product, factor)):
        if matrix[0] == "matrix" and scale[0] not in ("matrix", "group", "set"):
            return "matrix", *(tuple(multiply(scale, cell) for cell in row) for row in matrix[1:])
    return (*product, factor) if product[0] == "mul" else ("mul", product, factor)


def divide(value: Node, divisor: Node) -> Node:
    """Returns a quotient; the cells of a matrix are divided one by one."""
    if value[0] == "matrix":
        return "matrix", *(tuple(("div", cell, divisor) for cell in row) for row in value[1:])
    return "div", value, divisor


def in_radians(node: Node) -> Node:
    """Returns an angle in radians."""
    if node[0] == "quantity" and node[2].powers == (("degree", 1),):
        if node[2].pi:
            return node[1]
        return "div", ("mul", node[1], ("var", r"\pi")), ("num", Fraction(180))
    if node[0] in ("add", "neg", "mul", "div"):
        return node[0], *map(in_radians, node[1:])
    return node
