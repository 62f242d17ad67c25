"""Reads expressions: sums, products, powers, functions, numbers with their units, matrices."""

from __future__ import annotations

import re
from fractions import Fraction

from dcmdp_jax.answers import units
from dcmdp_jax.answers.cursor import Cursor, Node, counted
from dcmdp_jax.answers.tokens import number
from dcmdp_jax.answers.work import Unreadable, Work

DIVISIONS = 40  # signs `/` in an answer
PRIMARY = 20  # operations that a number, a name or a bracket takes to read

FUNCTIONS = (
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "exp",
    "log",
    "ln",
    "lg",
    "pi",
)
_OF_ANGLES = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in"}
_FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil"), "|": ("|", "abs")}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "vmatrix"}
_LETTERS = {
    rf"\{name}"
    for name in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "pi",
        "rho",
        "sigma",
        "varsigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
        "infty",
        "prime",
        "partial",
    ]
}
_MARKED = {
    r"\overline",
    r"\hat",
    r"\widehat",
    r"\vec",
    r"\overrightarrow",
    r"\tilde",
    r"\dot",
    r"\ddot",
}
SHAPES = {r"\angle", r"\triangle"}  # the letters behind them belong to a name
_FACTORS = {
    r"\frac",
    r"\binom",
    r"\sqrt",
    r"\surd",
    r"\begin",
    r"\emptyset",
    *_MARKED,
    *SHAPES,
    *_LETTERS,
    *(rf"\{name}" for name in FUNCTIONS),
}
JOINING = ("and", "or", "to", "mod")
MODULO = (r"\pmod", r"\bmod", r"\mod", "mod")
_BEHIND_UNIT = {
    ",",
    ";",
    ":",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "+",
    "-",
    "|",
    r"\}",
    r"\cup",
    r"\cap",
    r"\setminus",
    r"\pm",
    *RELATIONS,
}
_WORDS = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}


