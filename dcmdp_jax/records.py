"""What travels, in the order of the walk.

Sizes: B prompts, G samples per prompt, N = B*G completions, P prompt tokens, T completion tokens, M
    minibatches,
A accumulated microbatches, n = N/(M*A) completions in a microbatch, R packed rows, S row length.
Log-probs are in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One problem as it is read or generated."""

    prompt: Any  # str, or a list of chat messages {"role": ..., "content": ...}
    answer: str  # what the verifier compares with
    source: str = ""  # where it comes from: a task's name, a file's stem, DAPO's data_source


class Prompts(NamedTuple):
    """A batch of tokenized problems."""

    tokens: np.ndarray  # [B, P] int32, padded on the right
    lengths: np.ndarray  # [B] int32
    examples: tuple[Example, ...]  # B


class Sampling(NamedTuple):
    """How a token is drawn: from softmax(logits / temperature) over a support, renormalised.

    The support holds the `top_k` likeliest tokens, of those the fewest whose mass reaches `top_p`,
    and of those the ones at least `min_p` times as likely as the likeliest; tokens tied with the
    last kept one are kept. Scalars or one per request.
    """

    temperature: Any = 1.0  # 0 takes the likeliest token
    top_k: Any = 0  # 0: all
    top_p: Any = 1.0
    min_p: Any = 0.0


class Weights(NamedTuple):
    """The engine's parameters, and the number of constrained steps behind them."""

    params: Any
    version: Any  # [] int32
    finite: Any = True  # [] bool: no parameter is NaN or infinite


class Rollout(NamedTuple):
    """G sampled completions of each prompt; completion i belongs to prompt i // G."""

    prompts: Prompts
    tokens: np.ndarray  # [N, T] int32; the stop token is part of the completion
    lengths: np.ndarray  # [N] int32, tokens sampled
    # [N] int32, of them those that are text: the stop token, where one ended it, is not
    text_lengths: np.ndarray
    # [N, T] float32, of the distribution sampled from: tempered, over its support; 0 past the
    # length
    rollout_logp: np.ndarray
    # [N, T] float32, log softmax(logits)[token]: temperature 1, whole vocabulary
    raw_logp: np.ndarray
    kept: np.ndarray  # [N, T] float32, mass of the support under softmax(logits / temperature)
    stopped: np.ndarray  # [N] bool: ended by a stop token or string, not by the length limit
    version: np.ndarray  # [N, T] int32, of the weights that sampled the token
    sampling: Sampling
    # [N, T, sparse layers, k] int32 that made each token's distribution; -1 past the length
    experts: np.ndarray | None


class Scored(NamedTuple):
    """A rollout with its rewards."""

    rollout: Rollout
    reward: np.ndarray  # [N] float32
    text: tuple[str, ...]  # N decoded completions, stop token left out


class Batch(NamedTuple):
    """Completions packed into rows for the model, with the map back to [n, T] for the mathematics.

    `rollout_logp` is of the distribution that the trainer scores: softmax(logits / temperature)
    over the whole vocabulary, a rollout's `rollout_logp` + log `kept`. Where a support was cut,
    engine and trainer are thus compared before the cut, which both would make alike: a gap, and
    every ratio of the two, is of numerics and age alone.

    Rows hold prompt + completion segments. `index[i, t]` is the flat position r*S + s, within its
    microbatch, of the token whose next-token distribution predicts completion token t: the model's
    outputs at `index` are the completion's.
    """

    tokens: np.ndarray  # [M, A, R, S] int32
    positions: np.ndarray  # [M, A, R, S] int32, restarting with each segment
    segment_ids: np.ndarray  # [M, A, R, S] int32, 1.. in a row; 0 is padding
    index: np.ndarray  # [M, A, n, T] int32; 0 where masked
    completions: np.ndarray  # [M, A, n, T] int32
    mask: np.ndarray  # [M, A, n, T] bool, completion tokens that are trained
    rollout_logp: np.ndarray  # [M, A, n, T] float32, over the whole vocabulary
    reward: np.ndarray  # [M, A, n] float32
    group: np.ndarray  # [M, A, n] int32, 0..B-1: the prompt a completion answers
    # [M, A, R, S, sparse layers, k] int16 that each token takes; -1: its router's choice
    experts: np.ndarray | None = None


class TrainState(NamedTuple):
    """Everything a step changes and a checkpoint holds."""

    params: Any
    opt_state: Any
    dual: Any  # constraint.DualState: the multiplier and its controller's memory
    step: Any  # [] int32, constrained steps taken; the version of `params`
    skipped: Any  # [] int32, updates left out because their loss or gradient was not finite
    stale: tuple[Any, ...]  # parameters of the last `rollout.staleness` steps, oldest first
