"""A probe of what a server's log-probs mean: a few short completions, scored by the trainer.

The prompts are random token ids. The completions that process 0 gets are judged on all processes,
which hold a part of the parameters each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_meaning, log_prob_scorer
from dcmdp_jax.rollout.log_prob_meaning import Verdict
from dcmdp_jax.rollout.log_prob_scorer import Score
from dcmdp_jax.rollout.log_prob_values import Ids

COUNTS = (16, 128)  # of completions: the second where the first have too few tokens to tell
PROMPT = 8  # tokens
TOKENS = 16  # of a completion at most
BLOCK = 32  # positions whose logits are computed together


def prompts(vocab_size: int, stop_ids: Sequence[int], count: int) -> list[list[int]]:
    """Returns `count` prompts: token ids that are no stop tokens."""
    ids = np.setdiff1d(np.arange(vocab_size), stop_ids)
    rng = np.random.default_rng(0)
    return rng.choice(ids, (count, PROMPT)).tolist()


def judge(
    params: Any,
    model: ModelConfig,
    prompts: list[list[int]],
    tokens: list[list[int]],
    logp: list[list[float | None]],
    sampling: Sampling,
    bos_id: int | None,
) -> Verdict:
    """Returns what the log-probs `logp` of process 0's completions mean; all processes must call
    with the same prompts. See `log_prob_meaning.judge`.
    """
    padded = np.zeros((len(prompts), TOKENS), np.int32)
    reported = np.zeros((len(prompts), TOKENS))
    lengths = np.array([len(row) for row in tokens], np.int32)
    for i, length in enumerate(lengths):
        padded[i, :length] = tokens[i]
        reported[i, :length] = np.array(logp[i], np.float64)  # None becomes NaN
    padded, reported, lengths = processes.gather((padded, reported, lengths))
    first = range(len(prompts))
    return log_prob_meaning.judge(
        prompts,
        [padded[i, : lengths[i]].tolist() for i in first],
        [reported[i, : lengths[i]] for i in first],
        scorer(params, model),
        sampling=sampling,
        bos_id=bos_id,
    )


def scorer(params: Any, model: ModelConfig) -> Score:
    """Returns `log_prob_scorer.scorer` for parameters that lie on devices of any process."""
    laid_out = jax.tree.leaves(params)[0].sharding
    is_global = isinstance(laid_out, jax.sharding.NamedSharding)
    everywhere = sharding.replicated(laid_out.mesh) if is_global else None

    def score_blocks(params, rows, row, column, samplings):
        hidden = decoder.hidden(params, rows, model)

        def block(place):
            r, c = place
            logits = decoder.head(params, hidden[r, c - 1], model)
            return log_prob_scorer.log_probs(logits, rows[r, c], samplings)

        return jax.lax.map(block, (row, column))  # [blocks, H, BLOCK]

    compiled = jax.jit(score_blocks, out_shardings=everywhere)

    def score(prompts: Ids, tokens: Ids, samplings: Sampling) -> np.ndarray:
        width = max(len(p) + len(t) for p, t in zip(prompts, tokens, strict=True))
        rows = np.zeros((len(prompts), width), np.int32)
        for row, prompt, completion in zip(rows, prompts, tokens, strict=True):
            row[: len(prompt) + len(completion)] = [*prompt, *completion]
        counts = [len(completion) for completion in tokens]
        total = sum(counts)
        blocks = -(-total // BLOCK) * BLOCK
        row = np.resize(np.repeat(np.arange(len(rows)), counts), blocks).reshape(-1, BLOCK)
        column = [len(p) + np.arange(n) for p, n in zip(prompts, counts)]
        column = np.resize(np.concatenate(column), blocks).reshape(-1, BLOCK)
        logp = compiled(params, rows, row, column, samplings).addressable_data(0)
        return np.asarray(logp).transpose(1, 0, 2).reshape(logp.shape[1], -1)[:, :total]

    return score
