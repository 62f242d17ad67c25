"""Samplers of the stand-ins of servers, and what the decoder says of their rollouts."""

import jax
import numpy as np

from dcmdp_jax.records import Prompts, Sampling
from dcmdp_jax.rollout import llama_cpp, sglang, vllm
from support.servers import (
    MODEL,
    POSITIONS,
    TOKENIZER,
    LlamaCpp,
    Sglang,
    Vllm,
    logits_of,
    make_params,
)
from support.training import tiny

KINDS = {"vllm": (Vllm, vllm.vllm), "sglang": (Sglang, sglang.sglang)}
ALL = KINDS | {"llama_cpp": (LlamaCpp, llama_cpp.llama_cpp)}
PROMPTS = Prompts(
    np.array([[3, 9, 30, 7], [5, 4, 0, 0], [20, 0, 0, 0]], np.int32), np.array([4, 2, 1]), ()
)
SAMPLES = 4


def sample(sampler, **changes):
    arguments = dict(
        samples=SAMPLES,
        max_tokens=20,
        sampling=Sampling(),
        stop_strings=(),
        seed=5,
        offset=0,
        should_stop=lambda: False,
    )
    return sampler.sample(changes.pop("prompts", PROMPTS), **(arguments | changes))


def make(kind, server, version=0, run=None, **options):
    """Returns a sampler that has the weights `make_params(version)`."""
    sampler = ALL[kind][1](server.url, **options)(run or tiny(), MODEL, TOKENIZER, None)
    sampler.update_weights(make_params(version), version)
    return sampler


def forward_logp(rollout, version=0, temperature=1.0):
    """The decoder's log-probs of a rollout's tokens, [N, T]."""
    prompts = [PROMPTS.tokens[i, :n] for i, n in enumerate(PROMPTS.lengths) for _ in range(SAMPLES)]
    rows = np.zeros((len(prompts), POSITIONS), np.int32)
    for row, prompt, tokens, length in zip(rows, prompts, rollout.tokens, rollout.lengths):
        row[: len(prompt) + length] = [*prompt, *tokens[:length]]
    logits = logits_of(MODEL)(make_params(version), rows) / temperature
    logp = np.asarray(jax.nn.log_softmax(logits))
    out = np.zeros_like(rollout.rollout_logp)
    for i, length in enumerate(rollout.lengths):
        at = len(prompts[i]) - 1 + np.arange(length)
        out[i, :length] = logp[i, at, rollout.tokens[i, :length]]
    return out
