r"""Reads an answer in LaTeX, or as people type it, into a tree; nothing is computed.

A recursive descent over at most `LONGEST` characters, `DEEPEST` calls deep, that never goes back. Nodes are tuples, their
kind first:

    ("num", Fraction)  ("var", name)  ("add", *parts)  ("mul", *parts)  ("div", a, b)  ("pow", a, b)  ("root", n, a)
    ("neg", a)  ("pm", a) for +-a  ("mp", a) for -+a  ("fn", name, a)  ("binom", a, b)
    ("list", *items)  ("set", *items)  ("group", open, close, *items): a tuple or an interval
    ("union", *pieces)  ("without", set, set)  ("reals",)  ("such", name, condition): a set by what holds for its members
    ("both", *conditions)  ("either", *conditions): joined by `and`, by `or`
    ("matrix", *rows of cells)  ("det", *rows of cells)  ("ratio", *parts)  ("clock", *parts): a ratio or a time of day
    ("rel", operator, left, right): also a chain of two inequalities, as in ("rel", "< <=", left, right, middle)
    ("applied", name, *arguments): the left side of `f(x) = 2x`, its arguments as they are written
    ("quantity", a, units.Unit)  ("qualified", a, words) as in `3 fifths`  ("percent", a)  ("text", words)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from dcmdp_jax.answers import units
from dcmdp_jax.answers.tokens import Token, number, split
from dcmdp_jax.answers.work import Unreadable, Work

DEEPEST = 100  # calls of the reader's own; three or four for a bracket in a bracket
DIVISIONS = 40  # signs `/` in an answer
PRIMARY = 20  # operations that a number, a name or a bracket takes to read

Node = tuple

_FUNCTIONS = ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "exp",
              "log", "ln", "lg", "pi")
_OF_ANGLES = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in"}
_FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil"), "|": ("|", "abs")}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "vmatrix"}
_LETTERS = {rf"\{name}" for name in (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma varsigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty prime partial").split()}
_MARKED = {r"\overline", r"\hat", r"\widehat", r"\vec", r"\overrightarrow", r"\tilde", r"\dot", r"\ddot"}
_SHAPES = {r"\angle", r"\triangle"}  # the letters behind them belong to a name
_FACTORS = {r"\frac", r"\binom", r"\sqrt", r"\surd", r"\begin", r"\emptyset", *_MARKED, *_SHAPES, *_LETTERS,
            *(rf"\{name}" for name in _FUNCTIONS)}
_JOINING = ("and", "or", "to")
_BEHIND_UNIT = {",", ";", ":", "(", ")", "[", "]", "{", "}", "+", "-", "|", r"\}", r"\cup", r"\setminus", r"\pm",
                *_RELATIONS}
_WORDS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_DEFINED = re.compile(r"(\\?[A-Za-z]+(?:_\w|_\{\w+\})?'*)\(([\w\\,|;]+)\)")
_ALL_REALS = re.compile(r"(?:x is )?(?:all|any) real(?: number|s| numbers| values)?"
                        r"(?: (except|except for|but|but not|other than|excluding|besides))?(?: x)?")


def read(text: str, work: Work | None = None) -> Node:
    """Returns the tree of an answer. Raises Unreadable where it is of no known form or takes too much work."""
    return _Reader(text, work or Work()).answer()


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
    def __init__(self, text: str, work: Work):
        self.work = work
        work.spend(len(text))
        self.tokens = split(text)
        work.spend(5 * len(self.tokens))
        self.at = 0
        self.depth = 0
        self.divisions = 0
        self.worded = True  # units may follow a value here

    # --- tokens

    def peek(self, ahead: int = 0) -> str:
        """The next token's text; "" at the end."""
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if 0 <= self.at + ahead < len(self.tokens) else ""

    def spaced(self, ahead: int = 0) -> bool:
        return self.tokens[self.at + ahead].spaced

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

    def says(self, *words: str) -> str:
        """Takes one of these words, also where it is set upright."""
        return self.take(*words) if self.kind() in ("word", "name") else ""

    def separated(self) -> str:
        """Takes a comma, a semicolon, `and` or `or`, and returns it; the word alone where both stand there."""
        if word := self.says("and", "or"):
            return word
        if not (sign := self.take(",", ";")):
            return ""
        return self.says("and", "or") or sign

    # --- answers

    def answer(self) -> Node:
        found = self.items()
        if self.at < len(self.tokens):
            raise Unreadable("something is left over")
        return _joined(*found)

    @_counted
    def items(self) -> tuple[list[Node], list[str]]:
        """Elements, and what stands between them."""
        items = [self.element()]
        between = []
        while sign := self.separated():
            between.append(sign)
            items.append(self.element())
        return items, between

    def element(self) -> Node:
        self.label()
        if (word := self.words()) is not None:
            return word
        if self.peek() in _RELATIONS:
            left = ("var", "")  # `= 5` and `> 5`, of what was asked for
        else:
            left = self.named() or self.side()
        if self.peek() not in _RELATIONS:
            return left
        operator = _RELATIONS[self.take(*_RELATIONS)]
        right = self.side()
        if operator in ("!=", "in") or self.peek() not in _RELATIONS:
            return "rel", operator, left, right
        if operator == "=":
            while self.take("="):
                right = self.side()
            if self.peek() in _RELATIONS:
                raise Unreadable("relations do not chain")
            return "rel", "=", left, right
        second = _RELATIONS[self.take(*_RELATIONS)]
        end = self.side()
        if operator[0] != second[0] or self.peek() in _RELATIONS:
            raise Unreadable("relations do not chain")
        return "rel", f"{operator} {second}", left, end, right

    def side(self) -> Node:
        """What may stand beside a relation: an expression, a set or a ratio."""
        value = self.union()
        if self.take(":"):
            return self.ratio(value)
        return ("ratio", value, self.union()) if self.says("to") else value

    def words(self) -> Node | None:
        """An element of words alone, such as `\\text{Evelyn}` or `even`, or `all real numbers except` some."""
        end = self.at
        while end < len(self.tokens) and self.kind(end - self.at) in ("word", "name") and \
                self.tokens[end].text not in _JOINING:
            end += 1
        run = self.tokens[self.at:end]
        said = " ".join(token.text for token in run).casefold()
        if reals := _ALL_REALS.fullmatch(said):
            self.at = end
            if not reals[1]:
                return ("reals",)
            self.take("=")
            return "without", ("reals",), ("set", *self.items()[0])
        follows = self.tokens[end].text if end < len(self.tokens) else ""
        if not run or follows not in ("", ",", ";", "and", "or", ")", r"\}"):
            return None
        if len(run) == 1 and len(said) == 1:
            return None  # a variable
        upright = any(token.kind == "name" for token in run)
        functions = any(token.text.startswith(name) for name in _FUNCTIONS for token in run)
        if not upright and (len(said.replace(" ", "")) < 4 or functions) or said in _FUNCTIONS:
            return None
        self.at = end
        return "text", said.replace(" ", "")

    def label(self) -> None:
        """Takes words with a colon before an element, as in `Answer: 5`."""
        end = self.at
        while end < len(self.tokens) and self.tokens[end].kind in ("word", "name"):
            end += 1
        words = "".join(token.text for token in self.tokens[self.at:end])
        colon = end < len(self.tokens) and self.tokens[end].text == ":"
        if colon and len(words) > 3 and not words.isupper() and not words.startswith(_FUNCTIONS):
            self.at = end + 1

    def named(self) -> Node | None:
        """The left side of `f(x) = 2x` and of `\\text{Area of } ABC = 5`, which is a name as a whole."""
        if self.kind() not in ("word", "name", "cmd"):
            return None
        end = self.at
        depth = 0
        while end < len(self.tokens) and self.tokens[end].text not in _RELATIONS and depth >= 0:
            depth += {"(": 1, ")": -1}.get(self.tokens[end].text, 0)
            if self.tokens[end].text in (",", ";") and not depth:
                break
            end += 1
        self.work.spend(end - self.at)
        if end == len(self.tokens) or self.tokens[end].text != "=":
            return None
        run = self.tokens[self.at:end]
        spelled = "".join(token.text for token in run)
        defined = _DEFINED.fullmatch(spelled)
        if defined and defined[1].lstrip("\\") not in _FUNCTIONS:
            self.at = end
            return "applied", defined[1], *re.split("[,;]", defined[2])
        first = run[0]
        if first.kind == "name" and len(first.text) > 1 and first.text not in _FUNCTIONS and \
                all(token.kind in ("name", "word") or token.text in _SHAPES for token in run):
            self.at = end
            return "var", spelled.casefold()
        return None

    def union(self) -> Node:
        pieces = [self.difference()]
        while self.take(r"\cup"):
            pieces.append(self.difference())
        return pieces[0] if len(pieces) == 1 else ("union", *pieces)

    def difference(self) -> Node:
        value = self.sum()
        if self.take(r"\setminus", "-"):  # a sum ends at a minus sign before a set
            return "without", value, self.sum()
        return value

    def ratio(self, first: Node) -> Node:
        """`3:2:1`, whose first colon is taken."""
        start = self.at - 2
        parts = [first, self.part()]
        while self.take(":"):
            parts.append(self.part())
        spelled = "".join(token.text for token in self.tokens[start:self.at])
        clock = first[0] == "num" and re.fullmatch(r"(?:[01]?\d|2[0-4])(:[0-5]\d)+", spelled)
        value = ("clock" if clock else "ratio", *parts)
        return self.quantity(value, False) if self.kind() in ("word", "name") else value

    def part(self) -> Node:
        """A part of a ratio behind the colon; what follows a number of two digits, such as `pm`, belongs to the whole."""
        return self.number() if re.fullmatch(r"\d\d", self.peek()) else self.sum()

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
            if text in _BEHIND_UNIT or text in _JOINING or self.kind() == "num" and self.spaced():
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

    # --- expressions

    @_counted
    def sum(self) -> Node:
        parts = [_signed(self.take("+", "-", r"\pm", r"\mp"), self.term())]
        while not (self.peek() == "-" and self.peek(1) == r"\{") and (sign := self.take("+", "-", r"\pm", r"\mp")):
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
            return "percent", value
        if self.kind() in ("word", "name") and (times := _WORDS.get(self.peek().removesuffix("s"))):
            self.at += 1
            value = ("num", value[1] * times) if value[0] == "num" else _times(value, ("num", Fraction(times)))
        if self.kind() in ("word", "name") and self.peek() not in _JOINING or self.peek() == r"\frac":
            value = self.quantity(value, dollars)
        elif dollars:
            value = "quantity", value, units.read("dollars")
        if self.kind() != "num" or value[0] != "quantity":
            return value
        unit = value[2]
        rest = self.term()  # `6 ft 2 in`
        first = rest[1] if rest[0] == "add" else rest
        if first[0] != "quantity" or not unit.known or first[2].powers != unit.powers or first[2].factor >= unit.factor:
            raise Unreadable("a number behind a unit")
        return "add", value, *(rest[1:] if rest[0] == "add" else (rest,))

    @_counted
    def factor(self) -> Node:
        if sign := self.take("+", "-"):
            return _signed(sign, self.factor())
        return self.postfix(self.primary())

    def starts_factor(self) -> bool:
        """True if a factor follows that multiplies what stands before it."""
        kind = self.kind()
        text = self.peek()
        if kind == "name":
            return text in _FUNCTIONS or len(text) == 1 and (text in "ei" or not self.worded or not units.read(text).known)
        if kind == "word":
            if text in _JOINING or text == "percent" or text.removesuffix("s") in _WORDS:
                return False
            closed = self.peek(-1) in (")", "}") and not self.spaced()
            return closed or not units.is_word(text, self.spaced())
        if text == r"\frac" and self.worded and self.peek(1) == "{" and self.kind(2) == "name":
            return len(self.peek(2)) == 1 and not units.read(self.peek(2)).known  # else a unit over a unit
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
        lone = self.peek() == "(" and not self.spaced() and self.kind(1) == "num" and self.peek(2) == ")"
        if not lone or self.peek(-1) in ("e", "i", "pi", r"\pi"):
            return ""
        self.at += 3
        return f"({self.peek(-2)})"

    @_counted
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

    def unworded(self, method: Callable[[], Node]) -> Node:
        """What `method` reads, where no unit may follow a value."""
        before, self.worded = self.worded, False
        value = method()
        self.worded = before
        return value

    def cut(self, length: int) -> None:
        """Makes two tokens of the next one, if it is longer than `length` characters."""
        kind, text, spaced = self.tokens[self.at]
        if len(text) > length:
            self.tokens[self.at:self.at + 1] = [Token(kind, text[:length], spaced), Token(kind, text[length:], False)]

    @_counted
    def primary(self) -> Node:
        self.work.spend(PRIMARY)
        kind = self.kind()
        text = self.peek()
        if kind == "num":
            return self.number()
        if kind == "word":
            return self.word()
        if kind == "name" and (text in _FUNCTIONS or len(text) == 1):
            self.at += 1
            return self.called(text)
        if text in ("(", "[", r"\{", "{", r"\langle"):
            return self.bracketed()
        if text in _FENCES:
            close, name = _FENCES[self.take(text)]
            value = self.unworded(self.sum)
            self.need(close)
            return ("det", *value[1:]) if name == "abs" and value[0] == "matrix" else ("fn", name, value)
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
            return "num", number(text) + number(block) / ((10 ** len(block) - 1) * 10 ** places)
        if self.take("..."):
            return "var", f"{text}..."  # of `3.14...`, the digits that follow are not known
        value = number(text)
        if self.take("_"):
            return "var", f"{value}_{self.subscript()}"  # digits in a base are a name of their own
        if value.denominator == 1 and self.kind() == "num" and self.peek(1) == "/" and self.kind(2) == "num":
            top, bottom = number(self.peek()), number(self.peek(2))
            if 0 < top < bottom:
                self.at += 3
                return "num", value + top / bottom
        return "num", value

    def repeated(self, text: str) -> tuple[str, str] | None:
        r"""The decimal before what repeats, and what repeats: in `0.1\overline{6}`, `0.1(6)`, `0.1\dot{6}` and `0.1666...`;
        None where nothing does."""
        if self.peek() == "(" and self.peek(1).isdecimal() and self.peek(2) == ")" and not self.spaced():
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
            return text[:-len(found[0])], found[1] or found[2]
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
        name = next((name for name in _FUNCTIONS if text.startswith(name)), text[0])
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

    def raw(self) -> str:
        """The text in the braces that follow, or of the next token, as it is written."""
        if not self.take("{"):
            return self.take(self.peek())
        depth = 1
        start = self.at
        while depth:
            if self.at >= len(self.tokens):
                raise Unreadable("braces do not end")
            depth += {"{": 1, "}": -1}.get(self.peek(), 0)
            self.at += 1
        return "".join(token.text for token in self.tokens[start:self.at - 1])

    def bracketed(self) -> Node:
        opening = self.take("(", "[", r"\{", "{", r"\langle")
        if opening == "{":
            value = self.sum()
            self.need("}")
            return value
        if opening == r"\{":
            return self.braces()
        items, between = self.items()
        closing = self.need(")", "]", r"\rangle")
        if (opening == r"\langle") != (closing == r"\rangle") or set(between) - {",", ";"}:
            raise Unreadable("brackets do not match")
        if opening == r"\langle":
            return "group", "(", ")", *items
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return items[0]
        return "group", opening, closing, *items

    def braces(self) -> Node:
        r"""A set, whose `\{` is taken."""
        if self.take(r"\}"):
            return "set",
        if self.kind() == "word" and len(self.peek()) == 1 and self.peek(1) in (r"\mid", "|", ":", r"\in"):
            name = self.take(self.peek())
            domain = self.union() if self.take(r"\in") else ("reals",)
            self.need(r"\mid", "|", ":")
            conditions = _joined(*self.items())
            self.need(r"\}")
            return "such", name, ("both", ("rel", "in", ("var", name), domain), conditions)
        items = self.items()[0]
        self.need(r"\}")
        return "set", *items

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
            return "root", degree, self.braced() if name == r"\sqrt" else self.unworded(self.primary)
        if name == r"\begin":
            return self.matrix()
        if name[1:] in _FUNCTIONS and name != r"\pi":
            return self.function(name[1:])
        if name == r"\emptyset":
            return "set",
        if name == r"\mathbb{R}":
            return "reals",
        if name in _MARKED:
            return self.variable(f"{name}{{{self.raw()}}}")
        if name in _SHAPES:
            letters = []
            while self.kind() in ("word", "name") or self.peek() in _LETTERS:
                letters.append(self.take(self.peek()))
            return "var", name + "".join(letters)
        if name in _LETTERS or name.startswith(r"\mathbb"):
            return self.variable(name)
        raise Unreadable(name)

    def function(self, name: str) -> Node:
        base = power = None
        if name == "log" and self.take("_"):
            base = self.braced()
        if name != "sqrt" and self.take("^"):
            power = self.exponent()
        if power == ("num", Fraction(-1)) and name in _INVERSE:
            name, power = _INVERSE[name], None
        value = self.argument(name in _OF_ANGLES)
        if name == "sqrt":
            value = "root", ("num", Fraction(2)), value
        elif name == "lg" or base is not None:
            value = "div", ("fn", "ln", value), ("fn", "ln", base or ("num", Fraction(10)))
        else:
            value = "fn", "ln" if name == "log" else name, value
        return value if power is None else ("pow", value, power)

    def argument(self, angle: bool) -> Node:
        """A bracket, or the product that follows up to an operator or another function; of an angle, in radians."""
        if self.peek() in ("(", "[", "{"):
            before, self.worded = self.worded, angle
            value = self.bracketed()
            self.worded = before
        else:
            value = self.postfix(self.primary())
            while self.starts_factor() and self.peek().lstrip("\\") not in _FUNCTIONS[:-1]:
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


def _joined(items: Sequence[Node], between: Sequence[str]) -> Node:
    """One answer of elements and what stands between them: conditions joined by `and` or `or`, or a list."""
    if len(items) == 1:
        return items[0]
    conditions = all(item[0] == "rel" for item in items) and any(item[1] != "=" for item in items)
    if conditions and set(between) == {"or"}:
        return "either", *items
    if conditions and set(between) == {"and"}:
        return "both", *items
    if items[0][:2] == ("rel", "!=") and not any(item[0] == "rel" for item in items[1:]):
        return "both", items[0], *(("rel", "!=", items[0][2], item) for item in items[1:])  # `x \ne 1, 2`
    return "list", *items


def _mixed(whole: Node, fraction: Node) -> Node | None:
    """The mixed number of a whole one and a fraction, None where they make none."""
    if whole[0] != "num" or whole[1].denominator > 1 or fraction[0] != "div":
        return None
    top, bottom = fraction[1:]
    if not top[0] == bottom[0] == "num" or not 0 < top[1] < bottom[1]:
        return None
    part = top[1] / bottom[1]
    return "num", whole[1] - part if whole[1] < 0 else whole[1] + part


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
