"""vLLM, version 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1; see docs/servers.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from dcmdp_jax.config import Config
from dcmdp_jax.records import Sampler
from dcmdp_jax.rollout import server_sampler
from dcmdp_jax.rollout.http_client import BadReply, Call, Client, ServerError
from dcmdp_jax.rollout.server_sampler import Reply, Request

LEAST = -9999.0  # nats, instead of a log-prob that is unknown


def vllm(url: str, weights_folder: str = "", **client_options: Any) -> Callable[..., Sampler]:
    """Returns a `RolloutConfig.sampler` that samples from the vLLM server at `url`.

    Args:
        weights_folder: see `server_sampler.ServerSampler`.
        client_options: of `http_client.Client`, such as `connections` and `timeout`.
    """

    def make(config: Config, model: Any, tokenizer: Any, mesh: Any) -> Sampler:
        server = connect(url, **client_options)
        return server_sampler.of_run(config, model, tokenizer, server, weights_folder)

    return make


def connect(url: str, **client_options: Any) -> Server:
    """Returns the vLLM server at `url`. Raises ServerError if it is not there."""
    return Server(Client(url, "vLLM", **client_options))


class Server:
    """A `server_sampler.Server`."""

    path = "/v1/completions"
    loads_weights = True
    pause = "abort"  # what requests under way come to when weights are loaded

    def __init__(self, client: Client):
        """Asks the server for the name of its model."""
        self.client = client
        models = client.get("/v1/models", attempts=1)
        try:
            self._model = models["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ServerError(
                f"vLLM at {client.url} names no model in /v1/models; look at its log, and start it "
                "again as docs/servers.md says"
            ) from None

    def body(self, request: Request) -> dict:
        """Returns the body of a request."""
        return _sampling_params(request) | {
            "model": self._model,
            "prompt": request.prompt,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # a server without a tokenizer has no text
        }

    def read(self, reply: Any, request: Request) -> Reply:
        """Returns the completion in a reply."""
        try:
            (choice,) = reply["choices"]
            tokens = choice["token_ids"]
            logp = choice["logprobs"]["token_logprobs"]
            reason = choice["finish_reason"]
            prompt = choice.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadReply("has not one choice with token_ids and logprobs") from None
        _check_prompt(prompt, request)
        return Reply(tokens, logp, _stopped(reason))

    def in_flight(self) -> InFlight:
        """Returns the server, asked where it tells which tokens come from which weights. Raises
        ServerError if it is not there.
        """
        return InFlight(self.client)

    def load(self, folder: pathlib.Path, label: str, should_stop: Callable[[], bool]) -> None:
        """Pauses the server, names its weights, has it read the folder, and resumes it.

        The name comes first: a server that still has it at the end has not restarted since, and so
        has read the folder. It is sent once: a server that has restarted since it was paused does
        not get it, and so does not give it to tokens of the weights that it was started with. No
        step is repeated after a time-out: the second would run beside the first.
        """
        client = self.client
        steps = (
            (
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
            ),
            # requests that are kept compute the keys and values of their tokens again
            ("/reset_prefix_cache?reset_running_requests=true", None),
        )
        try:
            client.post(f"/pause?mode={self.pause}", None, should_stop, time_outs=1)
            try:
                client.post("/update_weight_version", {"new_version": label}, should_stop, 1, 1)
            except ServerError as error:
                if error.status:
                    raise
                client.post_once("/resume")
                return  # the caller asks for the label, and finds another
            for path, body in steps:
                reply = client.post(path, body, should_stop, time_outs=1)
                if isinstance(reply, dict) and reply.get("success") is False:
                    raise ServerError(
                        f"vLLM at {client.url} reports no success of {path}; look at its log"
                    )
        except BaseException:
            client.post_once("/resume")
            raise
        client.post("/resume", None, should_stop)

    def label(self, should_stop: Callable[[], bool] = lambda: False) -> str | None:
        """Returns the name that `load` gave the weights, or "default" after a start."""
        try:
            return self.client.get("/weight_info", should_stop)["weight_version"]
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(
                f"vLLM at {self.client.url} takes no new weights; start version 0.32 or newer with "
                "VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from None


class InFlight(Server):
    """A server whose weights change in the middle of completions, which then go on."""

    path = "/inference/v1/generate"
    pause = "keep"

    def __init__(self, client: Client):
        """Asks the server for the name of its model, and whether it has that path."""
        super().__init__(client)
        try:
            client.send([Call("POST", self.path, {})], attempts=1)
        except ServerError as error:
            if error.status in (400, 422):
                return  # it has, and says what the body lacks
            if error.status not in (404, 405):
                raise
        raise ServerError(
            f"vLLM at {client.url} does not tell which tokens come from which weights; start it "
            "with --enable-scale-out, or set --rollout.in_flight no"
        )

    def body(self, request: Request) -> dict:
        """Returns the body of a request."""
        return {
            "model": self._model,
            "token_ids": request.prompt,
            "return_token_ids": True,  # of the prompt
            "sampling_params": _sampling_params(request),
        }

    def read(self, reply: Any, request: Request) -> Reply:
        """Returns the completion in a reply, with the label of the weights of each token."""
        try:
            (choice,) = reply["choices"]
            tokens = choice["token_ids"]
            content = choice["logprobs"]["content"]
            reported = [entry["token_id"] for entry in content]
            # what is not a number, or minus infinity, is reported as LEAST
            logp = [None if entry["logprob"] <= LEAST else entry["logprob"] for entry in content]
            spans = [
                (str(span["version"]), int(span["start"]), int(span["end"]))
                for span in choice["weight_versions"]
            ]
            reason = choice["finish_reason"]
            prompt = reply.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadReply(
                "has not one choice with token_ids, logprobs and weight_versions"
            ) from None
        _check_prompt(prompt, request)
        if reported != tokens:
            raise BadReply("has log-probs of other tokens than it returns")
        labels = []
        for label, start, end in spans:
            if start != len(labels) or end > len(tokens):
                break
            labels += [label] * (end - start)
        if len(labels) != len(tokens):
            raise BadReply("names the weights of other tokens than it returns")
        return Reply(tokens, logp, _stopped(reason), labels)


def _sampling_params(request: Request) -> dict:
    """Returns all settings of a request; others would come from the model's
    generation_config.json.
    """
    sampling = request.sampling
    return {
        "max_tokens": request.max_tokens,
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "n": 1,
        "logprobs": 0,  # those of the sampled tokens alone
        "ignore_eos": True,  # the tokenizer's stop tokens end a completion, and no others
        "stop_token_ids": list(request.stop_ids),
        "stop": list(request.stop_strings),
        "skip_special_tokens": False,  # they are text in which stop strings are found
    }


def _check_prompt(prompt: list[int] | None, request: Request) -> None:
    """Raises BadReply if a completion is said to be of another prompt than the request's."""
    if prompt is not None and prompt != request.prompt:
        raise BadReply(f"is to another prompt, of {len(prompt)} tokens")


def _stopped(reason: Any) -> bool:
    """Returns whether a completion ended by a stop token or string. Raises BadReply if it ended
    neither by one nor by the length limit.
    """
    if reason not in ("stop", "length"):
        raise BadReply(f"ends by {reason!r:.40}, not by a stop token, text or the length")
    return reason == "stop"
