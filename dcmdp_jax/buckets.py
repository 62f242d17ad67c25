"""Sizes that arrays are padded to, so that few shapes are compiled."""

from __future__ import annotations


def power_of_two(size: int, largest: int) -> int:
    """Returns the smallest power of two that is at least `size`, or `largest` if that is less."""
    return min(1 << (size - 1).bit_length(), largest)
