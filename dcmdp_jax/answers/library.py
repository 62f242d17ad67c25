"""The process that compares answers by the `math-verify` package; `judge.py` runs this file, nothing imports it.

It writes `ready`, or `absent` and why, and answers each line `[gold, answer]` of standard input with `true` or `false`. It
ends with its input, on more memory than `MEMORY`, and by SIGALRM where a comparison takes longer than its first argument.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes of address space


def _serve(seconds: float) -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # a library's own printing is no reply
    try:
        import math_verify
    except ImportError as error:
        print("absent", json.dumps(str(error)), file=replies, flush=True)
        return
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time is kept elsewhere, as it is
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = _equal(math_verify, *json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def _equal(math_verify, gold: str, answer: str) -> bool:
    one, other = (math_verify.parse(f"$\\boxed{{{text}}}$", parsing_timeout=None) for text in (gold, answer))
    return bool(math_verify.verify(one, other, timeout_seconds=None))


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
