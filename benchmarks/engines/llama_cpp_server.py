"""llama.cpp's server on this machine's CPU, in a process of its own; see install_llama_cpp.sh."""

from __future__ import annotations

import json
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from benchmarks.engines.process import ServerProcess, free_port

HERE = pathlib.Path(__file__).parent.resolve()
ENVIRONMENT = HERE.parents[1] / "runs" / "engines" / "llama_cpp"
PYTHON = ENVIRONMENT / "bin" / "python"
MISSING = (
    f"{ENVIRONMENT} holds no llama.cpp; install it: bash benchmarks/engines/install_llama_cpp.sh"
)


class Server(ServerProcess):
    """A llama.cpp server that is ready at `url` until `stop`, or the end of a `with` statement."""

    def __init__(
        self,
        folder: pathlib.Path,
        options: Sequence[str] = (),
        port: int = 0,
        *,
        log: pathlib.Path,
        seconds: float = 60.0,
    ):
        """Starts a server and waits until it is ready.

        Args:
          folder: a Hugging Face model folder, a dense Qwen3; it needs no tokenizer.
          options: words of serve_gguf.py's command line, such as ("--weights", "Q8_0").
          port: 0 takes a free one.
          log: receives the server's output.
          seconds: how long to wait.

        Raises RuntimeError if the server ends or is not ready in time.
        """
        if not PYTHON.exists():
            raise RuntimeError(MISSING)
        port = port or free_port()
        script = [str(PYTHON), str(HERE / "serve_gguf.py"), str(pathlib.Path(folder).resolve())]
        command = [*script, "--port", str(port), *options]
        env = os.environ | {"PYTHONPATH": ""}
        super().__init__("llama.cpp", command, port, env=env, log=log, seconds=seconds)

    def serve(self, folder: pathlib.Path, seconds: float = 60.0) -> None:
        """Has the server serve another folder, and waits until it does.

        Raises RuntimeError if it does not in time.
        """
        folder = pathlib.Path(folder).resolve()
        self.process.stdin.write(f"{folder}\n".encode())
        self.process.stdin.flush()
        end = time.monotonic() + seconds
        while served_folder(self.url) != folder:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"llama.cpp does not serve {folder}; look at its log")
            time.sleep(0.01)


def served_folder(url: str) -> pathlib.Path | None:
    """Returns the folder of the file that the llama.cpp server at `url` serves; None if it is not
    ready.
    """
    try:
        with urllib.request.urlopen(f"{url}/props", timeout=5) as reply:
            return pathlib.Path(json.load(reply)["model_path"]).parent
    except (urllib.error.URLError, OSError):
        return None
