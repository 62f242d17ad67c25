"""The process that compares answers by the `math-verify` package; `judge.py` runs this file, and
nothing imports it.

`library.py SECONDS` writes `ready`, or why it is not, and answers each line `[gold, answer]` of
standard input with `true` or `false`. It ends with its input, and by SIGPROF where a comparison
takes more than SECONDS of processor time, so that no verdict depends on what else the machine does.

The package is lenient: it rounds to six digits, drops words, bases and signs that it does not know,
and does not distinguish C from c, or (1, 2) from {2, 1}. None of this is accepted here.
`library.py alone SECONDS` uses the package as it is, for comparisons with it.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable

MEMORY = 2 << 30  # bytes of address space
FIRST = r"\int_0^1 x\,dx", "2"  # loads what the package imports late, before a question is timed
DIGITS = 50  # to which two values must agree

_DROPPED = re.compile(r"\\(?:text|mbox|hbox)\w*\s*\{(?!\s*(?:and|or|if)\s*\})|\d\s*_|[^\x00-\x7f]")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def _serve(seconds: float, alone: bool) -> None:
    """Answers the lines of standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent that ignores it would leave it ignored
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    try:
        import math_verify
    except ImportError as error:
        print(" ".join(str(error).split()), file=replies, flush=True)
        return
    # it warns that it has no time limit of its own, which is kept here
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal = _lenient(math_verify) if alone else _strict(math_verify)
    equal(*FIRST)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def _lenient(math_verify) -> Callable[[str, str], bool]:
    """Returns the package's own comparison."""

    def equal(gold: str, answer: str) -> bool:
        one, other = (
            math_verify.parse(f"$\\boxed{{{text}}}$", parsing_timeout=None)
            for text in (gold, answer)
        )
        return bool(math_verify.verify(one, other, timeout_seconds=None))

    return equal


def _strict(math_verify) -> Callable[[str, str], bool]:
    """Returns a comparison that accepts no leniency."""
    import sympy

    # LaTeX only: the package's other extraction evaluates Python
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str):
        """Returns the one expression that a text is, its decimals as fractions, or None."""
        if _DROPPED.search(text):
            return None
        parsed = math_verify.parse(
            f"$\\boxed{{{text}}}$", latex, fallback_mode="no_fallback", parsing_timeout=None
        )
        if len(parsed) != 1 or isinstance(parsed[0], (str, sympy.Symbol)):
            return None
        decimals = parsed[0].atoms(sympy.Float)
        return parsed[0].xreplace({part: sympy.Rational(str(part)) for part in decimals})

    def equal(gold: str, answer: str) -> bool:
        one = read(gold)
        other = read(answer)
        if one is None or other is None:
            return False
        for kind in (sympy.Tuple, sympy.FiniteSet):
            if isinstance(one, kind) != isinstance(other, kind):
                return False
        if isinstance(one, sympy.FiniteSet) and gold.count(",") != answer.count(","):
            return False  # 1, 1, 2 is not 1, 2
        letters, others = (set(_LETTER.findall(text)) for text in (gold, answer))
        if letters != others and set(map(str.lower, letters)) == set(map(str.lower, others)):
            return False
        return bool(math_verify.verify(one, other, numeric_precision=DIGITS, timeout_seconds=None))

    return equal


if __name__ == "__main__":
    _serve(float(sys.argv[-1]), "alone" in sys.argv[1:-1])
