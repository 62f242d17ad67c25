"""The bound on what a comparison costs."""

from __future__ import annotations

# One operation takes about a microsecond of a common processor, so a comparison ends within 0.1 s.
MOST = 50_000


class Unreadable(ValueError):
    """Not an answer of the forms known here."""


class TooMuchWork(Unreadable):
    """More operations than a comparison may take."""


class Work:
    """Counts the operations of one comparison."""

    def __init__(self, most: int = MOST):
        self.most = most
        self.done = 0

    def spend(self, operations: int) -> None:
        """Counts `operations`. Raises TooMuchWork where there are more than `most` in all."""
        self.done += operations
        if self.done > self.most:
            raise TooMuchWork(f"more than {self.most} operations")