class Expressions(Cursor):
    def __init__(self, text: str, work: Work):
        super().__init__(text, work)
        self.divisions = 0

    def bracketed(self) -> Node:
        """What a bracket holds, a set, a tuple or an interval too: for the reader of
        whole answers."""
        raise NotImplementedError

    def quantity(self, value: Node, dollars: bool) -> Node:
        """A value with the words that follow it: its unit, or what makes another number of it."""
        words = self.said()
        unit = units.read(words)
        if unit is None and re.fullmatch("[A-Za-z ]+", words):
            return "qualified", value, words.casefold()  # `3 fifths`
        if unit is None:
            raise Unreadable("no unit")
        if dollars and unit.known:
            unit = units.read("dollars")
        if value[0] == "group":
            return (*value[:3], *(("quantity", item, unit) for item in value[3:]))
        return "quantity", value, unit

    def said(self) -> str:
        """What follows in words, up to a number, a comma, a bracket or an operator."""
        said = []
        while self.at < len(self.tokens):
            text = self.peek()
            if text in _BEHIND_UNIT or text in JOINING or self.kind() == "num" and self.spaced():
                break
            self.at += 1
            self.work.spend(PRIMARY)
            if text == ".":
                continue
            if text == r"\frac":
                text = f"{self.raw()} / {self.raw()}"
            said.append(text)
            if text == "^":
                braced = self.take("{")
                said.append(self.take("-") + self.take(self.peek()))
                if braced:
                    self.need("}")
        return " ".join(said).replace("^ ", "^")

    @counted
    def sum(self) -> Node:
        parts = [_signed(self.take("+", "-", r"\pm", r"\mp"), self.term())]
        while self.peek(1) != r"\{" and (sign := self.take("+", "-", r"\pm", r"\mp")):
            parts.append(_signed(sign, self.term()))
        return parts[0] if len(parts) == 1 else ("add", *parts)

    def term(self) -> Node:
        dollars = bool(self.take(r"\$"))
        value = self.product()
        return self.with_unit(value, dollars) if self.worded else value

    def product(self) -> Node:
        value = self.factor()
        while True:
            whole = self.kind(-1) == "num" and (value[-1] if value[0] == "mul" else value)
            if self.take("*"):
                value = _times(value, self.factor())
            elif self.take("/"):
                self.divided()
                value = _over(value, self.factor())
            elif self.starts_factor():
                if self.kind() == "num" and self.kind(-1) == "num":
                    raise Unreadable("two numbers beside each other")
                mixed = self.peek() == r"\frac"
                factor = self.factor()
                if mixed and whole and (part := _mixed(whole, factor)):
                    value = (*value[:-1], part) if value[0] == "mul" else part
                else:
                    value = _times(value, factor)
            else:
                return value

    def with_unit(self, value: Node, dollars: bool) -> Node:
        """A value with the per cent sign, the word for a number and the unit that follow it."""
        if self.take("%") or self.says("percent"):
            if self.kind() in ("word", "name") and self.peek() not in JOINING:
                if units.read(self.said()) is None:
                    raise Unreadable("no words behind a percentage")
            return "percent", value
        if self.kind() in ("word", "name") and (times := _WORDS.get(self.peek().removesuffix("s"))):
            self.at += 1
            many = "num", Fraction(times)
            value = ("num", value[1] * times) if value[0] == "num" else _times(value, many)
        worded = self.kind() in ("word", "name") and self.peek() not in JOINING
        if worded or self.peek() == r"\frac":
            value = self.quantity(value, dollars)
        elif dollars:
            value = "quantity", value, units.read("dollars")
        if self.kind() != "num" or value[0] != "quantity":
            return value
        rest = self.term()  # `6 ft 2 in`
        first = rest[1] if rest[0] == "add" else rest
        if not is_part_of(first, value):
            raise Unreadable("a number behind a unit")
        return "add", value, *(rest[1:] if rest[0] == "add" else (rest,))

    @counted
    def factor(self) -> Node:
        if sign := self.take("+", "-"):
            return _signed(sign, self.factor())
        return self.postfix(self.primary())

    def starts_factor(self) -> bool:
        """True if a factor follows that multiplies what stands before it."""
        kind = self.kind()
        text = self.peek()
        if kind == "name":
            if len(text) > 1 or not text.isascii():
                return text in FUNCTIONS
            return text in "ei" or not self.worded or not units.is_known(text)
        if kind == "word":
            if text in JOINING or text == "percent" or text.removesuffix("s") in _WORDS:
                return False
            closed = self.peek(-1) in (")", "}") and not self.spaced()
            return closed or not units.is_word(text, self.spaced())
        if text == "(" and self.peek(1) in MODULO:
            return False
        if text == r"\frac" and self.worded and self.peek(1) == "{" and self.kind(2) == "name":
            letter = self.peek(2)  # or a unit over a unit
            return len(letter) == 1 and not units.is_known(letter)
        return kind == "num" or text in ("(", "[", r"\lfloor", r"\lceil") or text in _FACTORS

    def postfix(self, value: Node) -> Node:
        """A value with the primes, the factorial and the exponent that follow it."""
        if value[0] == "var" and self.kind() in ("'", "("):
            value = "var", value[1] + self.primes() + self.place()
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

    def primes(self) -> str:
        start = self.at
        while self.kind() == "'":
            self.at += 1
        return "'" * (self.at - start)

    def place(self) -> str:
        """Takes the number in the brackets of `f(0)`, which is no product, and returns them."""
        if not self.number_in_brackets() or self.peek(-1) in ("e", "i", "pi", r"\pi"):
            return ""
        self.at += 3
        return f"({self.peek(-2)})"

    @counted
    def exponent(self) -> Node:
        if sign := self.take("+", "-"):
            return _signed(sign, self.exponent())
        if self.peek() == "{":
            return self.braced()
        return self.postfix(self.primary())

    def braced(self) -> Node:
        """`{...}`, or the single digit, letter or command that LaTeX takes in its place."""
        if self.take("{"):
            value = self.unworded(self.sum)
            self.need("}")
            return value
        if self.kind() == "num" and len(self.peek()) > 1 and not self.peek().isdecimal():
            raise Unreadable("half a decimal")
        if self.kind() in ("num", "word"):
            self.cut(1)
        return self.primary()

    @counted
    def primary(self) -> Node:
        self.work.spend(PRIMARY)
        kind = self.kind()
        text = self.peek()
        if kind == "num":
            return self.number()
        if kind == "word":
            return self.word()
        if kind == "name" and (text in FUNCTIONS or len(text) == 1):
            self.at += 1
            return self.called(text)
        if text in ("(", "[", r"\{", "{", r"\langle"):
            return self.bracketed()
        if text in _FENCES:
            close, name = _FENCES[self.take(text)]
            value = self.unworded(self.sum)
            self.need(close)
            if name == "abs" and value[0] == "matrix":
                return "det", *value[1:]
            return "fn", name, value
        if kind == "cmd":
            self.at += 1
            return self.command(text)
        raise Unreadable(f"{text!r}")

    def number(self) -> Node:
        text = self.take(self.peek())
        before = self.tokens[self.at - 2] if self.at > 1 else None
        if re.match(r"0\d\d", text) and before and before.text == "," and not self.spaced(-1):
            return "var", text  # of `1,000,2`: neither an item of a list nor thousands
        if "." in text and (repeated := self.repeated(text)):
            text, block = repeated
            places = len(text.partition(".")[2])
            return "num", number(text) + number(block) / ((10 ** len(block) - 1) * 10**places)
        if self.take("..."):
            return "var", f"{text}..."  # of `3.14...`, the digits that follow are not known
        value = number(text)
        if self.take("_"):
            return "var", f"{value}_{self.subscript()}"  # digits in a base are a name of their own
        over = self.kind() == "num" and self.peek(1) == "/" and self.kind(2) == "num"
        if over and value.denominator == 1:
            top = number(self.peek())
            bottom = number(self.peek(2))
            if 0 < top < bottom:
                self.at += 3
                return "num", value + top / bottom
        return "num", value

    def number_in_brackets(self) -> bool:
        """True if a bracket follows at once, with a number alone in it."""
        inside = self.kind(1) == "num" and self.peek(2) == ")"
        return self.peek() == "(" and inside and not self.spaced()

    def repeated(self, text: str) -> tuple[str, str] | None:
        r"""The decimal before what repeats, and what repeats: in `0.1\overline{6}`, `0.1(6)`,
        `0.1\dot{6}` and `0.1666...`; None where nothing does."""
        if self.number_in_brackets() and self.peek(1).isdecimal():
            self.at += 3
            return text, self.peek(-2)
        if self.peek() in (r"\overline", r"\dot") and "num" in (self.kind(1), self.kind(2)):
            mark = self.take(r"\overline", r"\dot")
            block = self.digits()
            if mark == r"\dot" and (self.kind() == "num" or self.peek() == r"\dot"):
                block += self.take(self.peek()) if self.kind() == "num" else ""
                self.need(r"\dot")
                block += self.digits()
            return text, block
        found = re.search(r"(\d)\1\1$|(\d{2,6})\2$", text.partition(".")[2])
        if found and self.take("..."):
            return text[: -len(found[0])], found[1] or found[2]
        return None

    def digits(self) -> str:
        """The digits in the braces that follow, or the next one."""
        if self.kind() == "num":
            self.cut(1)
        if not (block := self.raw()).isdecimal():
            raise Unreadable("wants digits")
        return block

    def word(self) -> Node:
        """A function by its plain name, else the first letter of a product of variables."""
        text = self.peek()
        name = next((name for name in FUNCTIONS if text.startswith(name)), text[0])
        self.cut(len(name))
        self.at += 1
        return self.called(name)

    def called(self, name: str) -> Node:
        """A function, a constant or a variable, whose name is taken."""
        if name == "pi":
            return "var", r"\pi"
        return self.function(name) if len(name) > 1 else self.variable(name)

    def variable(self, name: str) -> Node:
        if self.take("_"):
            name += "_" + self.subscript()
        return "var", name

    def subscript(self) -> str:
        """The raw text of what follows `_`."""
        if self.peek() == "{":
            return self.raw()
        if not self.peek():
            raise Unreadable("a subscript is missing")
        if self.kind() in ("num", "word"):
            self.cut(1)
        return self.take(self.peek())

    def command(self, name: str) -> Node:
        if name == r"\frac":
            self.divided()
            return _over(self.braced(), self.braced())
        if name == r"\binom":
            return "binom", self.braced(), self.braced()
        if name in (r"\sqrt", r"\surd"):
            degree = ("num", Fraction(2))
            if self.take("["):
                degree = self.unworded(self.sum)
                self.need("]")
            if name == r"\surd":
                return "root", degree, self.unworded(self.primary)
            return "root", degree, self.braced()
        if name == r"\begin":
            return self.matrix()
        if name[1:] in FUNCTIONS and name != r"\pi":
            return self.function(name[1:])
        if name == r"\emptyset":
            return ("set",)
        if name == r"\mathbb{R}":
            return self.reals()
        if name in _MARKED:
            return self.variable(f"{name}{{{self.raw()}}}")
        if name in SHAPES:
            letters = []
            while self.kind() in ("word", "name", "'") or self.peek() in _LETTERS:
                letters.append(self.take(self.peek()))
                if self.take("_"):
                    letters.append("_" + self.subscript())
            return "var", name + "".join(letters)
        if name in _LETTERS or name.startswith(r"\mathbb"):
            return self.variable(name)
        raise Unreadable(name)

    def reals(self) -> Node:
        """The real numbers, the positive or the negative ones, or a space of them."""
        zero = ("num", Fraction(0))
        infinity = ("var", r"\infty")
        if self.take("_"):
            bound = self.subscript()
            if bound in (">0", r"\ge0"):
                return "group", "(" if bound == ">0" else "[", ")", zero, infinity
            if bound in ("<0", r"\le0"):
                return "group", "(", ")" if bound == "<0" else "]", ("neg", infinity), zero
            raise Unreadable("unknown numbers")
        if not self.take("^"):
            return ("reals",)
        power = self.raw()
        if power == "+":
            return "group", "(", ")", zero, infinity
        if power == "-":
            return "group", "(", ")", ("neg", infinity), zero
        return "var", rf"\mathbb{{R}}^{power}"

    def function(self, name: str) -> Node:
        base = power = None
        if name == "log" and self.take("_"):
            base = self.braced()
        if name != "sqrt" and self.take("^"):
            power = self.exponent()
        if power == ("num", Fraction(-1)) and name in _INVERSE:
            name = _INVERSE[name]
            power = None
        value = self.argument(name in _OF_ANGLES)
        if name == "sqrt":
            value = "root", ("num", Fraction(2)), value
        elif name == "lg" or base is not None:
            value = "div", ("fn", "ln", value), ("fn", "ln", base or ("num", Fraction(10)))
        else:
            value = "fn", "ln" if name == "log" else name, value
        return value if power is None else ("pow", value, power)

    def argument(self, angle: bool) -> Node:
        """A bracket, or the product that follows up to an operator or another function; of an
        angle, in radians."""
        if self.peek() in ("(", "[", "{"):
            before = self.worded
            self.worded = angle
            value = self.bracketed()
            self.worded = before
        else:
            value = self.postfix(self.primary())
            while self.starts_factor() and self.peek().lstrip("\\") not in FUNCTIONS[:-1]:
                value = _times(value, self.postfix(self.primary()))
        if angle and self.says("degrees"):
            value = "quantity", value, units.read("degrees")
        return _radians(value) if angle else value

    def matrix(self) -> Node:
        name = self.raw()
        if name not in _MATRICES:
            raise Unreadable(name)
        if name == "array":
            self.raw()  # how its columns are set
        rows = [[self.unworded(self.sum)]]
        while not self.take(r"\end"):
            if self.need("&", r"\\") == "&":
                rows[-1].append(self.unworded(self.sum))
            elif self.peek() != r"\end":
                rows.append([self.unworded(self.sum)])
        if self.raw() != name:
            raise Unreadable("one matrix ends in another")
        return "det" if name == "vmatrix" else "matrix", *map(tuple, rows)

    def divided(self) -> None:
        """Counts a division. Raises Unreadable where there are too many."""
        self.divisions += 1
        if self.divisions > DIVISIONS:
            raise Unreadable("too many divisions")


