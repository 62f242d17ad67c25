"""That every process of a run is there: before it starts, and while it goes on.

Process 0 listens at the coordinator's address until all others have called; then the port is free
for JAX's own coordinator. The connections stay open and carry a few words, never data: so a lost
process is named at once, where JAX waits for a missed heartbeat or for ever, and a request to stop
reaches a process that is busy sampling.

A process belongs to the run if it knows the run's secret: `DCMDP_SECRET` where the launcher sets
it, else a file in the shared work folder, which process 0 writes and which lies there while the
roll is called. It never travels: each side answers the other's nonce with an HMAC. A stranger is
refused, and nothing that it sends is printed or obeyed. What travels is not encrypted, and JAX's
own coordinator asks for no secret: the network between the hosts has to be private all the same.

One JSON object a line. Process 0 sends `nonce`; a caller answers with `process`, `processes`,
`host`, `nonce` and `proof`, and gets an `answer`, `go` or why not, with `proof`. Later anyone may
send `stop`, `done` or `lost`, each with a sentence or true.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import pathlib
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

GREETING_SECONDS = 5.0  # who has not greeted in so long is none of ours
RETRY_SECONDS = 0.2
POLL_SECONDS = 0.05
SLACK_SECONDS = 5.0  # process 0 counts from its own start and says so itself
SENTENCE = 1000  # characters that travel and are printed
LONGEST = 16 * SENTENCE  # bytes of a line
GREETINGS = 256  # awaited at a time
VARIABLE = "DCMDP_SECRET"
FILE = "rendezvous.secret"
SHORTEST = 16  # characters of a secret
GO = "go"


class Connection:
    """A connection that carries JSON objects."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._unread = b""
        self._writing = threading.Lock()

    def send(self, **message: object) -> None:
        """Sends; where the other side is gone, its reader finds that out."""
        with self._writing:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass

    def read(self, seconds: float | None) -> dict | None:
        """The next object; empty where something else was said, None where the other side is gone
        or `seconds` have passed."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST:
                self._unread = b""
                return {}
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
                self._socket.settimeout(left)
                received = self._socket.recv(LONGEST)
            except OSError:
                return None
            if not received:
                return None
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self) -> None:
        """Silence is fine from here on; a host without power is noticed within a minute."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def close(self) -> None:
        self._socket.close()


class Peers:
    """This process's lines to the others: all from process 0, that to process 0 from the rest."""

    def __init__(self, lines: dict[int, Connection], names: dict[int, str]):
        self.stopping = False  # another process was asked to stop
        self._lines = lines
        self._names = names
        self._done = set()
        for line in lines.values():
            line.keep()
        for process in lines:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def send(self, **message: object) -> None:
        for line in self._lines.values():
            line.send(**message)

    def end(self, sentence: str) -> None:
        """Tells everybody why, and ends this process, whose main thread may wait for ever in a
        collective."""
        self.send(lost=sentence)
        said = f"dcmdp: {sentence}; the same commands go on from the last checkpoint\n"
        os.write(2, said.encode(errors="replace"))
        os._exit(1)

    def _listen(self, process: int) -> None:
        while (message := self._lines[process].read(None)) is not None:
            if "lost" in message:
                self.end(printable(message["lost"]))
            if "stop" in message:
                self.stopping = True
                for other in self._lines.keys() - {process}:
                    self._lines[other].send(stop=True)
            if "done" in message:
                self._done.add(process)
        if process not in self._done:
            self.end(f"{self._names[process]} is gone")


def printable(said: object) -> str:
    """What another process said, as one short line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(said)[:SENTENCE])


def join(
    address: str, processes: int, process: int, limit: float, folder: str | os.PathLike
) -> Peers:
    """Waits up to `limit` seconds until all `processes` have called at `address` (HOST:PORT of
    process 0).

    `folder` is one that all share, for the secret where the environment holds none. Raises
    ValueError that names who or what is missing: the processes that have not called, the host or
    port where there is no process 0, or the secret.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator {address!r} is not HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(
            f"process {process} is not one of {processes} processes; they are numbered from 0"
        )
    given = os.environ.get(VARIABLE, "")
    file = pathlib.Path(folder) / FILE
    if given and len(given) < SHORTEST:
        raise ValueError(
            f"{VARIABLE} has {len(given)} characters; give all processes one of {SHORTEST} or more"
        )
    if process:
        return _apply(host.strip("[]"), int(port), processes, process, limit, given, file)
    if given:
        return _accept_all(address, int(port), processes, limit, given)
    with _secret_file(file) as secret:
        return _accept_all(address, int(port), processes, limit, secret)


