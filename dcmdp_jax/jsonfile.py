"""JSON that others wrote: whatever is wrong with it is one sentence that names the file."""

from __future__ import annotations

import json
import pathlib
from typing import Any


def parse(text: str | bytes, place: str) -> Any:
    """The value of a JSON text; `place` names the file, and the line, in what is raised.

    Raises ValueError on text that is not JSON, not UTF-8, nested too deeply, or holding a number of
    too many digits.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(
            f"{place} is not valid JSON for this reader: it is nested too deeply"
        ) from None


def read_object(file: pathlib.Path) -> dict:
    """The JSON object that a file holds.

    Raises ValueError as `parse` does, and on a value of another kind.
    """
    value = parse(file.read_bytes(), str(file))
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {kind(value)}, not a JSON object")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        str: "a string",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
