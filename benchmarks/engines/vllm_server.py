"""A vLLM server on this machine's CPU, in a process of its own.

    bash benchmarks/engines/install_vllm.sh
    python -m benchmarks.engines.vllm_server MODEL --dtype bfloat16 -- COMMAND...

serves MODEL while COMMAND runs, and returns its status; without COMMAND it serves until Ctrl-C.
MODEL is a Hugging Face folder, or an experiment or study, whose model it then serves with random
weights until a run gives it others. Options that --help does not list are vLLM's. Log-probs are of
the distribution that tokens are drawn from.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.engines.process import ServerProcess, free_port
from dcmdp_jax.config import Config, WarmupConfig
from dcmdp_jax.experiment import run_file
from dcmdp_jax.run.export import warm_start

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = REPOSITORY / "runs" / "engines" / "vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
MISSING = f"{ENVIRONMENT} holds no vLLM; install it: bash benchmarks/engines/install_vllm.sh"


class Server(ServerProcess):
    """A vLLM server that is ready at `url` until `stop`, or the end of a `with` statement."""

    def __init__(
        self,
        folder: pathlib.Path,
        options: Sequence[str] = (),
        port: int = 0,
        *,
        log: pathlib.Path,
        seconds: float = 600.0,
    ):
        """Starts a server and waits until it is ready.

        Args:
          folder: a Hugging Face model folder; it needs no tokenizer.
          options: words of vLLM's command line, such as ("--dtype", "bfloat16").
          port: 0 takes a free one.
          log: receives the server's output.
          seconds: how long to wait.

        Raises RuntimeError if another program listens on the port, or if the server ends or is not
        ready in time.
        """
        if not PYTHON.exists():
            raise RuntimeError(MISSING)
        if port and is_taken(port):
            raise RuntimeError(
                f"another program listens on port {port}, which requests would reach instead of "
                "this vLLM; end it, or choose another port (--port)"
            )
        port = port or free_port()
        command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(pathlib.Path(folder).resolve()), "--served-model-name", "policy"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--max-model-len", "512", "--max-num-seqs", "128"),
            *("--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching"),
            *("--generation-config", "vllm", "--skip-tokenizer-init", "--enforce-eager"),
            *options,
        ]
        super().__init__("vLLM", command, port, env=environment(), log=log, seconds=seconds)


def environment() -> dict[str, str]:
    """Returns the environment of a server: one thread, no download, weights may be replaced."""
    return os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }


def is_taken(port: int) -> bool:
    """Returns True if a program of this machine listens on the port."""
    with socket.socket() as connection:
        connection.settimeout(5)
        return connection.connect_ex(("127.0.0.1", port)) == 0


def random_model(config: Config, folder: pathlib.Path) -> pathlib.Path:
    """Writes a model of the shape of `config` into a new folder within `folder`; returns it."""
    cold = dataclasses.replace(config, warmup=WarmupConfig())
    warm_start(cold, folder, lambda params: params)
    return folder / "model"


def config_of(file: pathlib.Path) -> Config:
    """Returns the configuration of an experiment, or of a study's first arm."""
    names = run_file(str(file), "experiment")
    return names["CONFIG"] if "CONFIG" in names else next(iter(names["STUDY"].arms.values()))


def stop_servers_on_sigterm() -> None:
    """Has SIGTERM leave `with` statements, as Ctrl-C does, so that no server outlives them."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> int:
    stop_servers_on_sigterm()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--log", type=pathlib.Path, default=ENVIRONMENT.with_suffix(".log"))
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_known_args(words[:end])
    command = words[end + 1 :]
    with contextlib.ExitStack() as stack:
        folder = args.model
        if folder.suffix == ".py":
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder = random_model(config_of(folder), pathlib.Path(scratch))
        server = stack.enter_context(Server(folder, options, args.port, log=args.log.resolve()))
        print(f"vLLM is ready at {server.url}", flush=True)
        if command:
            process = subprocess.Popen(command)
            # COMMAND gets Ctrl-C, too; the server answers until it has ended
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
            return process.wait()
        with contextlib.suppress(KeyboardInterrupt):
            server.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
