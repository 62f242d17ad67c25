"""Chat templates, programs that a folder brings: jinja2 in a process of its own, with limits.

The same file is both sides. The process imports the standard library and jinja2 alone, answers a
line of JSON with a line of JSON, and ends when its input does.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 1.0  # of processor time for one conversation
PATIENCE = 60.0  # seconds until a process that does not answer at all is given up
MEMORY = 512 << 20  # bytes of address space
LENGTH = 4 << 20  # characters of one conversation
TOLD = 300  # characters of a template's own error message


class Template:
    """The chat template of a folder.

    Renders conversations as transformers does; one process serves them all.
    """

    def __init__(self, source: str, folder: str | pathlib.Path):
        if importlib.util.find_spec("jinja2") is None:
            raise ValueError("jinja2 is not installed; pip install 'dcmdp-jax[train]'")
        self._source, self._folder = source, folder
        self._process: subprocess.Popen | None = None
        self._finalizer = None

    def render(self, messages: Sequence[Mapping], **settings: Any) -> str:
        """The conversation as text.

        Raises ValueError where the template fails, refuses or exceeds a limit.
        """
        request = {
            "source": self._source,
            "settings": {"messages": messages, "tools": None, "documents": None} | settings,
        }
        reply = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in reply:
            raise ValueError(f"the chat template of {self._folder} {reply['error']}")
        return reply["text"]

    def _ask(self, request: bytes) -> dict:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            return json.loads(line)
        self._finalizer()
        ended, self._process = self._process.returncode, None
        what = f"ended its process with status {ended}"
        if ended == -signal.SIGPROF:
            what = f"takes more than {SECONDS:g} s for one conversation"
        return {"error": f"{what}; mend it, or set data.chat=False"}

    def _start(self) -> None:
        # -P: nothing is imported from the package's folder; own session: Ctrl-C is not for it
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _end, self._process)

    def _line(self) -> bytes:
        """What the process writes next, up to a newline; less where it ends or falls silent."""
        output, read = self._process.stdout.fileno(), []
        while select.select([output], [], [], PATIENCE)[0]:
            part = os.read(output, 1 << 16)
            read.append(part)
            if not part or part.endswith(b"\n"):
                break
        return b"".join(read)


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()  # the process ends by itself, unless it hangs
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


# In the process


@functools.lru_cache
def _compiled(source: str) -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant said; its body is rendered as it stands."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes HTML, which a chat template must not do
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise _Refused(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment.from_string(source)


class _Refused(Exception):
    """Raised by a template, about a conversation."""


def _rendered(source: str, settings: dict) -> dict:
    """The reply to one request: a text, or what the template does wrong."""
    import jinja2

    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
    try:
        pieces, length = [], 0
        for piece in _compiled(source).generate(**settings):
            pieces.append(piece)
            length += len(piece)
            if length > LENGTH:
                what = f"writes more than {LENGTH >> 20} Mi characters"
                return {"error": f"{what} for one conversation"}
        return {"text": "".join(pieces)}
    except _Refused as error:
        return {"error": f"refuses the conversation: {_told(error)}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is not valid jinja2: {_told(error)}"}
    except MemoryError:
        return {"error": f"takes more than {MEMORY >> 20} MiB of memory for one conversation"}
    except Exception as error:  # whatever a stranger's program raises is told, not hidden
        return {"error": f"fails with {type(error).__name__}: {_told(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _told(error: Exception) -> str:
    """An error's message on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:TOLD])


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(_rendered(**json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