@contextlib.contextmanager
def _secret_file(file: pathlib.Path) -> Iterator[str]:
    """A secret that lies in `file`, readable by this user alone, until the end.

    What a roll call that was killed has left there is taken.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    secret = _read_secret(file)
    if not secret:
        file.unlink(missing_ok=True)
        secret = secrets.token_hex(32)
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
            new.write(secret)
    try:
        yield secret
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another has put something there by now
            for folder in made:
                folder.rmdir()


def _read_secret(file: pathlib.Path) -> str:
    """The secret in `file`; empty where there is none, or half of one."""
    try:
        found = file.read_text()
    except (OSError, ValueError):  # no file, or none that is text
        return ""
    return found if len(found) == 64 else ""


def _proof(secret: str, *words: object) -> str:
    return hmac.new(secret.encode(), json.dumps(words).encode(), "sha256").hexdigest()


def _is_proof(said: object, expected: str) -> bool:
    given = str(said).encode(errors="replace")
    return hmac.compare_digest(given, expected.encode())


class Applicant(NamedTuple):
    """A process that has proved to know the secret."""

    line: Connection
    process: int
    processes: int
    host: str
    nonces: tuple[str, str]  # process 0's and its own

    def answer(self, secret: str, word: str) -> None:
        """Says `GO`, or why this process may not."""
        self.line.send(answer=word, proof=_proof(secret, *self.nonces, word))


def _accept_all(address: str, port: int, processes: int, limit: float, secret: str) -> Peers:
    """Process 0: awaits the others. Each call is greeted in a thread, so that none waits for a
    stranger's."""
    deadline = time.monotonic() + limit
    there: dict[int, Applicant] = {}
    proved: queue.Queue[Applicant] = queue.Queue()
    strangers: list[str] = []
    greetings = threading.BoundedSemaphore(GREETINGS)
    try:
        server = socket.create_server(("", port), backlog=max(processes, 128))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}); "
            "give all processes another"
        ) from None
    server.settimeout(POLL_SECONDS)
    with server:
        while len(there) < processes - 1:
            if greetings.acquire(timeout=POLL_SECONDS):
                _accept(server, secret, proved, strangers, greetings)
            while not proved.empty():
                _admit(proved.get(), there, processes, secret)
            if time.monotonic() > deadline:
                missing = ", ".join(str(i) for i in range(1, processes) if i not in there)
                refused = f"{len(strangers)} call{'s were' if len(strangers) > 1 else ' was'}"
                known = f"; {refused} refused without the run's secret" if strangers else ""
                _refuse(
                    there.values(),
                    secret,
                    (
                        f"process {missing} of {processes} did not call at {address} within {limit:g} "
                        "s; start what is missing, and see that its --coordinator is right and the "
                        f"port is open{known}"
                    ),
                )
    for caller in there.values():
        caller.answer(secret, GO)
    return Peers(
        {i: caller.line for i, caller in there.items()},
        {i: f"process {i} on {caller.host}" for i, caller in there.items()},
    )


def _accept(
    server: socket.socket,
    secret: str,
    proved: queue.Queue[Applicant],
    strangers: list[str],
    greetings: threading.BoundedSemaphore,
) -> None:
    """Takes a call, if there is one; a thread greets it and releases `greetings` at its end."""

    def greet() -> None:
        line = Connection(connection)
        caller, spoke = _challenge(line, secret)
        greetings.release()
        if caller:
            proved.put(caller)
            return
        line.close()
        if not spoke:
            return
        strangers.append(origin)
        if len(strangers) == 1:
            print(
                f"dcmdp: a call from {origin} without the run's secret was refused; more are "
                "counted and not told",
                file=sys.stderr,
                flush=True,
            )

    try:
        connection, (origin, *_) = server.accept()
    except OSError:  # nobody called, or whoever did is gone
        greetings.release()
        return
    threading.Thread(target=greet, daemon=True).start()


