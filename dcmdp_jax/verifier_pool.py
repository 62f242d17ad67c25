"""A verifier in processes of its own, each call with a time limit: a call that hangs, crashes or
takes all memory costs its completion's reward, not the run.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import pickle
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from dcmdp_jax import errors, stopping
from dcmdp_jax.answers.worker import NotReady, ProcessEnded, Worker
from dcmdp_jax.records import Example

COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("verifier_process.py")))
NOT_LOADED = "data.verifier cannot be loaded in a process of its own"


class Call(NamedTuple):
    """What a verifier is asked."""

    example: Example
    text: str
    facts: dict[str, Any]  # arguments by name


class Failure(NamedTuple):
    """A call that gave no reward."""

    reason: str  # a sentence, or one without its subject where nothing was raised
    raised: bool = False  # by the verifier; else it took too long, or its process ended


class VerifierPool:
    """Calls a verifier in `processes` processes, one completion at a time in each.

    A function of a module is imported by the processes, one of an experiment file is sent to them
    with what it refers to. JAX computes on the CPU there. A process that does not answer within
    `seconds` is ended with what it started, and another takes its place. The kernel ends these
    processes before any other where memory runs out.
    """

    def __init__(self, verifier: Callable[..., float], seconds: float, processes: int):
        """Starts nothing yet.

        Raises ValueError if the verifier cannot be sent to a process.
        """
        self.verifier = verifier
        self._seconds = seconds
        first_line = _line((sys.path, seconds, _pickled(verifier)))
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self._workers = [
            Worker(COMMAND, seconds, first_line=first_line, environment=environment, stderr=None)
            for _ in range(processes)
        ]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def start(self) -> None:
        """Starts the first process. Raises ValueError if the verifier cannot be loaded there."""
        try:
            self._workers[-1].start()
        except ProcessEnded as error:
            raise ValueError(f"{NOT_LOADED}, which ends ({_cause(error.status)})") from None
        except (TimeoutError, NotReady) as error:
            raise ValueError(f"{NOT_LOADED}: {error}") from None

    def judge(
        self, calls: Sequence[Call], should_stop: Callable[[], bool]
    ) -> list[float | Failure]:
        """Returns the verifier's number for each call, or why there is none, in order.

        Raises `stopping.Interrupted` where `should_stop()`, and ValueError if the verifier cannot
        be loaded in a process.
        """
        executor = futures.ThreadPoolExecutor(len(self._workers))
        asked = [executor.submit(self._outcome, call) for call in calls]
        try:
            while True:
                done, pending = futures.wait(
                    asked, stopping.POLL_SECONDS, return_when=futures.FIRST_EXCEPTION
                )
                for future in done:
                    future.result()  # raises what it raised
                if not pending:
                    return [future.result() for future in asked]
                if should_stop():
                    raise stopping.Interrupted("stopped in the verifier")
        except NotReady as error:
            raise ValueError(f"{NOT_LOADED}: {error}") from None
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            while any(future.running() for future in asked):  # an exception has come
                for worker in self._workers:
                    worker.kill()
                time.sleep(stopping.POLL_SECONDS)

    def _outcome(self, call: Call) -> float | Failure:
        worker = self._idle.get()
        try:
            answer = _answer(worker.ask(_line(tuple(call))))
        except TimeoutError:
            return Failure(f"takes longer than data.verifier_timeout={self._seconds:g} s")
        except ProcessEnded as error:
            return Failure(f"ends its process ({_cause(error.status)})")
        except ValueError:
            worker.end()
            return Failure("writes to the file that its answers go to")
        finally:
            self._idle.put(worker)
        if "reward" in answer:
            return answer["reward"]
        return Failure(answer["failure"], raised=True)


def _answer(line: bytes) -> dict[str, Any]:
    """Returns what the process has written. Raises ValueError if that is no answer of its own."""
    answer = json.loads(line)
    if not isinstance(answer, dict) or not ({"reward", "failure"} & answer.keys()):
        raise ValueError("no answer")
    return answer


def _pickled(verifier: Callable[..., float]) -> bytes:
    import cloudpickle  # by value where no module can be imported; only a pool needs it

    try:
        return cloudpickle.dumps(verifier)
    # what is in its way raises an error of its own
    except Exception as error:
        raise ValueError(
            f"data.verifier cannot be sent to a process ({errors.type_and_message(error)}); have "
            "it make what it needs itself, or set --data.verifier_timeout 0"
        ) from error


def _line(value: Any) -> bytes:
    """Returns a value as one line for the process, which alone reads it; what a model wrote is a
    string in it.
    """
    return base64.b64encode(pickle.dumps(value))


def _cause(status: int) -> str:
    """Returns what ended a process, by its exit status."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"
