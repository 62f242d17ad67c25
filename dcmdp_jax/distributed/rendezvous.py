"""Connects the processes of a run before it starts, and notices while it runs that one is lost.

Process 0 listens at the coordinator's address until all others have connected; then the port is
free for JAX's own coordinator. The connections stay open. They carry short messages and never data:
a lost process is named at once, where JAX would wait for a missed heartbeat or forever, and a
request to stop reaches a process that is busy sampling.

A process belongs to the run if it knows the run's secret: the environment variable `DCMDP_SECRET`
if the launcher sets it, otherwise a file that process 0 writes into the shared work folder and
removes when all are connected. The secret is never sent: each side answers the other's nonce with
an HMAC. A connection without the secret is closed, and nothing that it sends is printed or obeyed.
Messages are not encrypted, and JAX's own coordinator requires no secret, so the network between the
hosts must be private all the same.

Protocol: one JSON object a line. Process 0 sends `nonce`. The other process replies with `process`,
`processes`, `host`, `nonce` and `proof`, and receives `answer` ("go", or why it is refused) with
`proof`. After that each side may send `stop` (true), `done` (true) or `lost` (a sentence).
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

GREETING_SECONDS = 5.0  # a connection that has not sent its greeting by then is closed
RETRY_SECONDS = 0.2
POLL_SECONDS = 0.05
SLACK_SECONDS = 5.0  # process 0 starts its clock later, and sends the reason for a timeout itself
SENTENCE = 1000  # characters of a message that are sent and printed
LONGEST = 16 * SENTENCE  # bytes of a line
GREETINGS = 256  # connections whose greeting is awaited at a time
VARIABLE = "DCMDP_SECRET"
FILE = "rendezvous.secret"
SHORTEST = 16  # characters of a secret that the user gives
FILE_SECRET = 64  # characters of a secret that process 0 generates
GO = "go"


class Connection:
    """A socket that carries JSON objects, one a line."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._unread = b""
        self._writing = threading.Lock()

    def send(self, **message: object) -> None:
        """Sends `message`. Does not raise if the other side is gone: `read` reports that."""
        with self._writing, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds: float | None) -> dict | None:
        """Returns the next object; {} for a line that is none; None at the end or a timeout.

        `seconds` limits the whole wait, however slowly bytes arrive; None waits without limit.
        """
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
            message = json.loads(line.decode())
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def keep_alive(self) -> None:
        """Lets the connection idle; the loss of the other host is noticed within a minute."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class Peers:
    """This process's connections: process 0's to all others, or another's to process 0.

    A thread listens on each. If a peer disconnects without `done`, this process ends.
    """

    def __init__(self, connections: dict[int, Connection], names: dict[int, str]):
        self.stopping = False  # True once another process has requested a stop
        self._connections = connections
        self._names = names
        self._done = set()
        for connection in connections.values():
            connection.keep_alive()
        for process in connections:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def send(self, **message: object) -> None:
        """Sends `message` to every peer."""
        for connection in self._connections.values():
            connection.send(**message)

    def end(self, reason: str) -> None:
        """Sends `reason` to every peer and exits this process with status 1.

        It exits without cleaning up, because the main thread may wait forever in a collective.
        """
        self.send(lost=reason)
        text = f"dcmdp: {reason}; the same commands go on from the last checkpoint\n"
        os.write(2, text.encode(errors="replace"))
        os._exit(1)

    def _listen(self, process: int) -> None:
        while (message := self._connections[process].read(None)) is not None:
            if "lost" in message:
                self.end(printable(message["lost"]))
            if "stop" in message:
                self.stopping = True
                for other in self._connections.keys() - {process}:
                    self._connections[other].send(stop=True)
            if "done" in message:
                self._done.add(process)
        if process not in self._done:
            self.end(f"{self._names[process]} is gone")


def printable(received: object) -> str:
    """Returns what another process sent as one short line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(received)[:SENTENCE])


