"""The numbers that a compiled program can hold, and the check that a setting is one of them."""

from __future__ import annotations

import numbers
from typing import Any

MAX_INT = 2**31 - 1  # compiled programs hold integers as int32
MAX_FLOAT = 3e38  # and other numbers as float32
# positions of a row with shared prompts: the TPU kernel packs two into 32 bits
MAX_SHARED_ROW = 2**15


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number in [low, high]. NaN is in no range."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} must be a number")
    if value < low:
        bound = "not be negative" if low == 0 else f"be at least {low:g}"
        raise ValueError(f"{name}={value} must {bound}")
    if not value <= high:
        raise ValueError(f"{name}={value} must be at most {high:g}")
