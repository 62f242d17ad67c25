"""The process that renders chat templates: `chat_template.py` runs this file.

`chat_renderer.py SECONDS` writes `ready` and answers each line of standard input, a JSON object
with a template's source and its settings, with a line of JSON. It ends with its input, and by
SIGPROF if a conversation takes more than SECONDS of processor time.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 512 << 20  # bytes of address space
LENGTH = 4 << 20  # characters of one conversation
MESSAGE = 300  # characters of a template's own error message


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's message; its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        """Returns the node of one block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache
def _compiled(source: str) -> Any:
    """Returns a template in jinja2's sandbox, with the functions that transformers provides."""

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
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment.from_string(source)


class _Refused(Exception):
    """Raised by a template about a conversation."""


def _rendered(source: str, settings: dict, seconds: float) -> dict:
    """Returns the reply to one request: a text, or what is wrong with the template."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal ends the process
    try:
        pieces = []
        length = 0
        for piece in _compiled(source).generate(**settings):
            pieces.append(piece)
            length += len(piece)
            if length > LENGTH:
                what = f"writes more than {LENGTH >> 20} Mi characters"
                return {"error": f"{what} for one conversation"}
        return {"text": "".join(pieces)}
    except _Refused as error:
        return {"error": f"refuses the conversation: {_one_line(error)}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is not valid jinja2: {_one_line(error)}"}
    except MemoryError:
        return {"error": f"takes more than {MEMORY >> 20} MiB of memory for one conversation"}
    except Exception as error:  # a template may raise anything
        return {"error": f"fails with {type(error).__name__}: {_one_line(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _one_line(error: Exception) -> str:
    """Returns an error's message on one line, without terminal control characters."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:MESSAGE])


def _serve(seconds: float) -> None:
    """Sets the limits and answers the lines of standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the parent may ignore it, which is inherited
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        reply = _rendered(**json.loads(line), seconds=seconds)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
