"""What a command prints where it fails."""

from __future__ import annotations

import sys
import traceback

from dcmdp_jax import errors
from dcmdp_jax.run import staging


def tell(error: BaseException, message: str, whole: bool) -> None:
    """Prints a message about an exception, then the lines of the user's code that led to it.

    With `whole` the traceback comes before, the project's own lines and libraries' included.
    """
    if whole:
        traceback.print_exception(error)
    print(staging.shown(f"dcmdp: {message}"), file=sys.stderr)
    if lines := errors.user_code(error):
        print(lines, file=sys.stderr)
