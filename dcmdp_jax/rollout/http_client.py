"""Requests to a server that answers JSON: in parallel, bounded, repeated where that helps.

An answer belongs to the request that it was given to: what comes late, on a connection that was
given up, is never read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dcmdp_jax.stopping import Interrupted

POLL_SECONDS = 0.1  # between two looks at `should_stop`
BAD_REPLIES = 2  # replies of the wrong form after which no other is asked for
ERRORS = 3  # likewise, replies with an error of the server
BUSY = (408, 425, 429, 502, 503, 504)  # statuses of a server that can answer later
LONGEST = 300  # characters of a server's message in ours


class ServerError(ValueError):
    """A server cannot be reached, or does not answer as it should."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status  # of HTTP, where it is why


class BadReply(ValueError):
    """What is wrong with the form of a reply, in the words that follow "its reply"."""


class Call(NamedTuple):
    """A request."""

    method: str  # "GET" or "POST"
    path: str
    body: Any = None  # is sent as JSON


class _Failure(Exception):
    """An attempt that another one may make good, and what to do if it does not."""

    def __init__(self, what: str, remedy: str, attempts: int):
        super().__init__(what)
        self.remedy = remedy
        self.attempts = attempts  # that are made in all


class Client:
    """A server at `url`."""

    def __init__(
        self,
        url: str,
        name: str = "the server",
        *,
        connections: int = 64,
        timeout: float = 600.0,
        attempts: int = 10,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
    ):
        """Sends nothing.

        Args:
            name: of the server in messages.
            connections: requests that are under way at once, at most.
            timeout: seconds without a byte after which an attempt has failed.
            attempts: of a request; with 10 the last is made two minutes after the first.
            first_wait: seconds before the second attempt, doubled at each further one.
            longest_wait: seconds between two attempts, at most.

        Raises ValueError if the library for HTTP is not installed or `url` is not one.
        """
        self._http = _import("httpx2")
        self._anyio = _import("anyio")
        self._threads = _import("anyio.from_thread")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of a server; give http://HOST:PORT")
        self.url = url.rstrip("/")
        self.name = name
        self.connections = connections
        self.timeout = timeout
        self.attempts = attempts
        self.first_wait = first_wait
        self.longest_wait = longest_wait

    def get(
        self,
        path: str,
        should_stop: Callable[[], bool] = lambda: False,
        attempts: int | None = None,
    ) -> Any:
        """Returns the JSON at `path`. Raises as `send` does."""
        return self.send([Call("GET", path)], should_stop=should_stop, attempts=attempts)[0]

    def post(
        self, path: str, body: Any = None, should_stop: Callable[[], bool] = lambda: False
    ) -> Any:
        """Returns the reply to a JSON body. Raises as `send` does."""
        return self.send([Call("POST", path, body)], should_stop=should_stop)[0]

    def post_once(self, path: str, body: Any = None) -> None:
        """Posts without another attempt; what goes wrong is not raised. For cleaning up."""
        with contextlib.suppress(ServerError):
            self.send([Call("POST", path, body)], attempts=1)

    def send(
        self,
        calls: Sequence[Call],
        read: Callable[[Any, int], Any] = lambda reply, number: reply,
        should_stop: Callable[[], bool] = lambda: False,
        attempts: int | None = None,
    ) -> list[Any]:
        """Sends all of `calls`, and returns what `read` makes of their replies, in their order.

        Refused connections, time-outs, cut replies and errors of the server are waited out: a
        request is repeated after `first_wait` seconds, then after twice as long each time, at most
        `longest_wait`.

        Args:
            read: called with the JSON value of a reply and the number of its call; raises BadReply
                if it is not of the right form.
            should_stop: polled; true cancels the requests that are under way.

        Raises ServerError, in one sentence, where a request fails for good; the others are then
        cancelled. Raises `Interrupted` if `should_stop()`.
        """
        attempts = attempts or self.attempts
        with self._threads.start_blocking_portal() as portal:
            work = portal.start_task_soon(self._send_all, calls, read, attempts)
            while not concurrent.futures.wait([work], POLL_SECONDS).done:
                if should_stop():
                    work.cancel()
                    raise Interrupted("stopped while a server sampled")
            return work.result()

    async def _send_all(self, calls: Sequence[Call], read: Callable, attempts: int) -> list[Any]:
        results = [None] * len(calls)
        gate = self._anyio.Semaphore(self.connections)
        http = self._http.AsyncClient(
            base_url=self.url,
            timeout=self.timeout,
            limits=self._http.Limits(max_connections=self.connections),
            trust_env=False,  # no proxy stands between a trainer and its server
            verify=self.url.startswith("https:"),  # certificates take long to read
        )

        async def one(number: int) -> None:
            results[number] = await self._until_answered(
                http, gate, calls[number], lambda reply: read(reply, number), attempts
            )

        async with http:
            try:
                async with self._anyio.create_task_group() as group:
                    for number in range(len(calls)):
                        group.start_soon(one, number)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return results

    async def _until_answered(
        self, http: Any, gate: Any, call: Call, read: Callable, attempts: int
    ) -> Any:
        waited = 0.0
        for number in range(1, attempts + 1):
            try:
                async with gate:
                    return await self._attempt(http, call, read, attempts)
            except _Failure as failure:
                if number >= min(failure.attempts, attempts):
                    tried = f" ({number} attempts in {waited:.0f} s)" if number > 1 else ""
                    raise ServerError(
                        f"{self.name} at {self.url} {failure}{tried}; {failure.remedy}"
                    ) from None
            wait = min(self.first_wait * 2 ** (number - 1), self.longest_wait)
            waited += wait
            await self._anyio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, http: Any, call: Call, read: Callable, attempts: int) -> Any:
        """Returns what `read` makes of the reply. Raises _Failure, or ServerError at once where no
        other attempt can help.
        """
        library = self._http
        where = f"{call.method} {call.path}"
        try:
            reply = await http.request(call.method, call.path, json=call.body)
        except library.TimeoutException:
            raise _Failure(
                f"does not answer {where} within {self.timeout:g} s",
                "look at its log, or allow more time (`timeout`) or fewer requests at once "
                "(`connections`)",
                attempts,
            ) from None
        except library.ConnectError as error:
            raise _Failure(
                f"cannot be reached ({_short(str(error))})",
                "start it, or correct its address",
                attempts,
            ) from None
        except (library.TransportError, library.DecodingError) as error:
            raise _Failure(
                f"breaks off its reply to {where} ({_short(str(error)) or type(error).__name__})",
                "look at its log; it may have ended",
                attempts,
            ) from None
        except library.InvalidURL as error:
            raise ServerError(f"{self.url} is no address of a server: {error}") from None
        said = f"answers {where} with status {reply.status_code}: {_short(reply.text)}"
        if reply.status_code in BUSY:
            raise _Failure(said, "look at its log", attempts)
        if reply.status_code >= 500:
            raise _Failure(said, "look at its log", ERRORS)
        if reply.status_code >= 300:
            raise ServerError(f"{self.name} at {self.url} {said}", reply.status_code)
        try:
            return read(_parsed(reply))
        except BadReply as error:
            raise _Failure(
                f"answers {where} in another form than expected: its reply {error}",
                "see docs/servers.md for the servers and versions that are known to work",
                BAD_REPLIES,
            ) from None


def _parsed(reply: Any) -> Any:
    if not reply.content:
        return None
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError):
        raise BadReply(f"is cut off or not JSON ({_short(reply.text)!r})") from None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{name.split('.')[0]} is not installed, and a server is asked through it; "
            "pip install 'dcmdp-jax[server]'"
        ) from None