def _mixed(whole: Node, fraction: Node) -> Node | None:
    """The mixed number of a whole one and a fraction, None where they make none."""
    if whole[0] != "num" or whole[1].denominator > 1 or fraction[0] != "div":
        return None
    top, bottom = fraction[1:]
    if not top[0] == bottom[0] == "num" or not 0 < top[1] < bottom[1]:
        return None
    part = top[1] / bottom[1]
    return "num", whole[1] - part if whole[1] < 0 else whole[1] + part


def is_part_of(smaller: Node, larger: Node) -> bool:
    """True if both are quantities of one kind, and the first is in a smaller unit."""
    if not smaller[0] == larger[0] == "quantity" or not smaller[2].known:
        return False
    return smaller[2].powers == larger[2].powers and smaller[2].factor < larger[2].factor


def _signed(sign: str, value: Node) -> Node:
    if sign == "-":
        if value[0] == "matrix":
            return _times(("num", Fraction(-1)), value)
        if value[0] in ("percent", "quantity"):
            return value[0], _signed(sign, value[1]), *value[2:]
        return ("num", -value[1]) if value[0] == "num" else ("neg", value)
    return {r"\pm": ("pm", value), r"\mp": ("mp", value)}.get(sign, value)


def _times(product: Node, factor: Node) -> Node:
    """A product; one with a matrix, cell by cell."""
    for matrix, scale in ((factor, product), (product, factor)):
        if matrix[0] == "matrix" and scale[0] not in ("matrix", "group", "set"):
            return "matrix", *(tuple(_times(scale, cell) for cell in row) for row in matrix[1:])
    return (*product, factor) if product[0] == "mul" else ("mul", product, factor)


def _over(value: Node, divisor: Node) -> Node:
    if value[0] == "matrix":
        return "matrix", *(tuple(("div", cell, divisor) for cell in row) for row in value[1:])
    return "div", value, divisor


def _radians(node: Node) -> Node:
    """An angle as the functions take it."""
    if node[0] == "quantity" and node[2].powers == (("degree", 1),):
        if node[2].pi:
            return node[1]
        return "div", ("mul", node[1], ("var", r"\pi")), ("num", Fraction(180))
    if node[0] in ("add", "neg", "mul", "div"):
        return node[0], *map(_radians, node[1:])
    return node
