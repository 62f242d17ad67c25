"""Parts of a measurement, one after the other in a process of their own, each bounded in time.

A part that raises, ends the process or takes too long costs no more than itself, and not what it
had measured before.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

POLL = 0.1  # seconds


class Result(NamedTuple):
    """What a part has measured, and why it went no further."""

    part: str
    values: list[Any]
    failure: str  # empty where it is complete


def run(command: Sequence[str], limits: Mapping[str, float], seconds: float) -> Iterator[Result]:
    """Yields the result of each part as it ends.

    Args:
        command: calls `answer`; it is given a file and names of parts.
        limits: the most seconds of each part, in their order; the first includes the start of the
            process.
        seconds: of all parts together.
    """
    deadline = time.monotonic() + seconds
    left = list(limits)
    with tempfile.TemporaryDirectory() as folder:
        while left and time.monotonic() < deadline:
            answers = pathlib.Path(folder) / f"{len(left)}.jsonl"
            answers.touch()
            process = subprocess.Popen([*command, str(answers), *left])
            try:
                for result in _read(process, answers, tuple(left), limits, deadline):
                    left.remove(result.part)
                    yield result
            finally:
                process.kill()
                process.wait()
    for part in left:
        yield Result(part, [], f"no time was left of {seconds:.0f} s")


def _read(
    process: subprocess.Popen,
    answers: pathlib.Path,
    parts: Sequence[str],
    limits: Mapping[str, float],
    deadline: float,
) -> Iterator[Result]:
    """Yields the results of a process, the last one where it ends or a part takes too long."""
    with answers.open() as file:
        for part in parts:
            began = time.monotonic()
            end = min(began + limits[part], deadline)
            values: list[Any] = []
            failure = None
            line = ""
            while failure is None:
                has_ended = process.poll() is not None
                line += file.readline()
                if line.endswith("\n"):
                    answered = json.loads(line)
                    line = ""
                    failure = answered.get("failure")
                    values += answered.get("values", [])
                elif has_ended:
                    yield Result(part, values, f"its process ended with {process.returncode}")
                    return
                elif time.monotonic() > end:
                    yield Result(part, values, f"it took more than {end - began:.0f} s")
                    return
                else:
                    time.sleep(POLL)
            yield Result(part, values, failure)


def answer(
    file: str,
    names: Sequence[str],
    measure: Callable[[str], Iterable[Any]],
    describe: Callable[[Exception], str],
) -> None:
    """Measures the named parts, and appends each value to a file for `run`; JSON can hold all."""
    with pathlib.Path(file).open("a") as answers:

        def write(record: dict[str, Any]) -> None:
            answers.write(json.dumps(record) + "\n")
            answers.flush()

        for name in names:
            failure = ""
            try:
                for value in measure(name):
                    write({"values": [value]})
            # libraries raise whatever they like, and the other parts are still wanted
            except Exception as error:
                failure = describe(error)
            write({"failure": failure})
