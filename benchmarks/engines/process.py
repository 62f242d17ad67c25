"""A server over HTTP in a process of its own, started and ended by the program that needs it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence


class ServerProcess:
    """A server that is ready at `url` until `stop`, or the end of a `with` statement."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        *,
        env: Mapping[str, str],
        log: pathlib.Path,
        seconds: float,
    ):
        """Starts a server and waits until it answers at /health.

        Args:
          name: of the server in messages.
          log: receives the server's output.
          seconds: how long to wait.

        Raises RuntimeError if the server ends or is not ready in time.
        """
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        with log.open("a") as out:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=log.parent,
                stdin=subprocess.PIPE,  # ends with this program
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that `stop` reaches the server's own processes too
            )
        try:
            self._await(log, seconds)
        except BaseException:
            self.stop()
            raise

    def _await(self, log: pathlib.Path, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            ready = answers(self.url)
            if self.process.poll() is not None:
                tail = "\n".join(log.read_text().splitlines()[-20:])
                raise RuntimeError(
                    f"{self.name} ended with status {self.process.returncode}:\n{tail}"
                )
            if ready:
                return
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{self.name} is not ready after {seconds:.0f} s; its log is {log}"
                )
            time.sleep(0.2)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server and its own processes at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url: str) -> bool:
    """Returns True if the server at `url` is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
