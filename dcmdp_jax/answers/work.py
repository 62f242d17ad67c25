"""The bound on the cost of a comparison."""

from __future__ import annotations

# operations; one takes about a microsecond on a common processor, so a comparison ends in 0.1 s
MAX_OPERATIONS = 50_000


class Unreadable(ValueError):
    """The text is no answer of a known form."""


class TooMuchWork(Unreadable):
    """Reading or comparing takes more operations than allowed."""


class Work:
    """Counts the operations of one comparison."""

    def __init__(self, most: int = MAX_OPERATIONS):
        self.most = most
        self.done = 0

    def spend(self, operations: int) -> None:
        """Counts `operations`. Raises TooMuchWork if there are more than `most` in total."""
        self.done += operations
        if self.done > self.most:
            raise TooMuchWork(f"more than {self.most} operations")
