r"""Reads an answer in LaTeX, or as people type it, into a tree; nothing is computed.

A recursive descent over at most `LONGEST` characters, `DEEPEST` calls deep. Nodes are tuples, their kind first:

    ("num", Fraction)  ("var", name)  ("add", *parts)  ("mul", *parts)  ("div", a, b)  ("pow", a, b)  ("root", n, a)
    ("neg", a)  ("pm", a) for +-a  ("mp", a) for -+a  ("fn", name, a)  ("binom", a, b)
    ("list", *items)  ("set", *items)  ("group", open, close, *items): a tuple or an interval  ("union", *pieces)
    ("matrix", *rows of cells)  ("rel", operator, left, right, left as written)  ("quantity", a, units.Unit)  ("percent", a)
    ("text", words)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from dcmdp_jax.answers import units
from dcmdp_jax.answers.tokens import Token, Unreadable, inside, number, split

DEEPEST = 100  # calls of the reader's own; three or four for a bracket in a bracket
DIVISIONS = 40  # signs `/` in an answer

Node = tuple

_FUNCTIONS = ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "exp",
              "log", "ln", "lg", "pi")
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", r"\ge": ">=", r"\geq": ">=",
              r"\geqslant": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=", r"\in": "in"}
_TIMES = ("*", r"\cdot", r"\times", r"\ast")
_OVER = ("/", r"\div")
_FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil"), r"\lvert": (r"\rvert", "abs"),
           "|": ("|", "abs")}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix"}
_NOT_VARIABLES = {r"\begin", r"\end", r"\rfloor", r"\rceil", r"\rvert", r"\cup", r"\pm", r"\mp", r"\frac", r"\}", r"\cr",
                  r"\%", r"\$", r"\cap", r"\setminus", r"\mid", r"\to", r"\sum", r"\int", r"\prod", r"\lim", r"\equiv",
                  r"\approx", r"\sim", r"\bmod", r"\pmod", r"\ldots", r"\dots", r"\cdots", r"\vdots", r"\color",
                  r"\underline", r"\overline", r"\hat", r"\vec"}
_AFTER_UNIT = {",", ";", ")", "]", r"\}", r"\cup", *_RELATIONS}
_NO_FACTOR = {*_NOT_VARIABLES, *_RELATIONS, *_TIMES, *_OVER, r"\{"} - {r"\frac"}
_WORDS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Node:
    """The tree of an answer. Raises Unreadable where it is of no known form."""
    return _Reader(text).answer()


def _counted(method: Callable) -> Callable:
    """Bounds how deep a reader's methods call each other."""
    @functools.wraps(method)
    def counted(self, *arguments):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        found = method(self, *arguments)
        self.depth -= 1
        return found

    return counted