def join(
    address: str, processes: int, process: int, limit: float, folder: str | os.PathLike
) -> Peers:
    """Connects this process to the others and returns once all are connected.

    Args:
        address: HOST:PORT of process 0.
        processes: number of processes.
        process: number of this process, from 0.
        limit: seconds to wait.
        folder: a folder that all processes share, for the secret if the environment holds none.

    Raises ValueError that names what is missing: the other processes, process 0's host or port, or
    the secret.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator {address!r} is not HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(
            f"process {process} is not one of {processes} processes; they are numbered from 0"
        )
    given = os.environ.get(VARIABLE, "")
    if given and len(given) < SHORTEST:
        raise ValueError(
            f"{VARIABLE} has {len(given)} characters; give all processes one of {SHORTEST} or more"
        )
    file = pathlib.Path(folder) / FILE
    if process:
        return _connect_to_first(
            host.strip("[]"), int(port), processes, process, limit, given, file
        )
    if given:
        return _accept_all(address, int(port), processes, limit, given)
    with _secret_file(file) as secret:
        return _accept_all(address, int(port), processes, limit, secret)


@contextlib.contextmanager
def _secret_file(file: pathlib.Path) -> Iterator[str]:
    """Yields a secret that `file`, readable by this user alone, holds until the end of the body.

    A complete secret that a killed process left in `file` is used again.
    """
    created = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    secret = _read_secret(file)
    if not secret:
        file.unlink(missing_ok=True)
        secret = secrets.token_hex(FILE_SECRET // 2)
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
            new.write(secret)
    try:
        yield secret
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody may have put a file there
            for folder in created:
                folder.rmdir()


def _read_secret(file: pathlib.Path) -> str:
    """Returns the secret in `file`, or "" if there is no file or no complete secret in it."""
    try:
        secret = file.read_text()
    except (OSError, ValueError):  # no file, or no text in it
        return ""
    return secret if len(secret) == FILE_SECRET else ""


def _proof(secret: str, *words: object) -> str:
    return hmac.new(secret.encode(), json.dumps(words).encode(), "sha256").hexdigest()


def _is_proof(received: object, expected: str) -> bool:
    encoded = str(received).encode(errors="replace")
    return hmac.compare_digest(encoded, expected.encode())


class Applicant(NamedTuple):
    """A process that has proved that it knows the secret."""

    connection: Connection
    process: int
    processes: int
    host: str
    nonces: tuple[str, str]  # process 0's and the applicant's

    def answer(self, secret: str, answer: str) -> None:
        """Sends `GO`, or why the process is refused."""
        self.connection.send(answer=answer, proof=_proof(secret, *self.nonces, answer))


def _accept_all(address: str, port: int, processes: int, limit: float, secret: str) -> Peers:
    """Process 0: accepts the others.

    Each connection is greeted in a thread of its own, so that none waits for a stranger's.
    """
    deadline = time.monotonic() + limit
    members: dict[int, Applicant] = {}
    applicants: queue.Queue[Applicant] = queue.Queue()
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
        while len(members) < processes - 1:
            if greetings.acquire(timeout=POLL_SECONDS):
                _accept(server, secret, applicants, strangers, greetings)
            while not applicants.empty():
                _admit(applicants.get(), members, processes, secret)
            if time.monotonic() > deadline:
                missing = [i for i in range(1, processes) if i not in members]
                reason = _timed_out(missing, processes, address, limit, len(strangers))
                _refuse(members.values(), secret, reason)
    for member in members.values():
        member.answer(secret, GO)
    return Peers(
        {i: member.connection for i, member in members.items()},
        {i: f"process {i} on {member.host}" for i, member in members.items()},
    )


def _timed_out(
    missing: list[int], processes: int, address: str, limit: float, strangers: int
) -> str:
    """Returns the message of a rendezvous to which not all processes came in time."""
    reason = (
        f"process {', '.join(map(str, missing))} of {processes} did not connect to {address} "
        f"within {limit:g} s; start what is missing, and see that its --coordinator is right and "
        "the port is open"
    )
    if strangers:
        were = "connections were" if strangers > 1 else "connection was"
        reason += f"; {strangers} {were} refused without the run's secret"
    return reason


def _accept(
    server: socket.socket,
    secret: str,
    applicants: queue.Queue[Applicant],
    strangers: list[str],
    greetings: threading.BoundedSemaphore,
) -> None:
    """Accepts a connection, if there is one, and greets it in a thread.

    That thread adds to `applicants` or `strangers`, and releases `greetings`.
    """

    def greet() -> None:
        connection = Connection(connected)
        applicant, sent_anything = _challenge(connection, secret)
        greetings.release()
        if applicant:
            applicants.put(applicant)
            return
        connection.close()
        if not sent_anything:
            return
        strangers.append(origin)
        if len(strangers) == 1:
            print(
                f"dcmdp: a connection from {origin} without the run's secret was refused; further "
                "ones are counted, not printed",
                file=sys.stderr,
                flush=True,
            )

    try:
        connected, (origin, *_) = server.accept()
    except OSError:  # nobody connected, or whoever did is gone
        greetings.release()
        return
    threading.Thread(target=greet, daemon=True).start()


def _challenge(connection: Connection, secret: str) -> tuple[Applicant | None, bool]:
    """Returns the applicant, or None for a stranger, and whether the other side sent anything."""
    nonce = secrets.token_hex(16)
    connection.send(nonce=nonce)
    greeting = connection.read(GREETING_SECONDS)
    if greeting is None:
        return None, False
    words = [greeting.get(name) for name in ("nonce", "process", "processes", "host")]
    if [type(word) for word in words] != [str, int, int, str]:
        return None, True
    if not _is_proof(greeting.get("proof"), _proof(secret, nonce, *words)):
        return None, True
    own_nonce, process, processes, host = words
    nonces = (nonce, own_nonce)
    return Applicant(connection, process, processes, printable(host), nonces), True


def _admit(
    applicant: Applicant, members: dict[int, Applicant], processes: int, secret: str
) -> None:
    """Adds `applicant` to `members`. Raises ValueError on all processes if it does not fit."""
    i = applicant.process
    if i in members:
        why = f"has been started twice, on {members[i].host} and {applicant.host}"
    elif applicant.processes != processes or not 0 < i < processes:
        why = (
            f"on {applicant.host} was started as one of {applicant.processes} processes, process 0 "
            f"as one of {processes}"
        )
    else:
        members[i] = applicant
        return
    everybody = [*members.values(), applicant]
    _refuse(everybody, secret, f"process {i} {why}; stop all and start each once")


def _refuse(applicants: Iterable[Applicant], secret: str, reason: str) -> None:
    """Sends `reason` to the applicants and raises it here."""
    for applicant in applicants:
        applicant.answer(secret, printable(reason))
    raise ValueError(reason)


def _connect_to_first(
    host: str, port: int, processes: int, process: int, limit: float, given: str, file: pathlib.Path
) -> Peers:
    """Every other process: connects to process 0 and waits for its answer."""
    deadline = time.monotonic() + limit
    own_host = socket.gethostname()
    while True:
        connection = Connection(_connect(host, port, process, limit, deadline))
        nonce = (connection.read(limit + SLACK_SECONDS) or {}).get("nonce")
        if not isinstance(nonce, str):
            raise ValueError(
                f"process {process} reached {host}:{port}, but what answers there is "
                "no process 0 of this run, or has stopped; see its output"
            )
        if secret := given or _read_secret(file):
            break
        # A shared folder may show the file late, and process 0 does not wait for a greeting.
        connection.close()
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {process} finds no {file.absolute()}, where process 0 keeps "
                "the run's secret: the folder is not on a file system shared with "
                f"process 0, or process 0 has {VARIABLE} set; give another --workdir, "
                f"or all processes the same {VARIABLE}"
            )
        time.sleep(RETRY_SECONDS)
    own_nonce = secrets.token_hex(16)
    connection.send(
        process=process,
        processes=processes,
        host=own_host,
        nonce=own_nonce,
        proof=_proof(secret, nonce, own_nonce, process, processes, own_host),
    )
    reply = connection.read(limit + SLACK_SECONDS) or {}
    answer = str(reply.get("answer"))
    if not _is_proof(reply.get("proof"), _proof(secret, nonce, own_nonce, answer)):
        raise ValueError(
            f"process {process} was not accepted at {host}:{port}: process 0 there has "
            "another secret, or has stopped; give all the same --workdir, on a shared "
            f"file system, or the same {VARIABLE}, and see its output"
        )
    if answer != GO:
        raise ValueError(printable(answer))
    return Peers({0: connection}, {0: f"process 0 at {host}:{port}"})


def _connect(host: str, port: int, process: int, limit: float, deadline: float) -> socket.socket:
    """Returns a connection to process 0; tries again until `deadline`."""
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
