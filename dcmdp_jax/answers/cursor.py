"""The tokens of an answer and the place that a reader has come to."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dcmdp_jax.answers.tokens import Token, split
from dcmdp_jax.answers.work import Unreadable, Work

DEEPEST = 100  # calls of a reader's own; three or four for a bracket in a bracket

Node = tuple


def counted(method: Callable) -> Callable:
    """Bounds how deep a reader's methods call each other."""

    @functools.wraps(method)
    def bounded(self, *arguments):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        found = method(self, *arguments)
        self.depth -= 1
        return found

    return bounded


class Cursor:
    """The place in an answer's tokens, the depth of calls, and the work done."""

    def __init__(self, text: str, work: Work):
        self.work = work
        work.spend(len(text))
        self.tokens = split(text)
        work.spend(5 * len(self.tokens))
        self.at = 0
        self.depth = 0
        self.worded = True  # units may follow a value here

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
        return "".join(token.text for token in self.tokens[start : self.at - 1])

    def cut(self, length: int) -> None:
        """Makes two tokens of the next one, if it is longer than `length` characters."""
        kind, text, spaced = self.tokens[self.at]
        if len(text) > length:
            halves = Token(kind, text[:length], spaced), Token(kind, text[length:], False)
            self.tokens[self.at : self.at + 1] = halves

    def unworded(self, method: Callable[[], Node]) -> Node:
        """What `method` reads, where no unit may follow a value."""
        before = self.worded
        self.worded = False
        value = method()
        self.worded = before
        return value