class _Reader:
    def __init__(self, text: str):
        self.text, self.tokens = split(text)
        self.at, self.depth, self.divisions = 0, 0, 0

    # --- tokens

    def peek(self, ahead: int = 0) -> str:
        """The next token's text; "" at the end."""
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """Takes the next token if it is one of `wanted`, else returns ""."""
        if self.peek() and self.peek() in wanted:
            self.at += 1
            return self.tokens[self.at - 1].text
        return ""

    def need(self, *wanted: str) -> str:
        if not (found := self.take(*wanted)):
            raise Unreadable(f"wants {wanted[0]}")
        return found

    def separated(self) -> bool:
        """Takes a comma, a semicolon, `and` or `or`."""
        if self.says("and", "or"):
            return True
        if not self.take(",", ";"):
            return False
        self.says("and", "or")
        return True

    def says(self, *words: str) -> bool:
        """Takes one of these words, also where `\\text{}` holds it."""
        found = self.kind() in ("text", "word") and inside(self.peek()).strip(" ,") in words
        self.at += found
        return found

    # --- answers

    def answer(self) -> Node:
        items = self.items()
        if self.at < len(self.tokens):
            raise Unreadable("something is left over")
        return items[0] if len(items) == 1 else ("list", *items)

    @_counted
    def items(self) -> list[Node]:
        items = [self.element()]
        while self.separated():
            items.append(self.element())
        return items

    def element(self) -> Node:
        if (word := self.words()) is not None:
            return word
        start = self.at
        left = self.union()
        if self.peek() not in _RELATIONS:
            return left
        written = self.text[self.tokens[start].start:self.tokens[self.at].start].strip()
        operator = _RELATIONS[self.take(*_RELATIONS)]
        right = self.union()
        if self.peek() not in _RELATIONS:
            return "rel", operator, left, right, written
        second, end = _RELATIONS[self.take(*_RELATIONS)], self.union()
        if operator == second == "=":
            return "rel", "=", left, end, written
        if operator[0] == second[0] in ("<", ">"):
            return "rel", operator + " " + second, left, end, ""
        raise Unreadable("relations do not chain")

    def words(self) -> Node | None:
        """An element of words alone, such as `\\text{Evelyn}` or `even`."""
        end = self.at
        while end < len(self.tokens) and self.tokens[end].kind in ("text", "word"):
            end += 1
        run = self.tokens[self.at:end]
        follows = self.tokens[end].text if end < len(self.tokens) else ""
        if not run or follows not in ("", ",", ";"):
            return None
        said = " ".join(inside(token.text) for token in run).strip()
        wrapped = any(token.kind == "text" for token in run)
        if re.fullmatch(r"\(?([A-Za-z])\)?", said):
            self.at = end
            return "var", said.strip("()")
        if not wrapped and (len(said.replace(" ", "")) < 4 or any(said.startswith(name) for name in _FUNCTIONS)):
            return None
        self.at = end
        return "text", re.sub(r"[\s.]+", "", said).casefold()

    def union(self) -> Node:
        pieces = [self.quantity()]
        while self.take(r"\cup"):
            pieces.append(self.quantity())
        return pieces[0] if len(pieces) == 1 else ("union", *pieces)

    def quantity(self) -> Node:
        dollars = bool(self.take(r"\$"))
        value = self.sum()
        if self.take("%", r"\%") or self.says("percent"):
            return "percent", value
        if self.kind() in ("word", "text") and (times := _WORDS.get(inside(self.peek()).strip().removesuffix("s"))):
            self.at += 1
            value = "mul", value, ("num", Fraction(times))
        unit = self.unit() if self.kind() in ("word", "text") else None
        if dollars:
            unit = units.read("dollars") if unit is None or unit.known else unit
        return value if unit is None else ("quantity", value, unit)

    def unit(self) -> units.Unit | None:
        """What follows a value in words, up to the next comma, bracket or relation."""
        start, end = self.at, self.at
        while end < len(self.tokens) and self.tokens[end].text not in _AFTER_UNIT and \
                inside(self.tokens[end].text).strip() not in ("and", "or"):
            end += 1
        unit = units.read(self.text[self.tokens[start].start:self.tokens[end - 1].end])
        if unit is None:
            raise Unreadable("no unit")
        self.at = end
        return unit

    # --- expressions

    @_counted
    def sum(self) -> Node:
        parts = [_sign(self.take("+", "-", r"\pm", r"\mp"), self.term())]
        while sign := self.take("+", "-", r"\pm", r"\mp"):
            parts.append(_sign(sign, self.term()))
        return parts[0] if len(parts) == 1 else ("add", *parts)

    def term(self) -> Node:
        value = self.factor()
        while True:
            if self.take(*_TIMES):
                value = _times(value, self.factor())
            elif self.take(*_OVER):
                self.divisions += 1
                if self.divisions > DIVISIONS:
                    raise Unreadable("too many divisions")
                value = "div", value, self.factor()
            elif self.starts_factor():
                if self.kind() == "num" and self.kind(-1) == "num":
                    raise Unreadable("two numbers beside each other")
                value = _times(value, self.factor())
            else:
                return value

    @_counted
    def factor(self) -> Node:
        if sign := self.take("+", "-"):
            return _sign(sign, self.factor())
        return self.postfix(self.primary())

    def starts_factor(self) -> bool:
        """Whether a factor follows that multiplies what stands before it."""
        kind, text = self.kind(), self.peek()
        if kind == "word":
            spaced = self.tokens[self.at].start > self.tokens[self.at - 1].end
            return not (text in ("and", "or", "percent") or text.removesuffix("s") in _WORDS or
                        (self.tokens[self.at - 1].text not in (")", "}") or spaced) and units.is_word(text, spaced))
        return kind == "num" or text in ("(", "[") or (text in _FENCES and text != "|") or \
            (kind == "cmd" and text not in _NO_FACTOR)

    def postfix(self, value: Node) -> Node:
        """A value with the primes, the factorial and the exponent that follow it."""
        while self.kind() == "'" and value[0] == "var":
            self.at += 1
            value = "var", value[1] + "'"
        if self.take("!"):
            value = "fn", "factorial", value
        if self.take("^"):
            exponent = self.exponent()
            prime = exponent == ("var", r"\prime") and value[0] == "var"
            value = ("var", value[1] + "'") if prime else ("pow", value, exponent)
        if self.take("!"):
            value = "fn", "factorial", value
        if self.peek() in ("!", "^"):
            raise Unreadable("a second one of its kind")
        return value

    @_counted
    def exponent(self) -> Node:
        if sign := self.take("+", "-"):
            return _sign(sign, self.exponent())
        if self.peek() == "{":
            return self.braced()
        return self.postfix(self.primary())

    def braced(self) -> Node:
        """`{...}`, or the single digit, letter or command that LaTeX takes in its place."""
        if self.take("{"):
            value = self.sum()
            self.need("}")
            return value
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        if token and token.kind in ("num", "word") and len(token.text) > 1:
            if token.kind == "num" and not token.text.isdecimal():
                raise Unreadable("half a decimal")
            self.tokens[self.at:self.at + 1] = [Token(token.kind, token.text[0], token.start, token.start + 1),
                                                Token(token.kind, token.text[1:], token.start + 1, token.end)]
        return self.primary()

    @_counted
    def primary(self) -> Node:
        kind, text = self.kind(), self.peek()
        if kind == "num":
            return self.number()
        if kind == "word":
            return self.word()
        if text in ("(", "[", r"\{", "{"):
            return self.bracketed()
        if text in _FENCES:
            close, name = _FENCES[self.take(text)]
            value = self.sum()
            self.need(close)
            return "fn", name, value
        if kind == "cmd":
            self.at += 1
            return self.command(text)
        raise Unreadable(f"{text!r}")

    def number(self) -> Node:
        value = ("num", number(self.take(self.peek())))
        if self.take("_"):
            return "var", f"{value[1]}_{self.subscript()}"  # digits in a base are a name of their own
        whole = value[1].denominator == 1
        if whole and self.peek() == r"\frac" and (part := self.mixed()):
            return "num", value[1] + part
        if whole and self.kind() == "num" and self.peek(1) == "/" and self.kind(2) == "num":
            top, bottom = number(self.peek()), number(self.peek(2))
            if 0 < top < bottom:
                self.at += 3
                return "num", value[1] + top / bottom
        return value

    def mixed(self) -> Fraction | None:
        """Takes a `\\frac` of two numbers, the part of a mixed number."""
        before = self.at, list(self.tokens)
        self.at += 1
        top, bottom = self.braced(), self.braced()
        if top[0] == bottom[0] == "num" and 0 < top[1] < bottom[1]:
            return top[1] / bottom[1]
        self.at, self.tokens = before
        return None

    def word(self) -> Node:
        """A function by its plain name, else the first letter of a product of variables."""
        token = self.tokens[self.at]
        name = next((name for name in _FUNCTIONS if token.text.startswith(name)), token.text[0])
        self.at += 1
        if len(token.text) > len(name):
            self.at -= 1
            self.tokens[self.at:self.at + 1] = [Token("word", name, token.start, token.start + len(name)),
                                                Token("word", token.text[len(name):], token.start + len(name), token.end)]
            self.at += 1
        if name == "pi":
            return "var", r"\pi"
        return self.function(name) if len(name) > 1 else self.variable(name)

    def variable(self, name: str) -> Node:
        if self.take("_"):
            name += "_" + self.subscript()
        return "var", name

    def subscript(self) -> str:
        """The raw text of what follows `_`."""
        if self.take("{"):
            depth, start = 1, self.at
            while depth:
                if self.at >= len(self.tokens):
                    raise Unreadable("a subscript does not end")
                depth += {"{": 1, "}": -1}.get(self.peek(), 0)
                self.at += 1
            return "".join(inside(token.text).replace(" ", "") for token in self.tokens[start:self.at - 1])
        if not self.peek():
            raise Unreadable("a subscript is missing")
        self.at += 1
        return inside(self.tokens[self.at - 1].text)

    def bracketed(self) -> Node:
        opening = self.take("(", "[", r"\{", "{")
        if opening == "{":
            value = self.sum()
            self.need("}")
            return value
        if opening == r"\{":
            items = self.items()
            self.need(r"\}")
            return "set", *items
        items = self.items()
        closing = self.need(")", "]")
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return items[0]
        return "group", opening, closing, *items

    def command(self, name: str) -> Node:
        if name == r"\frac":
            return "div", self.braced(), self.braced()
        if name == r"\binom":
            return "binom", self.braced(), self.braced()
        if name == r"\sqrt":
            degree = ("num", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return "root", degree, self.braced()
        if name == r"\begin":
            return self.matrix()
        if name[1:] in _FUNCTIONS and name != r"\pi":
            return self.function(name[1:])
        if name in (r"\dot", r"\ddot"):
            inner = self.braced()
            if inner[0] != "var":
                raise Unreadable("a dot over more than a variable")
            return self.variable(name + inner[1])
        if name in _NOT_VARIABLES or name in _RELATIONS:
            raise Unreadable(name)
        return self.variable(name)

    def function(self, name: str) -> Node:
        base = power = None
        if name == "log" and self.take("_"):
            base = self.braced()
        if name != "sqrt" and self.take("^"):
            power = self.exponent()
        if power == ("num", Fraction(-1)) and name in _INVERSE:
            name, power = _INVERSE[name], None
        value = self.argument()
        if name == "sqrt":
            value = "root", ("num", Fraction(2)), value
        elif name == "lg" or base is not None:
            value = "div", ("fn", "ln", value), ("fn", "ln", base or ("num", Fraction(10)))
        else:
            value = "fn", "ln" if name == "log" else name, value
        return value if power is None else ("pow", value, power)

    def argument(self) -> Node:
        """A bracket, or the product that follows up to an operator or another function."""
        if self.peek() in ("(", "[", "{"):
            return self.bracketed()
        value = self.postfix(self.primary())
        while self.starts_factor() and self.peek().lstrip("\\") not in _FUNCTIONS[:-1]:
            value = _times(value, self.postfix(self.primary()))
        return value

    def matrix(self) -> Node:
        name = self.environment()
        if name not in _MATRICES:
            raise Unreadable(name)
        rows = [[self.sum()]]
        while not self.take(r"\end"):
            if self.need("&", r"\cr") == "&":
                rows[-1].append(self.sum())
            elif self.peek() != r"\end":
                rows.append([self.sum()])
        self.environment()
        return "matrix", *map(tuple, rows)

    def environment(self) -> str:
        self.need("{")
        name = self.take(self.peek())
        self.need("}")
        return name


def _sign(sign: str, value: Node) -> Node:
    if sign == "-":
        return ("num", -value[1]) if value[0] == "num" else ("neg", value)
    return {r"\pm": ("pm", value), r"\mp": ("mp", value)}.get(sign, value)


def _times(product: Node, factor: Node) -> Node:
    return (*product, factor) if product[0] == "mul" else ("mul", product, factor)
