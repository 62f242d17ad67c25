"""The process in which a verifier runs; `verifier_pool` runs this file, and nothing imports it.

Its first line of standard input holds the module search path, the time limit and the verifier.
Each further line is a call, and is answered by a JSON object with a `reward` or a `failure`. What
the verifier prints goes to standard error. Where standard input ends, also during a call, the
process ends with what it has started.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import pickle
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO


def _serve() -> None:
    """Answers the lines of standard input."""
    with contextlib.suppress(OSError):  # the file of Linux, where it may be written
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the verifier prints is no answer
    sys.stdout = sys.stderr
    questions = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads no question
    path, seconds, pickled = _value(next(questions))
    sys.path[:] = path
    from dcmdp_jax import errors, rewards

    try:
        verifier = pickle.loads(pickled)
    # whatever importing the verifier's modules may raise
    except Exception as error:
        print(errors.type_and_message(error), file=answers, flush=True)
        return
    # CPU seconds after which the process ends by itself: while C code of the verifier runs, the
    # thread that reads may not
    most = seconds * (os.cpu_count() or 1) + 60
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions, lines), daemon=True).start()
    print("ready", file=answers, flush=True)
    while True:
        line = lines.get()
        signal.setitimer(signal.ITIMER_PROF, most)
        example, text, facts = _value(line)
        try:
            answer = {"reward": float(rewards.reward_of(verifier, example, text, facts))}
        except ValueError as error:
            answer = {"failure": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _read(questions: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    """Passes the lines on until there are no more: the process that asks is gone."""
    for line in questions:
        lines.put(line)
    os.killpg(0, signal.SIGKILL)


def _value(line: bytes) -> Any:
    return pickle.loads(base64.b64decode(line))


if __name__ == "__main__":
    _serve()
