"""llama.cpp's llama-server, whose weights stay those of the GGUF file that it was started with.

A run whose weights change stops after each step; see docs/servers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dcmdp_jax.config import Config
from dcmdp_jax.records import Sampler
from dcmdp_jax.rollout import server_sampler
from dcmdp_jax.rollout.http_client import BadReply, Client
from dcmdp_jax.rollout.server_sampler import Reply, Request


def llama_cpp(url: str, **client_options: Any) -> Callable[..., Sampler]:
    """Returns a `RolloutConfig.sampler` that samples from the llama-server at `url`.

    Args:
        client_options: of `http_client.Client`, such as `connections` and `timeout`.
    """

    def make(config: Config, model: Any, tokenizer: Any, mesh: Any) -> Sampler:
        server = connect(url, **client_options)
        return server_sampler.of_run(config, model, tokenizer, server)

    return make


def connect(url: str, **client_options: Any) -> Server:
    """Returns the llama-server at `url`. Raises ServerError if it is not there."""
    return Server(Client(url, "llama.cpp", **client_options))


class Server:
    """A `server_sampler.Server`."""

    path = "/completion"
    loads_weights = False

    def __init__(self, client: Client):
        """Asks the server for its properties, to find out whether it is there."""
        self.client = client
        client.get("/props", attempts=1)

    def body(self, request: Request) -> dict:
        """Returns the body of a request.

        Every default of the server that shapes the distribution is replaced. Stop strings are not
        passed on: the server drops the log-probs of the tokens that make one up. They, and stop
        tokens that the GGUF file does not name, end a completion afterwards.
        """
        sampling = request.sampling
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": float(sampling.temperature),
            "dynatemp_range": 0.0,
            "top_k": int(sampling.top_k),
            "top_p": float(sampling.top_p),
            "min_p": float(sampling.min_p),
            "samplers": ["temperature", "top_k", "top_p", "min_p"],
            "mirostat": 0,
            "logit_bias": [],
            "ignore_eos": False,
            "seed": request.seed,
            "n_probs": 1,
            "post_sampling_probs": not _is_raw(request),
            "return_tokens": True,
            "cache_prompt": False,  # a cached prompt is computed in other batches
            "stream": False,
        }

    def read(self, reply: Any, request: Request) -> Reply:
        """Returns the completion in a reply.

        The server may sample past the limit, to complete a character, and reports no log-prob of a
        token that leaves a character incomplete; see `aligned`.
        """
        try:
            tokens = list(reply["tokens"])
            reported = [(item["id"], _logp(item)) for item in reply["completion_probabilities"]]
            reason = reply["stop_type"]
            prompt_tokens = reply["tokens_evaluated"]
        except (KeyError, TypeError, ValueError):
            raise BadReply(
                "has no tokens with completion_probabilities, stop_type and tokens_evaluated"
            ) from None
        if prompt_tokens != len(request.prompt):
            raise BadReply(
                f"is to a prompt of {prompt_tokens!r:.20} tokens, not of {len(request.prompt)}"
            )
        if reason not in ("eos", "limit"):
            raise BadReply(f"ends by {reason!r:.40}, not by a stop token or the length")
        logp = aligned(tokens, reported)
        is_cut = len(tokens) > request.max_tokens
        limit = request.max_tokens
        return Reply(tokens[:limit], logp[:limit], reason == "eos" and not is_cut)

    def in_flight(self) -> Server:
        """Raises ServerError: the weights never change."""
        raise server_sampler.no_in_flight(self)

    def load(self, folder: Any, label: str, should_stop: Callable[[], bool]) -> None:
        """Does nothing: `ServerSampler` asks no server to load that has not `loads_weights`."""

    def label(self, should_stop: Callable[[], bool]) -> None:
        """Returns None: the weights never change."""


def _is_raw(request: Request) -> bool:
    """Returns True where the distribution drawn from is the softmax of the logits, whose log-probs
    are reported with more digits than probabilities.
    """
    sampling = request.sampling
    is_cut = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return sampling.temperature in (0, 1) and not is_cut


def _logp(item: dict) -> float | None:
    if "logprob" in item:
        return item["logprob"]
    return math.log(item["prob"]) if item["prob"] > 0 else None


def aligned(
    tokens: Sequence[int], reported: Sequence[tuple[int, float | None]]
) -> list[float | None]:
    """Returns a log-prob for each of `tokens` from (id, log-prob) pairs of some of them, in order.

    None where there is none, and where several ways to assign the pairs differ. Raises BadReply if
    the ids are not those of tokens in order.
    """
    first = _places([token for token in tokens], [id for id, _ in reported])
    last = _places(tokens[::-1], [id for id, _ in reported][::-1])
    last = [len(tokens) - 1 - place for place in last[::-1]]
    logp: list[float | None] = [None] * len(tokens)
    for (_, value), early, late in zip(reported, first, last, strict=True):
        if early == late:
            logp[early] = value
    return logp


def _places(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Returns the first place in `tokens` of each of `ids`, each after the one before."""
    places = []
    start = 0
    for id in ids:
        try:
            start = tokens.index(id, start) + 1
        except ValueError:
            raise BadReply("has log-probs of other tokens than it returns") from None
        places.append(start - 1)
    return places
