"""Requests to a server that answers JSON: in parallel, bounded, repeated where that helps.

An answer belongs to the request that it was given to: what comes late, on a connection that was
given up, is never read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dcmdp_jax.stopping import Interrupted

POLL_SECONDS = 0.1  # between two looks at `should_stop`
BAD_REPLIES = 2  # replies of the wrong form after which no other is asked for
ERRORS = 3  # likewise, replies with an error of the server
TIME_OUTS = 2  # likewise, attempts that were not answered in time
TELL = 5  # attempts of a request that has still failed, after which the wait is printed
CLEANUP_SECONDS = 5.0  # in which a request that cleans up is answered, or never
KEY = "DCMDP_SERVER_API_KEY"  # environment variable
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


class _Limits(NamedTuple):
    """What one call of `send` allows."""

    attempts: int
    time_outs: int
    timeout: float  # seconds


class Client:
    """A server at `url`."""

    def __init__(
        self,
        url: str,
        name: str = "the server",
        *,
        connections: int = 64,
        timeout: float = 600.0,
        attempts: int = 26,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
    ):
        """Sends nothing.

        Args:
            name: of the server in messages.
            connections: requests that are under way at once, at most.
            timeout: seconds without a byte after which an attempt has failed.
            attempts: of a request; the pauses between 26 are ten minutes together.
            first_wait: seconds before the second attempt, doubled at each further one.
            longest_wait: seconds between two attempts, at most.

        A key that the server asks for is read from the environment (`DCMDP_SERVER_API_KEY`).

        Raises ValueError if the library for HTTP is not installed, or if `url` or the key cannot be
        one.
        """
        self._http = _import("httpx2")
        self._anyio = _import("anyio")
        self._threads = _import("anyio.from_thread")
        _check_url(url, self._http)
        self._headers = _headers()
        self.url = url.rstrip("/")
        self.name = name
        self.connections = connections
        self.timeout = timeout
        self.attempts = attempts
        self.first_wait = first_wait
        self.longest_wait = longest_wait
        self._has_told = False  # of the wait, in this call of `send`

    def get(
        self,
        path: str,
        should_stop: Callable[[], bool] = lambda: False,
        attempts: int | None = None,
    ) -> Any:
        """Returns the JSON at `path`. Raises as `send` does."""
        return self.send([Call("GET", path)], should_stop=should_stop, attempts=attempts)[0]

    def post(
        self,
        path: str,
        body: Any = None,
        should_stop: Callable[[], bool] = lambda: False,
        time_outs: int = TIME_OUTS,
        attempts: int | None = None,
    ) -> Any:
        """Returns the reply to a JSON body. Raises as `send` does."""
        calls = [Call("POST", path, body)]
        return self.send(calls, should_stop=should_stop, time_outs=time_outs, attempts=attempts)[0]

    def post_once(self, path: str, body: Any = None) -> None:
        """Posts without another attempt; what goes wrong is not raised. For cleaning up."""
        with contextlib.suppress(ServerError):
            self.send([Call("POST", path, body)], attempts=1, timeout=CLEANUP_SECONDS)

    def send(
        self,
        calls: Sequence[Call],
        read: Callable[[Any, int], Any] = lambda reply, number: reply,
        should_stop: Callable[[], bool] = lambda: False,
        attempts: int | None = None,
        time_outs: int = TIME_OUTS,
        timeout: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Sends all of `calls`, and returns what `read` makes of their replies, in their order.

        A request is repeated after pauses (`first_wait`, `longest_wait`): `attempts` times in all
        where the server cannot be reached, is busy or breaks off its reply; ERRORS times where it
        reports an error of its own; TIME_OUTS times where it does not answer in time; BAD_REPLIES
        times where its reply has the wrong form.

        Args:
            read: called with the JSON value of a reply and the number of its call; raises BadReply
                if it is not of the right form.
            should_stop: polled; true cancels the requests that are under way.
            time_outs: attempts that time out; 1 for what must not run twice at the same time.
            timeout: in the place of the client's.
            meanwhile: called again and again while requests are under way, from the caller's
                thread; may send others.

        Raises ServerError, in one sentence, where a request fails for good; the others are then
        cancelled. Raises `Interrupted` if `should_stop()`, and whatever `meanwhile` raises.
        """
        self._has_told = False
        limits = _Limits(attempts or self.attempts, time_outs, timeout or self.timeout)
        with self._threads.start_blocking_portal() as portal:
            work = portal.start_task_soon(self._send_all, calls, read, limits)
            while not concurrent.futures.wait([work], POLL_SECONDS).done:
                try:
                    if should_stop():
                        raise Interrupted(f"stopped while {self.name} at {self.url} was asked")
                    meanwhile()
                except BaseException:
                    work.cancel()
                    raise
            return work.result()

    async def _send_all(self, calls: Sequence[Call], read: Callable, limits: _Limits) -> list[Any]:
        results = [None] * len(calls)
        gate = self._anyio.Semaphore(self.connections)
        http = self._http.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=limits.timeout,
            limits=self._http.Limits(max_connections=self.connections),
            trust_env=False,  # no proxy stands between a trainer and its server
            verify=self.url.startswith("https:"),  # certificates take long to read
        )

        async def one(number: int) -> None:
            results[number] = await self._until_answered(
                http, gate, calls[number], lambda reply: read(reply, number), limits
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
        self, http: Any, gate: Any, call: Call, read: Callable, limits: _Limits
    ) -> Any:
        started = time.monotonic()
        for number in range(1, limits.attempts + 1):
            try:
                async with gate:
                    return await self._attempt(http, call, read, limits)
            except _Failure as failure:
                if number >= min(failure.attempts, limits.attempts):
                    seconds = time.monotonic() - started
                    tried = f" ({number} attempts in {seconds:.0f} s)" if number > 1 else ""
                    raise ServerError(
                        f"{self.name} at {self.url} {failure}{tried}; {failure.remedy}"
                    ) from None
                if number == TELL and not self._has_told:
                    self._has_told = True
                    waiting = f"waiting for {self.name} at {self.url}, which {failure}"
                    print(waiting, file=sys.stderr)
            await self._anyio.sleep(min(self.first_wait * 2 ** (number - 1), self.longest_wait))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, http: Any, call: Call, read: Callable, limits: _Limits) -> Any:
        """Returns what `read` makes of the reply. Raises _Failure, or ServerError at once where no
        other attempt can help.
        """
        library = self._http
        where = f"{call.method} {call.path}"
        try:
            reply = await http.request(call.method, call.path, json=call.body)
        except library.TimeoutException:
            raise _Failure(
                f"does not answer {where} within {limits.timeout:g} s",
                "look at its log; an experiment can allow more time or fewer requests at once, by "
                "`timeout` and `connections` (see docs/servers.md)",
                limits.time_outs,
            ) from None
        except library.ConnectError as error:
            raise _Failure(
                f"cannot be reached ({_short(str(error))})",
                "start it, or correct its address",
                limits.attempts,
            ) from None
        except (library.TransportError, library.DecodingError) as error:
            raise _Failure(
                f"breaks off its reply to {where} ({_short(str(error)) or type(error).__name__})",
                "look at its log; it may have ended",
                limits.attempts,
            ) from None
        said = f"answers {where} with status {reply.status_code}: {_short(reply.text)}"
        if reply.status_code in BUSY:
            raise _Failure(said, "look at its log", limits.attempts)
        if reply.status_code >= 500:
            raise _Failure(said, "look at its log", ERRORS)
        if reply.status_code >= 300:
            raise ServerError(
                f"{self.name} at {self.url} {said}; {self._remedy(reply)}", reply.status_code
            )
        try:
            return read(_parsed(reply))
        except BadReply as error:
            raise _Failure(
                f"answers {where} in another form than expected: its reply {error}",
                "see docs/servers.md for the servers and versions that are known to work",
                BAD_REPLIES,
            ) from None

    def _remedy(self, reply: Any) -> str:
        """Returns what to do about a status from 300 to 499."""
        if reply.status_code < 400:
            target = _short(reply.headers.get("location", ""))
            return (
                f"give the address that it points to ({target})"
                if target
                else "give another address"
            )
        if reply.status_code in (401, 403):
            key = "another key" if self._headers else "a key"
            return f"it asks for {key}; set {KEY} in the environment to the server's own"
        return "look at its log, and see docs/servers.md for the versions that are known to work"


def _check_url(url: str, library: Any) -> None:
    """Raises ValueError if `url` is not http://HOST:PORT or https://HOST:PORT."""
    advice = "give http://HOST:PORT"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no address of a server; {advice}")
    try:
        parts = library.URL(url)
    except library.InvalidURL as error:
        raise ValueError(f"{url!r} is no address of a server ({error}); {advice}") from None
    if not parts.host:
        raise ValueError(f"{url!r} is no address of a server (it has no host); {advice}")
    if parts.port is not None and not 1 <= parts.port < 2**16:
        raise ValueError(
            f"{url!r} is no address of a server (its port is not in 1..65535); {advice}"
        )


def _headers() -> dict[str, str]:
    """Returns the headers of all requests. Raises ValueError if the key cannot be in one."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEY} holds characters that no key of a server has; set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


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
