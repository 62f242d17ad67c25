"""A model's log-probs of sampled tokens, in several distributions at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import sampling as draw
from dcmdp_jax.rollout.log_prob_values import Ids

# (prompts, completions, fields [H]) -> [H, tokens] float, the model's log-prob of every completion
# token, one completion after the other, in each of H distributions; no prompt is empty
Score = Callable[[Ids, Ids, Sampling], np.ndarray]

ROWS = 32  # positions whose log-probs are computed together


def scorer(params: Any, model: ModelConfig, batch_tokens: int = 4096) -> Score:
    """Returns the decoder's log-probs as `judge` takes them.

    Sequences of a like length are scored together, `batch_tokens` positions at a time or one
    sequence, and logits are held for `ROWS` positions: memory does not grow with their number.
    Lengths are padded to powers of two, so that few shapes are compiled.
    """

    @jax.jit
    def hidden(params, rows):
        return decoder.hidden(params, rows, model)

    @jax.jit
    def block(params, hidden, ids, samplings):
        return log_probs(decoder.head(params, hidden, model), ids, samplings)

    def score(prompts: Ids, tokens: Ids, samplings: Sampling) -> np.ndarray:
        lengths = [len(row) for row in tokens]
        ends = np.cumsum([0, *lengths])
        out = np.zeros((len(samplings.temperature), ends[-1]))
        sizes = [len(p) + len(t) for p, t in zip(prompts, tokens, strict=True)]
        widths = [max(16, 1 << (size - 1).bit_length()) for size in sizes]
        for width in sorted(set(widths)):
            members = [i for i, w in enumerate(widths) if w == width and lengths[i]]
            # a whole batch of a few short sequences would be padding for the most part
            count = max(1, min(batch_tokens // width, 1 << (len(members) - 1).bit_length()))
            for start in range(0, len(members), count):
                group = members[start : start + count]
                rows = np.zeros((count, width), np.int32)
                for row, i in zip(rows, group):
                    row[: sizes[i]] = [*prompts[i], *tokens[i]]
                x = hidden(params, rows)
                row = np.repeat(np.arange(len(group)), [lengths[i] for i in group])
                column = np.concatenate([len(prompts[i]) + np.arange(lengths[i]) for i in group])
                place = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in group])
                for first in range(0, len(row), ROWS):
                    r = np.resize(row[first : first + ROWS], ROWS)
                    c = np.resize(column[first : first + ROWS], ROWS)
                    part = block(params, x[r, c - 1], rows[r, c], samplings)
                    at = place[first : first + ROWS]
                    out[:, at] = part[:, : len(at)]
        return out

    return score


def log_probs(
    logits: jax.Array, ids: jax.Array, samplings: Sampling, likeliest: int = 1024
) -> jax.Array:
    """Returns the log-probs of `ids` [R] in H distributions, `samplings` with fields [H] -> [H, R].

    Args:
      logits: [R, V] float32.
      likeliest: tokens in which the end of a support is looked for first.
    """
    is_cut = (samplings.top_k > 0) | (samplings.top_p < 1) | (samplings.min_p > 0)
    size = min(likeliest, logits.shape[1])
    head = jax.lax.cond(
        jnp.any(is_cut),
        lambda: jax.lax.top_k(logits, size)[0],
        lambda: jnp.zeros((len(logits), size)),
    )

    def one(arguments):
        sampling, cut = arguments
        logp = draw.log_prob(logits, ids, sampling.temperature)
        mass = jax.lax.cond(
            cut, lambda: _support_mass(logits, head, sampling), lambda: jnp.ones(len(logits))
        )
        return logp - jnp.log(mass)

    return jax.lax.map(one, (samplings, is_cut))


def _support_mass(logits: jax.Array, head: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the mass of the support, as `sampling.sample` does, from the likeliest tokens' logits
    `head`, sorted, if it ends among them: it is many times faster.
    """
    z = (head - head[:, :1]) / sampling.temperature
    total = jnp.sum(jnp.exp((logits - head[:, :1]) / sampling.temperature), axis=1)
    p = jnp.exp(z) / total[:, None]
    number = jnp.arange(head.shape[1])
    last = jnp.clip(sampling.top_k.astype(jnp.int32), 1, head.shape[1]) - 1
    by_k = jnp.where(sampling.top_k > 0, jnp.take(head, last, axis=1), -jnp.inf)
    p_k = jnp.where(head >= by_k[:, None], p, 0)
    goal = sampling.top_p * jnp.where(sampling.top_k > 0, jnp.sum(p_k, axis=1), 1)
    short = jnp.sum(jnp.cumsum(p_k, axis=1) < goal[:, None], axis=1)
    nucleus = jnp.take_along_axis(head, jnp.minimum(short, number[-1])[:, None], axis=1)[:, 0]
    by_p = jnp.where(sampling.top_p < 1, nucleus, -jnp.inf)
    by_min = jnp.where(
        sampling.min_p > 0, head[:, 0] + sampling.temperature * jnp.log(sampling.min_p), -jnp.inf
    )
    lowest = jnp.maximum(jnp.maximum(by_k, by_p), by_min)
    complete = head.shape[1] == logits.shape[1]

    def slowly():
        each = Sampling(*(jnp.full(len(logits), value) for value in sampling))
        return draw.sample(logits, jnp.zeros((len(logits), 2), jnp.uint32), each).support_mass

    return jax.lax.cond(
        complete | ((sampling.top_k <= head.shape[1]) & jnp.all(lowest > head[:, -1])),
        lambda: jnp.sum(jnp.where(head >= lowest[:, None], p, 0), axis=1),
        slowly,
    )


def fields(samplings: Sequence[Sampling]) -> Sampling:
    """Returns H distributions as one, with fields [H] float32."""
    return Sampling(*np.array(samplings, np.float32).T)
