"""A position in the tokens of an answer: what every reader needs."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dcmdp_jax.answers.tokens import Token, split
from dcmdp_jax.answers.work import Unreadable, Work

MAX_DEPTH = 100  # nested calls; a bracket inside a bracket takes three or four

Node = tuple


def bounded_depth(method: Callable) -> Callable:
    """Wraps a reader's method: Unreadable is raised if calls nest deeper than MAX_DEPTH."""

    @functools.wraps(method)
    def bounded(self, *arguments):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = method(self, *arguments)
        self.depth -= 1
        return node

    return bounded


class Cursor:
    """The tokens of an answer, the position in them, the depth of calls, and the work done."""

    def __init__(self, text: str, work: Work):
        self.work = work
        work.spend(len(text))
        self.tokens = split(text)
        work.spend(5 * len(self.tokens))
        self.position = 0
        self.depth = 0
        self.units_allowed = True  # after a value

    def peek(self, ahead: int = 0) -> str:
        """Returns the text of the token `ahead` places on, or an empty string past the end."""
        return (
            self.tokens[self.position + ahead].text
            if self.position + ahead < len(self.tokens)
            else ""
        )

    def kind(self, ahead: int = 0) -> str:
        """Returns the kind of the token `ahead` places on; an empty string if there is none."""
        return (
            self.tokens[self.position + ahead].kind
            if 0 <= self.position + ahead < len(self.tokens)
            else ""
        )

    def spaced(self, ahead: int = 0) -> bool:
        """Returns True if a space precedes the token `ahead` places on."""
        return self.tokens[self.position + ahead].spaced

    def take(self, *wanted: str) -> str:
        """Takes the next token if it is one of `wanted`; returns its text, or an empty string."""
        if self.peek() and self.peek() in wanted:
            self.position += 1
            return self.tokens[self.position - 1].text
        return ""

    def expect(self, *wanted: str) -> str:
        """Takes the next token, which must be one of `wanted`. Raises Unreadable otherwise."""
        text = self.take(*wanted)
        if not text:
            raise Unreadable(f"expects {wanted[0]}")
        return text

    def take_word(self, *words: str) -> str:
        """Takes the next token if it is one of these words, upright or not, as `take` does."""
        return self.take(*words) if self.kind() in ("word", "name") else ""

    def raw(self) -> str:
        """Takes the next token, or what the next braces contain, and returns the text."""
        if not self.take("{"):
            return self.take(self.peek())
        depth = 1
        start = self.position
        while depth:
            if self.position >= len(self.tokens):
                raise Unreadable("braces do not end")
            depth += {"{": 1, "}": -1}.get(self.peek(), 0)
            self.position += 1
        return "".join(token.text for token in self.tokens[start : self.position - 1])

    def split_token(self, length: int) -> None:
        """Splits the next token in two if it is longer than `length` characters."""
        kind, text, spaced = self.tokens[self.position]
        if len(text) > length:
            halves = Token(kind, text[:length], spaced), Token(kind, text[length:], False)
            self.tokens[self.position : self.position + 1] = halves

    def without_units(self, method: Callable[[], Node]) -> Node:
        """Returns what `method` reads while no unit may follow a value."""
        before = self.units_allowed
        self.units_allowed = False
        value = method()
        self.units_allowed = before
        return value