def _challenge(line: Connection, secret: str) -> tuple[Applicant | None, bool]:
    """The caller, if it is of the run, and whether it said anything."""
    nonce = secrets.token_hex(16)
    line.send(nonce=nonce)
    said = line.read(GREETING_SECONDS)
    if said is None:
        return None, False
    names = ("nonce", "process", "processes", "host")
    words = [said.get(name) for name in names]
    if [type(word) for word in words] != [str, int, int, str]:
        return None, True
    if not _is_proof(said.get("proof"), _proof(secret, nonce, *words)):
        return None, True
    own, process, processes, host = words
    return Applicant(line, process, processes, printable(host), (nonce, own)), True


def _admit(caller: Applicant, there: dict[int, Applicant], processes: int, secret: str) -> None:
    """Adds a caller to those that are there. Raises ValueError, on all, where it is not one of
    them."""
    i = caller.process
    if i in there:
        why = f"has been started twice, on {there[i].host} and {caller.host}"
    elif caller.processes != processes or not 0 < i < processes:
        why = (
            f"on {caller.host} was started as one of {caller.processes} processes, process 0 as "
            f"one of {processes}"
        )
    else:
        there[i] = caller
        return
    _refuse([*there.values(), caller], secret, f"process {i} {why}; stop all and start each once")


def _refuse(callers: Iterable[Applicant], secret: str, sentence: str) -> None:
    for caller in callers:
        caller.answer(secret, printable(sentence))
    raise ValueError(sentence)


def _apply(
    host: str, port: int, processes: int, process: int, limit: float, given: str, file: pathlib.Path
) -> Peers:
    """Every other process: calls process 0 and awaits its word."""
    deadline = time.monotonic() + limit
    name = socket.gethostname()
    while True:
        line = Connection(_connect(host, port, process, limit, deadline))
        nonce = (line.read(limit + SLACK_SECONDS) or {}).get("nonce")
        if not isinstance(nonce, str):
            raise ValueError(
                f"process {process} reached {host}:{port}, but what answers there is "
                "no process 0 of this run, or has stopped; see its output"
            )
        if secret := given or _read_secret(file):
            break
        line.close()  # a folder may show the file late, and process 0 waits for no greeting
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {process} finds no {file.absolute()}, where process 0 keeps "
                "the run's secret: the folder is not on a file system shared with "
                f"process 0, or process 0 has {VARIABLE} set; give another --workdir, "
                f"or all processes the same {VARIABLE}"
            )
        time.sleep(RETRY_SECONDS)
    own = secrets.token_hex(16)
    line.send(
        process=process,
        processes=processes,
        host=name,
        nonce=own,
        proof=_proof(secret, nonce, own, process, processes, name),
    )
    said = line.read(limit + SLACK_SECONDS) or {}
    answer = str(said.get("answer"))
    if not _is_proof(said.get("proof"), _proof(secret, nonce, own, answer)):
        raise ValueError(
            f"process {process} was not let in at {host}:{port}: process 0 there has "
            "another secret, or has stopped; give all the same --workdir, on a shared "
            f"file system, or the same {VARIABLE}, and see its output"
        )
    if answer != GO:
        raise ValueError(printable(answer))
    return Peers({0: line}, {0: f"process 0 at {host}:{port}"})


def _connect(host: str, port: int, process: int, limit: float, deadline: float) -> socket.socket:
    while True:
        try:
            left = max(deadline - time.monotonic(), RETRY_SECONDS)
            return socket.create_connection((host, port), timeout=left)
        except socket.gaierror:
            reason = "no such host name"
        except OSError as error:
            reason = error.strerror or "no answer"
        if time.monotonic() + RETRY_SECONDS > deadline:
            raise ValueError(
                f"process {process} found no process 0 at {host}:{port} within "
                f"{limit:g} s ({reason}); start process 0 there, correct "
                "--coordinator, or open the port"
            )
        time.sleep(RETRY_SECONDS)
