"""Completions of built-in prompts, asked of a running server: a source of `dcmdp doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import server_probe, servers
from dcmdp_jax.rollout.http_client import Call
from dcmdp_jax.rollout.server_sampler import Reply, Request, completion_seed
from dcmdp_jax.tokens.tokenizer import Tokenizer
from dcmdp_jax.tools import rollout_records
from dcmdp_jax.tools.rollout_records import Records

PROMPTS = (
    "The capital of France is",
    "Question: What is 17 + 25?\nAnswer:",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To solve 3x + 6 = 21, first",
    "Dear Sir or Madam,\n",
    "The opposite of hot is",
    "1, 2, 3, 5, 8,",
    "In 1969 the first people",
    "A list of fruit:\n- apple\n-",
    "She opened the door and",
    "import numpy as np\n",
    "The largest planet of the solar system is",
    "Translate to German: good morning.",
)
SAMPLES = 4  # of each prompt
MAX_TOKENS = 32
CONNECTIONS = 16  # requests at once, so that a slow server shows progress and none times out
TEMPERATURE = 0.7  # at 1, raw and processed log-probs are the same


def sample(
    url: str,
    tokenizer: Tokenizer,
    sampling: Sampling,
    vocab_size: int,
    max_position: int,
    limit: int,
    progress: Callable[[str], None],
) -> Records:
    """Returns what the vLLM, SGLang or llama.cpp server at `url` samples with its own weights.

    Args:
        limit: most completions, of as many prompts as it allows.
        progress: called with a line now and then.

    Raises ServerError or ValueError, in one sentence, if it does not answer as it should.
    """
    server = servers.connect(url, connections=CONNECTIONS)
    prompts = _prompts(tokenizer, vocab_size, progress)
    count = min(limit, len(prompts) * SAMPLES)
    requests = [
        Request(
            prompts[i % len(prompts)],
            MAX_TOKENS,
            sampling,
            tuple(tokenizer.eos_ids),
            (),
            completion_seed(0, i),
        )
        for i in range(count)
    ]
    answered = 0

    def read(reply: Any, number: int) -> Reply:
        nonlocal answered
        completion = server.read(reply, requests[number])
        answered += 1
        if answered % CONNECTIONS == 0:
            progress(f"{answered} of {count} completions")
        return completion

    progress(f"asking {url} for {count} completions of at most {MAX_TOKENS} tokens")
    replies = server.client.send(
        [Call("POST", server.path, server.body(request)) for request in requests],
        read,
    )
    rows = (
        (
            f"reply {number} of {server.client.name} at {url}",
            {"prompt_ids": request.prompt, "token_ids": reply.tokens, "logprobs": reply.logp},
        )
        for number, (request, reply) in enumerate(zip(requests, replies, strict=True), start=1)
    )
    return rollout_records.parse(rows, len(requests), vocab_size, max_position, url)


def _prompts(
    tokenizer: Tokenizer, vocab_size: int, progress: Callable[[str], None]
) -> list[list[int]]:
    """Returns the built-in prompts, or random token ids where the tokenizer cannot encode them."""
    try:
        return [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    except ValueError:
        progress("the tokenizer cannot encode the built-in prompts: they are random token ids")
        return server_probe.prompts(vocab_size, tokenizer.eos_ids, len(PROMPTS))
