"""SGLang, in a version that names its weights (`weight_version`); see docs/servers.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from dcmdp_jax.config import Config
from dcmdp_jax.records import Sampler
from dcmdp_jax.rollout import server_sampler
from dcmdp_jax.rollout.http_client import BadReply, Client, ServerError
from dcmdp_jax.rollout.server_sampler import Reply, Request


def sglang(url: str, weights_folder: str = "", **client_options: Any) -> Callable[..., Sampler]:
    """Returns a `RolloutConfig.sampler` that samples from the SGLang server at `url`.

    Args:
        weights_folder: see `server_sampler.ServerSampler`.
        client_options: of `http_client.Client`, such as `connections` and `timeout`.
    """

    def make(config: Config, model: Any, tokenizer: Any, mesh: Any) -> Sampler:
        server = connect(url, **client_options)
        return server_sampler.of_run(config, model, tokenizer, server, weights_folder)

    return make


def connect(url: str, **client_options: Any) -> Server:
    """Returns the SGLang server at `url`. Raises ServerError if it is not there."""
    return Server(Client(url, "SGLang", **client_options))


class Server:
    """A `server_sampler.Server`."""

    path = "/generate"
    loads_weights = True

    def __init__(self, client: Client):
        """Asks the server for its model, to find out whether it is there."""
        self.client = client
        self._about(attempts=1)

    def body(self, request: Request) -> dict:
        """Returns the body of a request.

        `ignore_eos` would have the server ignore `stop_token_ids` as well.
        """
        sampling = request.sampling
        return {
            "input_ids": request.prompt,
            "return_logprob": True,
            "stream": False,
            "sampling_params": {
                "max_new_tokens": request.max_tokens,
                "temperature": float(sampling.temperature),
                "top_k": int(sampling.top_k) or -1,
                "top_p": float(sampling.top_p),
                "min_p": float(sampling.min_p),
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "sampling_seed": request.seed,  # read with --enable-deterministic-inference
                "stop_token_ids": list(request.stop_ids),
                "stop": list(request.stop_strings),
                "skip_special_tokens": False,  # they are text in which stop strings are found
            },
        }

    def read(self, reply: Any, request: Request) -> Reply:
        """Returns the completion in a reply.

        Ids and log-probs come from one list, which the stop token is in, too; `output_ids` may lack
        it.
        """
        try:
            about = reply["meta_info"]
            pairs = [(item[0], item[1]) for item in about["output_token_logprobs"]]
            reason = about["finish_reason"]["type"]
            prompt_tokens = about["prompt_tokens"]
            label = about.get("weight_version")  # None in versions that name no weights
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BadReply(
                "has no meta_info with output_token_logprobs, finish_reason and prompt_tokens"
            ) from None
        if prompt_tokens != len(request.prompt):
            raise BadReply(
                f"is to a prompt of {prompt_tokens!r:.20} tokens, not of {len(request.prompt)}"
            )
        if reason not in ("stop", "length"):
            raise BadReply(f"ends by {reason!r:.40}, not by a stop token, text or the length")
        tokens = [token for _, token in pairs]
        labels = [] if label is None else [str(label)] * len(tokens)
        return Reply(tokens, [logp for logp, _ in pairs], reason == "stop", labels)

    def in_flight(self) -> Server:
        """Raises ServerError: a reply names the weights of its last token alone."""
        raise server_sampler.no_in_flight(self)

    def load(self, folder: pathlib.Path, label: str, should_stop: Callable[[], bool]) -> None:
        """Pauses the server, has it read the folder and name its weights, and continues it.

        One request reads and names, so that a restart never leaves the name with other weights.
        """
        client = self.client
        try:
            client.post("/pause_generation", {"mode": "abort"}, should_stop)
            client.post(
                "/update_weights_from_disk",
                {"model_path": str(folder), "weight_version": label, "flush_cache": True},
                should_stop,
                time_outs=1,
            )
        except BaseException as error:
            client.post_once("/continue_generation", {})
            if isinstance(error, ServerError) and error.status == 400:
                raise ServerError(
                    f"{error}; give a rollout.weights_folder that it sees under the same path"
                ) from None
            raise
        client.post("/continue_generation", {}, should_stop)

    def label(self, should_stop: Callable[[], bool] = lambda: False) -> str:
        """Returns the name that `load` gave the weights, or "default" after a start."""
        about = self._about(should_stop)
        if not isinstance(about, dict) or "weight_version" not in about:
            raise ServerError(
                f"SGLang at {self.client.url} has no name for its weights, so that answers of old "
                "weights could not be told from those of new ones; start a version that reports "
                "weight_version"
            )
        return str(about["weight_version"])

    def _about(
        self, should_stop: Callable[[], bool] = lambda: False, attempts: int | None = None
    ) -> Any:
        try:
            return self.client.get("/get_model_info", should_stop, attempts)
        except ServerError as error:
            if error.status != 404:
                raise
        return self.client.get("/model_info", should_stop, attempts)  # its name since 2026
