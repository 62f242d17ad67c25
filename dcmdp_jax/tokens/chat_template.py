"""Chat templates: programs from a model folder, run with limits in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dcmdp_jax.answers.worker import NotReady, ProcessEnded, Worker

_SECONDS = 1.0  # of processor time for one conversation
_TIMEOUT = 60.0  # seconds after which a process that does not answer is ended

# -P: the package's folder is not on the import path
_COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("chat_renderer.py")))


class ChatTemplate:
    """The chat template of a folder.

    Renders conversations as transformers does; one process serves all of them.
    """

    def __init__(self, source: str, folder: str | pathlib.Path):
        if importlib.util.find_spec("jinja2") is None:
            raise ValueError("jinja2 is not installed; pip install 'dcmdp-jax[train]'")
        self._source = source
        self._folder = folder
        self._worker = Worker([*_COMMAND, str(_SECONDS)], _TIMEOUT)

    def render(self, messages: Sequence[Mapping], **settings: Any) -> str:
        """Returns the conversation as text.

        Raises ValueError if the template fails, refuses or exceeds a limit.
        """
        request = {
            "source": self._source,
            "settings": {"messages": messages, "tools": None, "documents": None} | settings,
        }
        reply = self._ask(json.dumps(request).encode())
        if "error" in reply:
            raise ValueError(f"the chat template of {self._folder} {reply['error']}")
        return reply["text"]

    def _ask(self, request: bytes) -> dict:
        """Returns the reply of the process, or an error in the same form."""
        try:
            return json.loads(self._worker.ask(request))
        except ProcessEnded as error:
            what = f"ended its process with status {error.status}"
            if error.status == -signal.SIGPROF:
                what = f"takes more than {_SECONDS:g} s for one conversation"
        except (TimeoutError, NotReady) as error:
            what = f"cannot be rendered ({error})"
        return {"error": f"{what}; fix it, or set data.chat=False"}
