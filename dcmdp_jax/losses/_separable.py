"""Which parts of a loss are separable over microbatches.

A part is separable if what it gives a completion depends on that completion's tokens alone, not on
the log-probs of other completions. The gradient of a loss that is made of such parts can be
accumulated over microbatches before the log-probs of the whole batch are known. Separability is
declared, never tested: by the decorator here, or by `function.separable = True` on a function of
your own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def separable(function: F) -> F:
    """Declares a function separable (decorator)."""
    function.__dict__["separable"] = True
    return function


def is_separable(part: Any) -> bool:
    """True if `part` is declared separable.

    A `functools.partial` is separable if its function is, and every function among its arguments.
    """
    if isinstance(part, functools.partial):
        values = [*part.args, *part.keywords.values()]
        return all(map(is_separable, [part.func, *filter(callable, values)]))
    return getattr(part, "separable", False) is True
