"""The process that compares answers by the `math-verify` package; `judge.py` runs this file, and
nothing imports it.

`library.py SECONDS` writes `ready`, or why it is not, and answers each line `[gold, answer]` of
standard input with `true` or `false`. It ends with its input, and by SIGALRM where a comparison
takes longer than SECONDS.

The package is generous: it rounds to six digits, drops words, bases and signs that it does not
know, and makes no difference between C and c, or (1, 2) and {2, 1}. It is asked here for what our
reader cannot read, so each of these is refused.
`library.py alone SECONDS` takes the package as it comes.
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
DIGITS = 50  # to which two values agree

_DROPPED = re.compile(r"\\(?:text|mbox|hbox)\w*\s*\{(?!\s*(?:and|or|if)\s*\})|\d\s*_|[^\x00-\x7f]")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def _serve(seconds: float, alone: bool) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent that ignores it would leave it ignored
    replies = sys.stdout
    sys.stdout = sys.stderr  # a library's own printing is no reply
    try:
        import math_verify
    except ImportError as error:
        print(" ".join(str(error).split()), file=replies, flush=True)
        return
    # it warns that time is kept elsewhere, as it is
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal = _generous(math_verify) if alone else _strict(math_verify)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def _generous(math_verify) -> Callable[[str, str], bool]:
    def equal(gold: str, answer: str) -> bool:
        one, other = (
            math_verify.parse(f"$\\boxed{{{text}}}$", parsing_timeout=None)
            for text in (gold, answer)
        )
        return bool(math_verify.verify(one, other, timeout_seconds=None))

    return equal


def _strict(math_verify) -> Callable[[str, str], bool]:
    import sympy

    # without the other kind, which evaluates Python
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str):
        """The one expression that a text is, its decimals as fractions; None where it is none."""
        if _DROPPED.search(text):
            return None
        found = math_verify.parse(
            f"$\\boxed{{{text}}}$", latex, fallback_mode="no_fallback", parsing_timeout=None
        )
        if len(found) != 1 or isinstance(found[0], (str, sympy.Symbol)):
            return None
        decimals = found[0].atoms(sympy.Float)
        return found[0].xreplace({part: sympy.Rational(str(part)) for part in decimals})

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
