"""The sampler of `rollout.server`: which kind of server it is, the server itself tells."""

from __future__ import annotations

from typing import Any

from dcmdp_jax.config import Config
from dcmdp_jax.records import Sampler
from dcmdp_jax.rollout import llama_cpp, server_sampler, sglang, vllm
from dcmdp_jax.rollout.http_client import Client, ServerError
from dcmdp_jax.rollout.server_sampler import Server

SECONDS = 10.0  # for the first answer


def check(config: Config) -> None:
    """Raises ValueError if `rollout.server` does not answer, or cannot do what the run asks."""
    server_sampler.for_run(config, connect(config.rollout.server))


def sampler(config: Config, model: Any, tokenizer: Any, mesh: Any) -> Sampler:
    """Returns the sampler of a run that sets `rollout.server`."""
    rollout = config.rollout
    server = connect(rollout.server)
    return server_sampler.of_run(config, model, tokenizer, server, rollout.weights_folder)


def connect(url: str, **client_options: Any) -> Server:
    """Returns the server at `url`, of whichever kind it is.

    Args:
        client_options: of `http_client.Client`, such as `connections` and `timeout`.

    Raises ServerError if it is neither vLLM, SGLang nor llama.cpp, or does not answer.
    """
    client = Client(url, "the server", timeout=SECONDS, attempts=1)
    for path, kind in (
        ("/get_model_info", sglang),
        ("/model_info", sglang),
        ("/props", llama_cpp),
        ("/version", vllm),
    ):
        try:
            client.get(path)
        except ServerError as error:
            if error.status not in (404, 405):
                raise
        else:
            return kind.connect(url, **client_options)
    raise ServerError(
        f"the server at {url} is neither vLLM nor SGLang nor llama.cpp's llama-server: it has none "
        "of /version, /get_model_info and /props; give the address of one of them"
    )
