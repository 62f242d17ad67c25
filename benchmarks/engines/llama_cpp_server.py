"""llama.cpp's server on this machine's CPU, in a process of its own; see install_llama_cpp.sh."""

from __future__ import annotations

import os
import pathlib
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
        *,
        log: pathlib.Path,
        seconds: float = 60.0,
    ):
        """Starts a server and waits until it is ready.

        Args:
          folder: a Hugging Face model folder, a dense Qwen3; it needs no tokenizer.
          options: words of serve_gguf.py's command line, such as ("--weights", "Q8_0").
          log: receives the server's output.
          seconds: how long to wait.

        Raises RuntimeError if the server ends or is not ready in time.
        """
        if not PYTHON.exists():
            raise RuntimeError(MISSING)
        port = free_port()
        script = [str(PYTHON), str(HERE / "serve_gguf.py"), str(pathlib.Path(folder).resolve())]
        command = [*script, "--port", str(port), *options]
        env = os.environ | {"PYTHONPATH": ""}
        super().__init__("llama.cpp", command, port, env=env, log=log, seconds=seconds)
