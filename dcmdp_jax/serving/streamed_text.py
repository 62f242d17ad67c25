"""The text of a completion, piece by piece while it is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StreamedText:
    """Decodes a growing completion piece by piece.

    The pieces, joined, are the decoded completion. No piece ends within a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_ids: Sequence[int]):
        self._decode = decode
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self._start = 0
        # Tokens [_start, _sent) made the last piece; they are the context of the next one.
        self._sent = 0

    def add(self, tokens: list[int], ended: bool) -> str:
        """Returns the text that `tokens` add; "" while they end within a character."""
        stops = ended and tokens and tokens[-1] in self._stop_ids
        self._tokens += tokens[:-1] if stops else tokens
        before = self._decode(self._tokens[self._start : self._sent])
        now = self._decode(self._tokens[self._start :])
        incomplete = now.endswith("\ufffd") and not ended
        if len(now) <= len(before) or incomplete:
            return ""
        self._start, self._sent = self._sent, len(self._tokens)
        return now[len(before) :]
