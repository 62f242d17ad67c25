"""What the files of a run hold, field by field: a value of another type is named in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WHOLE = (int,)
TEXT = (str,)
LIST = (list,)
OBJECT = (dict,)
NUMBER = (int, float)
MAYBE = (int, float, type(None))  # null where it was not finite
NAMES = {
    WHOLE: "a whole number",
    TEXT: "a text",
    LIST: "a list",
    OBJECT: "an object",
    NUMBER: "a finite number",
    MAYBE: "a finite number or null",
}
LARGEST = 2**53  # whole numbers up to here are exact as floats


def check(record: Any, kinds: Mapping[str, tuple[type, ...]], place: str) -> None:
    """Raises ValueError, which begins with `place`, unless `record` is an object that has each of
    the fields `kinds`, with a value of one of its types; a boolean is no number.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place} is {record!r:.60}, not an object; correct or remove it")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"{place} lacks {name!r:.60}; correct or remove it")
        if not is_of(record[name], kind):
            raise ValueError(
                f"{place} has {name!r:.60} = {record[name]!r:.60}, not {NAMES[kind]}; "
                "correct or remove it"
            )


def is_of(value: Any, kind: tuple[type, ...]) -> bool:
    """True if a JSON value is of one of these types, a number finite and in a float's range."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return not isinstance(value, float) or math.isfinite(value)
