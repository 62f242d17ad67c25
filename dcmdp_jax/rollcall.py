"""That every process of a run is there: before it starts, and while it goes on.

Process 0 listens at the coordinator's address until all others have called; then the port is free for JAX's own coordinator.
The connections stay open and carry a few words, never data: so a lost process is named at once, where JAX waits for a missed
heartbeat or for ever, and a request to stop reaches a process that is busy sampling.

One JSON object a line. A caller sends `process`, `processes` and `host`, and is answered `go` or `refused`; later anyone may
send `stop`, `done` or `lost`, each with a sentence or true.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

GREETING_SECONDS = 5.0  # who is silent for so long is none of ours
RETRY_SECONDS = 0.2
SLACK_SECONDS = 5.0  # process 0 counts from its own start and says so itself


class Line:
    """A connection that carries JSON objects."""

    def __init__(self, connection: socket.socket):
        self._socket, self._reader, self._writing = connection, connection.makefile("r"), threading.Lock()

    def send(self, **message: object) -> None:
        """Sends; where the other side is gone, its reader finds that out."""
        with self._writing:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass

    def read(self, seconds: float | None) -> dict | None:
        """The next object; None where the other side is gone, silent for `seconds`, or says something else."""
        self._socket.settimeout(seconds)
        try:
            found = json.loads(self._reader.readline(2000))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep(self) -> None:
        """Silence is fine from here on; a host without power is noticed within a minute."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Roll:
    """This process's lines to the others: all of them from process 0, that to process 0 from the rest."""

    def __init__(self, lines: dict[int, Line], names: dict[int, str]):
        self.stopping = False  # another process was asked to stop
        self._lines, self._names, self._done = lines, names, set()
        for line in lines.values():
            line.keep()
        for process in lines:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def send(self, **message: object) -> None:
        for line in self._lines.values():
            line.send(**message)

    def end(self, sentence: str) -> None:
        """Tells everybody why, and ends this process: its main thread may wait for ever in a collective."""
        self.send(lost=sentence)
        os.write(2, f"dcmdp: {sentence}; the same commands go on from the last checkpoint\n".encode())
        os._exit(1)

    def _listen(self, process: int) -> None:
        while (message := self._lines[process].read(None)) is not None:
            if "lost" in message:
                self.end(message["lost"])
            if "stop" in message:
                self.stopping = True
                for other in self._lines.keys() - {process}:
                    self._lines[other].send(**message)
            if "done" in message:
                self._done.add(process)
        if process not in self._done:
            self.end(f"{self._names[process]} is gone")


def call(address: str, processes: int, process: int, limit: float) -> Roll:
    """Waits up to `limit` seconds until all `processes` have called at `address` (HOST:PORT of process 0).

    Raises ValueError that names who or what is missing: the processes that have not called, or the host or port where there
    is no process 0.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator {address!r} is not HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"process {process} is not one of {processes} processes; they are numbered from 0")
    if process:
        return _report(host.strip("[]"), int(port), processes, process, limit)
    return _gather(address, int(port), processes, limit)


def _gather(address: str, port: int, processes: int, limit: float) -> Roll:
    """Process 0: awaits the others."""
    deadline = time.monotonic() + limit
    lines: dict[int, Line] = {}
    names: dict[int, str] = {}
    try:
        server = socket.create_server(("", port), backlog=processes)
    except OSError as error:
        raise ValueError(f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}); give all processes another") from None
    with server:
        while len(lines) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                line = Line(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, processes) if i not in lines)
                _refuse(lines, f"process {missing} of {processes} did not call at {address} within {limit:g} s; start what is "
                               "missing, and see that its --coordinator is right and the port is open")
            if (greeting := _greeting(line)) is None:
                continue
            i, said, name = greeting
            if said != processes or not 0 < i < processes or i in lines:
                why = (f"has been started twice, on {names[i]} and {name}" if i in lines else
                       f"on {name} was started as one of {said} processes, process 0 as one of {processes}")
                _refuse(lines | {-1: line}, f"process {i} {why}; stop all and start each once")
            lines[i], names[i] = line, f"process {i} on {name}"
    for line in lines.values():
        line.send(go=True)
    return Roll(lines, names)


def _greeting(line: Line) -> tuple[int, int, str] | None:
    said = line.read(GREETING_SECONDS) or {}
    process, processes, host = said.get("process"), said.get("processes"), said.get("host")
    return (process, processes, str(host)) if isinstance(process, int) and isinstance(processes, int) else None


def _refuse(lines: dict[int, Line], sentence: str) -> None:
    for line in lines.values():
        line.send(refused=sentence)
    raise ValueError(sentence)


def _report(host: str, port: int, processes: int, process: int, limit: float) -> Roll:
    """Every other process: calls process 0 and awaits its word."""
    line = Line(_connect(host, port, process, limit))
    line.send(process=process, processes=processes, host=socket.gethostname())
    answer = line.read(limit + SLACK_SECONDS) or {}
    if "go" not in answer:
        raise ValueError(answer.get("refused") or f"process {process} reached {host}:{port}, but what answers there is no "
                                                  "process 0 of this run, or has stopped; see its output")
    return Roll({0: line}, {0: f"process 0 at {host}:{port}"})


def _connect(host: str, port: int, process: int, limit: float) -> socket.socket:
    deadline = time.monotonic() + limit
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), RETRY_SECONDS))
        except socket.gaierror:
            reason = "no such host name"
        except OSError as error:
            reason = error.strerror or "no answer"
        if time.monotonic() + RETRY_SECONDS > deadline:
            raise ValueError(f"process {process} found no process 0 at {host}:{port} within {limit:g} s ({reason}); start "
                             "process 0 there, correct --coordinator, or open the port")
        time.sleep(RETRY_SECONDS)
