r"""Reads an answer, in LaTeX or as people type it, into a tree; computes nothing.

The reader is a recursive descent without backtracking over at most `tokens.LONGEST` characters, at
most `cursor.MAX_DEPTH` calls deep. A node is a tuple that starts with its kind:

    ("num", Fraction)  ("var", name)  ("add", *parts)  ("mul", *parts)  ("div", a, b)
    ("pow", a, b)  ("root", n, a)
    ("neg", a)  ("pm", a) for +-a  ("mp", a) for -+a  ("fn", name, a)  ("binom", a, b)
    ("list", *items)  ("set", *items)  ("group", open, close, *items): a tuple or an interval
    ("union", *pieces)  ("without", set, set)  ("reals",)
    ("such", name, condition): a set given by a condition on its members
    ("both", *conditions)  ("either", *conditions): conditions joined by `and`, by `or`
    ("residue", a, modulus): the right side of a congruence
    ("matrix", *rows of cells)  ("det", *rows of cells)
    ("ratio", *parts)  ("clock", *parts): a ratio or a time of day
    ("rel", operator, left, right)  ("rel", "< <=", left, right, middle): a chain of two
    ("applied", name, *arguments): the left side of `f(x) = 2x`, its arguments as text
    ("quantity", a, units.Unit)  ("qualified", a, words) as in `3 fifths`  ("percent", a)
    ("text", words)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dcmdp_jax.answers.cursor import Node, bounded_depth
from dcmdp_jax.answers.expressions import (
    CONJUNCTIONS,
    FUNCTIONS,
    MODULO,
    RELATIONS,
    SHAPES,
    Expressions,
)
from dcmdp_jax.answers.nodes import is_part_of
from dcmdp_jax.answers.work import Unreadable, Work

_DEFINED = re.compile(r"(\\?[A-Za-z]+(?:_\w|_\{\w+\})?'*(?:\^\{-1\})?)\(([\w\\,|;]+)\)")
_OPERATORS = {r"\max", r"\min", r"\det", r"\Pr", r"\gcd", r"\deg", r"\dim", r"\arg"}
_ALL_REALS = re.compile(
    r"(?:x is )?(?:all|any) real(?: number|s| numbers| values)?"
    r"(?: (except|except for|but|but not|other than|excluding|besides))?(?: x)?"
)
_SHORT_WORDS = ("yes", "no", "odd")  # other words of so few letters are products of variables
_NO_NUMBERS = {
    "empty set",
    "the empty set",
    "no solution",
    "no solutions",
    "no real solution",
    "no real solutions",
}


def read(text: str, work: Work | None = None) -> Node:
    """Returns the tree of an answer. Raises Unreadable if its form is unknown or takes too much
    work.
    """
    return _Reader(text, work or Work()).answer()


class _Reader(Expressions):
    """Reads whole answers: lists, relations, sets, intervals, ratios, words and names around
    expressions.
    """

    def answer(self) -> Node:
        """Reads all tokens."""
        elements = self.items()
        if self.position < len(self.tokens):
            raise Unreadable("something is left over")
        return _combine(*elements)

    @bounded_depth
    def items(self) -> tuple[list[Node], list[str]]:
        """Reads elements. Returns them and the separators between them."""
        items = [self.element()]
        between = []
        while sign := self.take_separator():
            between.append(sign)
            items.append(self.element())
        return items, between

    def take_separator(self) -> str:
        """Takes a comma, a semicolon, `and` or `or` and returns it; of a comma and a word, the
        word.
        """
        if word := self.take_word("and", "or"):
            return word
        if not (sign := self.take(",", ";")):
            return ""
        return self.take_word("and", "or") or sign

    def element(self) -> Node:
        """Reads one element of a list: words, an expression, or one or two relations."""
        self.skip_label()
        if (word := self.word_element()) is not None:
            return word
        if self.peek() in RELATIONS:
            left = ("var", "")  # `= 5` and `> 5`, of the quantity that the problem asks for
        else:
            left = self.named_left_side() or self.side()
        if self.take(r"\equiv"):
            left = self.side()
            if left[0] != "residue":
                raise Unreadable("a congruence without a modulus")
        if self.peek() not in RELATIONS:
            return left
        operator = RELATIONS[self.take(*RELATIONS)]
        right = self.side()
        if operator in ("!=", "in") or self.peek() not in RELATIONS:
            return "rel", operator, left, right
        if operator == "=":
            while self.take("="):
                right = self.side()
            if self.peek() in RELATIONS:
                raise Unreadable("relations do not chain")
            return "rel", "=", left, right
        second = RELATIONS[self.take(*RELATIONS)]
        end = self.side()
        if operator[0] != second[0] or self.peek() in RELATIONS:
            raise Unreadable("relations do not chain")
        return "rel", f"{operator} {second}", left, end, right

    def side(self) -> Node:
        """Reads one side of a relation: an expression, a set, a ratio or a residue."""
        value = self.union()
        if self.take(*MODULO):
            return "residue", value, self.without_units(self.braced)
        if self.peek() == "(" and self.peek(1) in MODULO:
            self.position += 2
            modulus = self.without_units(self.sum)
            self.expect(")")
            return "residue", value, modulus
        if self.take(":"):
            return self.ratio(value)
        return ("ratio", value, self.union()) if self.take_word("to") else value

    def word_element(self) -> Node | None:
        r"""Reads an element that consists of words: `\text{Evelyn}`, `even`, `all real numbers
        except 0`.

        Returns None if the element is something else.
        """
        end = self.position
        while (
            end < len(self.tokens)
            and self.kind(end - self.position) in ("word", "name")
            and self.tokens[end].text not in CONJUNCTIONS
        ):
            end += 1
        run = self.tokens[self.position : end]
        spelled = " ".join(token.text for token in run).casefold()
        if reals := _ALL_REALS.fullmatch(spelled):
            self.position = end
            if not reals[1]:
                return ("reals",)
            self.take("=")
            return "without", ("reals",), ("set", *self.items()[0])
        if spelled in _NO_NUMBERS:
            self.position = end
            return ("set",)
        follows = self.tokens[end].text if end < len(self.tokens) else ""
        if not run or follows not in ("", ",", ";", "and", "or", ")", r"\}"):
            return None
        if len(run) == 1 and len(spelled) == 1:
            return None  # a variable
        upright = any(token.kind == "name" for token in run)
        functions = any(token.text.startswith(name) for name in FUNCTIONS for token in run)
        if not upright and (
            len(spelled.replace(" ", "")) < 4 and spelled not in _SHORT_WORDS or functions
        ):
            return None
        if any(token.text in FUNCTIONS for token in run):
            return None  # `\\operatorname{tan} x`
        self.position = end
        return "text", spelled.replace(" ", "")

    def skip_label(self) -> None:
        """Skips what labels an element: `Answer:` in `Answer: 5`, `Option` in `Option B`."""
        if self.take_word("Option", "option", "Choice", "choice") and self.position == len(
            self.tokens
        ):
            self.position -= 1  # a word alone
        end = self.position
        while end < len(self.tokens) and self.tokens[end].kind in ("word", "name"):
            end += 1
        words = "".join(token.text for token in self.tokens[self.position : end])
        colon = end < len(self.tokens) and self.tokens[end].text == ":"
        if colon and len(words) > 3 and not words.isupper() and not words.startswith(FUNCTIONS):
            self.position = end + 1

    def named_left_side(self) -> Node | None:
        r"""Reads a left side that is a single name: `f(x)` of `f(x) = 2x`, `\text{Area of } ABC`.

        Returns None if the left side is something else.
        """
        if self.kind() not in ("word", "name", "cmd"):
            return None
        end = self.position
        depth = 0
        while (
            end < len(self.tokens)
            and depth >= 0
            and (depth or self.tokens[end].text not in RELATIONS)
        ):
            depth += {"(": 1, ")": -1}.get(self.tokens[end].text, 0)
            if self.tokens[end].text in (",", ";") and not depth:
                break
            end += 1
        self.work.spend(end - self.position)
        if end == len(self.tokens) or self.tokens[end].text != "=":
            return None
        run = self.tokens[self.position : end]
        spelled = "".join(token.text for token in run)
        defined = _DEFINED.fullmatch(spelled)
        if defined and defined[1].lstrip("\\") not in FUNCTIONS:
            self.position = end
            return "applied", defined[1], *re.split("[,;]", defined[2])
        first = run[0]
        if first.text in _OPERATORS:
            self.position = end
            return "var", spelled
        if (
            first.kind == "name"
            and len(first.text) > 1
            and first.text not in FUNCTIONS
            and all(token.kind in ("name", "word") or token.text in SHAPES for token in run)
        ):
            self.position = end
            return "var", spelled.casefold()
        return None

    def union(self) -> Node:
        r"""Reads sets joined by `\cup`."""
        pieces = [self.difference()]
        while self.take(r"\cup"):
            pieces.append(self.difference())
        return pieces[0] if len(pieces) == 1 else ("union", *pieces)

    def difference(self) -> Node:
        r"""Reads sets joined by `\cap` or `\setminus`."""
        value = self.sum()
        while self.take(r"\cap"):
            value = "both", value, self.sum()
        if self.take(r"\setminus", "-"):  # a sum ends before `- \{`
            return "without", value, self.sum()
        return value

    def ratio(self, first: Node) -> Node:
        """Reads the rest of `3:2:1`, whose first colon was taken."""
        start = self.position - 2
        parts = [first, self.ratio_part()]
        while self.take(":"):
            parts.append(self.ratio_part())
        spelled = "".join(token.text for token in self.tokens[start : self.position])
        clock = first[0] == "num" and re.fullmatch(r"(?:[01]?\d|2[0-4])(:[0-5]\d)+", spelled)
        value = ("clock" if clock else "ratio", *parts)
        return self.quantity(value, False) if self.kind() in ("word", "name") else value

    def ratio_part(self) -> Node:
        """Reads a part of a ratio after a colon.

        What follows a number of two digits, such as `pm`, belongs to the entire ratio.
        """
        return self.number() if re.fullmatch(r"\d\d", self.peek()) else self.sum()

    def bracketed(self) -> Node:
        """Reads what brackets contain: an expression, a set, a tuple or an interval."""
        opening = self.take("(", "[", r"\{", "{", r"\langle")
        if opening == "{":
            value = self.sum()
            self.expect("}")
            return value
        if opening == r"\{":
            return self.set_in_braces()
        items, between = self.items()
        closing = self.expect(")", "]", r"\rangle")
        if (opening == r"\langle") != (closing == r"\rangle") or set(between) - {",", ";"}:
            raise Unreadable("brackets do not match")
        if opening == r"\langle":
            return "group", "(", ")", *items
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return items[0]
        return "group", opening, closing, *items

    def set_in_braces(self) -> Node:
        r"""Reads a set, whose `\{` was taken."""
        if self.take(r"\}"):
            return ("set",)
        by_condition = self.peek(1) in (r"\mid", "|", ":", r"\in")
        if by_condition and self.kind() == "word" and len(self.peek()) == 1:
            name = self.take(self.peek())
            domain = self.union() if self.take(r"\in") else ("reals",)
            self.expect(r"\mid", "|", ":")
            conditions = _combine(*self.items())
            self.expect(r"\}")
            return "such", name, ("both", ("rel", "in", ("var", name), domain), conditions)
        items = self.items()[0]
        self.expect(r"\}")
        return "set", *items


def _combine(items: Sequence[Node], between: Sequence[str]) -> Node:
    """Returns one node for elements: conditions joined by `and` or `or`, a sum of quantities, or a
    list.
    """
    if len(items) == 1:
        return items[0]
    conditions = all(item[0] == "rel" for item in items) and any(item[1] != "=" for item in items)
    if conditions and set(between) == {"or"}:
        return "either", *items
    if conditions and set(between) == {"and"}:
        return "both", *items
    if items[0][:2] == ("rel", "!=") and not any(item[0] == "rel" for item in items[1:]):
        others = [("rel", "!=", items[0][2], item) for item in items[1:]]  # `x \ne 1, 2`
        return "both", items[0], *others
    if set(between) == {"and"} and all(map(is_part_of, items[1:], items)):
        return "add", *items  # `2 hours and 30 minutes`
    return "list", *items
