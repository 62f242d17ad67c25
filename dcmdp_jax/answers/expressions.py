"""Reads expressions: sums, products, powers, functions, numbers with their units, matrices."""

from __future__ import annotations

import re
from fractions import Fraction

from dcmdp_jax.answers import units
from dcmdp_jax.answers.cursor import Cursor, Node, bounded_depth
from dcmdp_jax.answers.nodes import (
    divide,
    in_radians,
    is_part_of,
    mixed_number,
    multiply,
    with_sign,
)
from dcmdp_jax.answers.tokens import number
from dcmdp_jax.answers.work import Unreadable, Work

MAX_DIVISIONS = 40  # quotients in an answer
FACTOR_COST = 20  # operations to read a number, a name or a bracket

FUNCTIONS = tuple(
    "arcsin arccos arctan sinh cosh tanh sqrt sin cos tan cot sec csc exp log ln lg pi".split()
)
_OF_ANGLES = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in"}
_FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil"), "|": ("|", "abs")}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "vmatrix"}
_LETTERS = {
    rf"\{name}"
    for name in """
        alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma
        varsigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi
        Omega ell hbar infty prime partial
    """.split()
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
SHAPES = {r"\angle", r"\triangle"}  # the letters after them belong to a name
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
CONJUNCTIONS = ("and", "or", "to", "mod")
MODULO = (r"\pmod", r"\bmod", r"\mod", "mod")
_ENDS_UNIT = {
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
_NUMBER_WORDS = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}


class Expressions(Cursor):
    """Reads expressions by recursive descent.

    Each reading method starts at the current position, moves past what it reads, and returns its
    tree (see `read` for the nodes). It raises Unreadable on what it cannot read.
    """

    def __init__(self, text: str, work: Work):
        super().__init__(text, work)
        self.divisions = 0

    def bracketed(self) -> Node:
        """Reads what brackets contain: an expression, a set, a tuple or an interval. Defined in
        `read`.
        """
        raise NotImplementedError

    def quantity(self, value: Node, dollars: bool) -> Node:
        """Reads the words after a value: its unit, or words that make another number of it."""
        words = self.unit_words()
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

    def unit_words(self) -> str:
        """Takes words up to a number, a comma, a bracket or an operator, and returns them as one
        text.
        """
        words = []
        while self.position < len(self.tokens):
            text = self.peek()
            if text in _ENDS_UNIT or text in CONJUNCTIONS or self.kind() == "num" and self.spaced():
                break
            self.position += 1
            self.work.spend(FACTOR_COST)
            if text == ".":
                continue
            if text == r"\frac":
                text = f"{self.raw()} / {self.raw()}"
            words.append(text)
            if text == "^":
                braced = self.take("{")
                words.append(self.take("-") + self.take(self.peek()))
                if braced:
                    self.expect("}")
        return " ".join(words).replace("^ ", "^")

    @bounded_depth
    def sum(self) -> Node:
        """Reads terms joined by signs."""
        parts = [with_sign(self.take("+", "-", r"\pm", r"\mp"), self.term())]
        while self.peek(1) != r"\{" and (sign := self.take("+", "-", r"\pm", r"\mp")):
            parts.append(with_sign(sign, self.term()))
        return parts[0] if len(parts) == 1 else ("add", *parts)

    def term(self) -> Node:
        """Reads a product, and the dollar sign and unit of it where units are allowed."""
        dollars = bool(self.take(r"\$"))
        value = self.product()
        return self.with_unit(value, dollars) if self.units_allowed else value

    def product(self) -> Node:
        r"""Reads factors, with or without signs; `2 \frac{1}{2}` is a mixed number."""
        value = self.factor()
        while True:
            integer = self.kind(-1) == "num" and (value[-1] if value[0] == "mul" else value)
            if self.take("*"):
                value = multiply(value, self.factor())
            elif self.take("/"):
                self.count_division()
                value = divide(value, self.factor())
            elif self.starts_factor():
                if self.kind() == "num" and self.kind(-1) == "num":
                    raise Unreadable("two numbers beside each other")
                mixed = self.peek() == r"\frac"
                factor = self.factor()
                if mixed and integer and (part := mixed_number(integer, factor)):
                    value = (*value[:-1], part) if value[0] == "mul" else part
                else:
                    value = multiply(value, factor)
            else:
                return value

    def with_unit(self, value: Node, dollars: bool) -> Node:
        """Reads what may follow a value: a percent sign, a word such as `million`, and a unit."""
        if self.take("%") or self.take_word("percent"):
            worded = self.kind() in ("word", "name") and self.peek() not in CONJUNCTIONS
            if worded and units.read(self.unit_words()) is None:
                raise Unreadable("words after a percentage")
            return "percent", value
        if self.kind() in ("word", "name") and (
            times := _NUMBER_WORDS.get(self.peek().removesuffix("s"))
        ):
            self.position += 1
            many = "num", Fraction(times)
            value = ("num", value[1] * times) if value[0] == "num" else multiply(value, many)
        worded = self.kind() in ("word", "name") and self.peek() not in CONJUNCTIONS
        if worded or self.peek() == r"\frac":
            value = self.quantity(value, dollars)
        elif dollars:
            value = "quantity", value, units.read("dollars")
        if self.kind() != "num" or value[0] != "quantity":
            return value
        rest = self.term()  # `6 ft 2 in`
        first = rest[1] if rest[0] == "add" else rest
        if not is_part_of(first, value):
            raise Unreadable("a number after a unit")
        return "add", value, *(rest[1:] if rest[0] == "add" else (rest,))

    @bounded_depth
    def factor(self) -> Node:
        """Reads a factor with its signs and exponent."""
        if sign := self.take("+", "-"):
            return with_sign(sign, self.factor())
        return self.postfix(self.primary())

    def starts_factor(self) -> bool:
        """Returns True if the next token starts a factor of the product before it."""
        kind = self.kind()
        text = self.peek()
        if kind == "name":
            if len(text) > 1 or not text.isascii():
                return text in FUNCTIONS
            return text in "ei" or not self.units_allowed or not units.is_known(text)
        if kind == "word":
            if text in CONJUNCTIONS or text == "percent" or text.removesuffix("s") in _NUMBER_WORDS:
                return False
            closed = self.peek(-1) in (")", "}") and not self.spaced()
            return closed or not units.is_word(text, self.spaced())
        if text == "(" and self.peek(1) in MODULO:
            return False
        if (
            text == r"\frac"
            and self.units_allowed
            and self.peek(1) == "{"
            and self.kind(2) == "name"
        ):
            letter = self.peek(2)  # the fraction may be a unit over a unit
            return len(letter) == 1 and not units.is_known(letter)
        return kind == "num" or text in ("(", "[", r"\lfloor", r"\lceil") or text in _FACTORS

    def postfix(self, value: Node) -> Node:
        """Reads the primes, the factorial and the exponent that follow a value."""
        if value[0] == "var" and self.kind() in ("'", "("):
            value = "var", value[1] + self.primes() + self.numeric_argument()
        if self.take("!"):
            value = "fn", "factorial", value
        if self.take("^"):
            exponent = self.exponent()
            prime = exponent == ("var", r"\prime") and value[0] == "var"
            value = ("var", value[1] + "'") if prime else ("pow", value, exponent)
        if self.take("!"):
            value = "fn", "factorial", value
        if self.peek() in ("!", "^"):
            raise Unreadable("two factorials or exponents in a row")
        return value

    def primes(self) -> str:
        """Takes the primes of `f'` and returns them."""
        start = self.position
        while self.kind() == "'":
            self.position += 1
        return "'" * (self.position - start)

    def numeric_argument(self) -> str:
        """Takes the bracketed number of `f(0)`, which is no factor, and returns it with its
        brackets.
        """
        if not self.is_bracketed_number() or self.peek(-1) in ("e", "i", "pi", r"\pi"):
            return ""
        self.position += 3
        return f"({self.peek(-2)})"

    @bounded_depth
    def exponent(self) -> Node:
        """Reads what follows `^`."""
        if sign := self.take("+", "-"):
            return with_sign(sign, self.exponent())
        if self.peek() == "{":
            return self.braced()
        return self.postfix(self.primary())

    def braced(self) -> Node:
        """Reads `{...}`, or the single digit, letter or command that LaTeX takes in its place."""
        if self.take("{"):
            value = self.without_units(self.sum)
            self.expect("}")
            return value
        if self.kind() == "num" and len(self.peek()) > 1 and not self.peek().isdecimal():
            raise Unreadable("half a decimal")
        if self.kind() in ("num", "word"):
            self.split_token(1)
        return self.primary()

    @bounded_depth
    def primary(self) -> Node:
        """Reads a number, a name, a function, or what brackets or fences contain."""
        self.work.spend(FACTOR_COST)
        kind = self.kind()
        text = self.peek()
        if kind == "num":
            return self.number()
        if kind == "word":
            return self.word()
        if kind == "name" and (text in FUNCTIONS or len(text) == 1):
            self.position += 1
            return self.named_factor(text)
        if text in ("(", "[", r"\{", "{", r"\langle"):
            return self.bracketed()
        if text in _FENCES:
            close, name = _FENCES[self.take(text)]
            value = self.without_units(self.sum)
            self.expect(close)
            if name == "abs" and value[0] == "matrix":
                return "det", *value[1:]
            return "fn", name, value
        if kind == "cmd":
            self.position += 1
            return self.command(text)
        raise Unreadable(f"{text!r}")

    def number(self) -> Node:
        """Reads a number: an integer, a decimal, one that repeats, a mixed number, or digits in a
        base.
        """
        text = self.take(self.peek())
        before = self.tokens[self.position - 2] if self.position > 1 else None
        if re.match(r"0\d\d", text) and before and before.text == "," and not self.spaced(-1):
            return "var", text  # in `1,000,2`: neither an item nor thousands
        if "." in text and (repeated := self.repeating_decimal(text)):
            text, block = repeated
            decimals = len(text.partition(".")[2])
            return "num", number(text) + number(block) / ((10 ** len(block) - 1) * 10**decimals)
        if self.take("..."):
            return "var", f"{text}..."  # `3.14...`: the remaining digits are unknown
        value = number(text)
        if self.take("_"):
            return "var", f"{value}_{self.subscript()}"  # digits in a base are a name
        over = self.kind() == "num" and self.peek(1) == "/" and self.kind(2) == "num"
        if over and value.denominator == 1:
            top = number(self.peek())
            bottom = number(self.peek(2))
            if 0 < top < bottom:
                self.position += 3
                return "num", value + top / bottom
        return "num", value

    def is_bracketed_number(self) -> bool:
        """Returns True if a bracket with a single number in it follows without a space."""
        inside = self.kind(1) == "num" and self.peek(2) == ")"
        return self.peek() == "(" and inside and not self.spaced()

    def repeating_decimal(self, text: str) -> tuple[str, str] | None:
        r"""Reads the rest of a repeating decimal: `0.1\overline{6}`, `0.1(6)`, `0.1\dot{6}`,
        `0.1666...`.

        Returns the decimal before the repeating digits, and those; None if nothing repeats.
        """
        if self.is_bracketed_number() and self.peek(1).isdecimal():
            self.position += 3
            return text, self.peek(-2)
        if self.peek() in (r"\overline", r"\dot") and "num" in (self.kind(1), self.kind(2)):
            mark = self.take(r"\overline", r"\dot")
            block = self.digits()
            if mark == r"\dot" and (self.kind() == "num" or self.peek() == r"\dot"):
                block += self.take(self.peek()) if self.kind() == "num" else ""
                self.expect(r"\dot")
                block += self.digits()
            return text, block
        repeats = re.search(r"(\d)\1\1$|(\d{2,6})\2$", text.partition(".")[2])
        if repeats and self.take("..."):
            return text[: -len(repeats[0])], repeats[1] or repeats[2]
        return None

    def digits(self) -> str:
        """Takes the digits in the braces that follow, or the next digit."""
        if self.kind() == "num":
            self.split_token(1)
        if not (block := self.raw()).isdecimal():
            raise Unreadable("expects digits")
        return block

    def word(self) -> Node:
        """Reads a function by its plain name, else the first letter of a product of variables."""
        text = self.peek()
        name = next((name for name in FUNCTIONS if text.startswith(name)), text[0])
        self.split_token(len(name))
        self.position += 1
        return self.named_factor(name)

    def named_factor(self, name: str) -> Node:
        """Returns the function, constant or variable whose name was taken."""
        if name == "pi":
            return "var", r"\pi"
        return self.function(name) if len(name) > 1 else self.variable(name)

    def variable(self, name: str) -> Node:
        """Reads the subscript of a variable whose name was taken."""
        if self.take("_"):
            name += "_" + self.subscript()
        return "var", name

    def subscript(self) -> str:
        """Takes what follows `_` and returns its text."""
        if self.peek() == "{":
            return self.raw()
        if not self.peek():
            raise Unreadable("a subscript is missing")
        if self.kind() in ("num", "word"):
            self.split_token(1)
        return self.take(self.peek())

    def command(self, name: str) -> Node:
        """Reads the arguments of a LaTeX command whose name was taken."""
        if name == r"\frac":
            self.count_division()
            return divide(self.braced(), self.braced())
        if name == r"\binom":
            return "binom", self.braced(), self.braced()
        if name in (r"\sqrt", r"\surd"):
            degree = ("num", Fraction(2))
            if self.take("["):
                degree = self.without_units(self.sum)
                self.expect("]")
            if name == r"\surd":
                return "root", degree, self.without_units(self.primary)
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
        r"""Reads what follows `\mathbb{R}`: all real numbers, the positive or negative ones, or a
        space.
        """
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
        """Reads base, power and argument of a function whose name was taken."""
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
        """Reads an argument: brackets, or the product up to an operator or another function.

        The argument of a function of angles is returned in radians.
        """
        if self.peek() in ("(", "[", "{"):
            before = self.units_allowed
            self.units_allowed = angle
            value = self.bracketed()
            self.units_allowed = before
        else:
            value = self.postfix(self.primary())
            while self.starts_factor() and self.peek().lstrip("\\") not in FUNCTIONS[:-1]:
                value = multiply(value, self.postfix(self.primary()))
        if angle and self.take_word("degrees"):
            value = "quantity", value, units.read("degrees")
        return in_radians(value) if angle else value

    def matrix(self) -> Node:
        r"""Reads a matrix or a determinant, whose `\begin` was taken."""
        name = self.raw()
        if name not in _MATRICES:
            raise Unreadable(name)
        if name == "array":
            self.raw()  # how its columns are set
        rows = [[self.without_units(self.sum)]]
        while not self.take(r"\end"):
            if self.expect("&", r"\\") == "&":
                rows[-1].append(self.without_units(self.sum))
            elif self.peek() != r"\end":
                rows.append([self.without_units(self.sum)])
        if self.raw() != name:
            raise Unreadable("one matrix ends in another")
        return "det" if name == "vmatrix" else "matrix", *map(tuple, rows)

    def count_division(self) -> None:
        """Counts a division. Raises Unreadable if there are more than MAX_DIVISIONS."""
        self.divisions += 1
        if self.divisions > MAX_DIVISIONS:
            raise Unreadable("too many divisions")
