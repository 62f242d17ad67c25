"""The records that pass between the stations of a step, and the names that the code uses for them.

Sizes
    B   prompts in a rollout batch
    G   samples (completions) per prompt
    N   completions in a rollout batch, N = B * G; completion i answers prompt i // G
    P   prompt tokens, padded
    T   completion tokens, padded
    M   minibatches (optimizer updates) per rollout batch and epoch
    A   microbatches (accumulated gradients) per minibatch
    n   completions per microbatch, n = N / (M * A)
    R   packed rows per microbatch
    S   tokens per packed row
    V   vocabulary, D hidden size, L layers, K tokens per dispatch of the engine

Data
    example         one problem: a prompt, its answer and its source
    prompt          the tokens that a completion follows
    completion      the tokens that were sampled after a prompt, the stop token included
    rollout         the completions of a batch of prompts, with their log-probs
    reward          what the verifier gives a completion, [N]
    advantage       what the loss weighs log-probs with, [N] or [N, T]
    mask            1 for the completion tokens that are trained

Log-probs of the sampled tokens, in nats
    logp            the trainer's, differentiated
    old_logp        the trainer's with the parameters from before the update
    rollout_logp    the sampler's; in a `Rollout` of the distribution that was drawn from
    ref_logp        the reference policy's: the run's starting parameters
    support mass    the probability of the tokens that top-k, top-p and min-p leave to draw from

The constraint
    delta           |exp(old_logp) - exp(rollout_logp)|, the discrepancy of one token
    tolerance       c, the bound on the mean of delta
    multiplier      lambda, the Lagrange multiplier of that bound

Parameters
    params          a tree of the trainer's parameters
    trained, scored the parameters that the optimizer changes, and those that the model is run with;
                    `step.policy_params` makes the second from the first
    weights         the engine's converted copy of `params`, in its own precision and layout
    version         the number of constrained steps behind `params` or `weights`
    staleness       the number of constrained steps by which the sampler's version is older

Sampling
    sampler         anything that draws completions and reports their log-probs, see `Sampler`
    engine          the decoder inside the library's own sampler
    slot            a place in the engine that holds one sequence at a time
    dispatch        one call of the compiled decode loop, K tokens in every slot
    precision       the formats of an engine's weights, activations and cache
    tokenizer       text to token ids and back; `vocab_size` is V
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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
    """An engine's copy of the parameters, in its own precision and layout."""

    params: Any
    version: Any  # [] int32, constrained steps behind them
    finite: Any = True  # [] bool: no parameter is NaN or infinite


class Rollout(NamedTuple):
    """G sampled completions of each prompt: what any sampler can report.

    Log-probs are of the distribution that was drawn from: tempered, and renormalised over its
    support. A sampler that cuts no support leaves `support_mass` None; one that does not report the
    experts of its router leaves `experts` None.
    """

    prompts: Prompts
    tokens: np.ndarray  # [N, T] int32; the stop token is part of the completion
    lengths: np.ndarray  # [N] int32, tokens sampled
    text_lengths: np.ndarray  # [N] int32, tokens sampled without the stop token
    rollout_logp: np.ndarray  # [N, T] float32, nats; 0 past the length
    stopped: np.ndarray  # [N] bool: ended by a stop token or string, not by the length limit
    version: np.ndarray | int  # of the weights that sampled: one for all, or [N, T] int32
    sampling: Sampling
    # [N, T] float32, mass of the support under softmax(logits / temperature); 0 past the length
    support_mass: np.ndarray | None = None
    # [N, T, sparse layers, k] int32 that made each token's distribution; -1 past the length
    experts: np.ndarray | None = None


class NotFinite(ValueError):
    """A sampler is given weights that hold NaN or an infinite number."""


class Sampler(Protocol):
    """All that a training loop needs of an engine.

    `RolloutConfig.sampler` makes one. Where several processes train, each makes its own, and all
    call in the same order.
    """

    def sample(
        self,
        prompts: Prompts,
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_strings: tuple[str, ...],
        seed: int,
        offset: int,
        should_stop: Callable[[], bool],
    ) -> Rollout:
        """Returns `samples` completions of each prompt, drawn with the weights of the last update.

        Args:
          max_tokens: the longest completion.
          stop_strings: texts that end a completion, beside the tokenizer's stop tokens.
          seed: 0 <= seed < 2**32. Completion i is drawn from a random stream that depends on `seed`
            and `offset + i` alone.
          offset: the number of the first completion in a larger batch that these prompts are a part
            of.
          should_stop: polled while sampling; where several processes share an engine, it may differ
            between them.

        Raises `stopping.Interrupted` if `should_stop()`.
        """
        ...

    def update_weights(self, params: Any, version: int) -> None:
        """Samples from `params` from now on.

        Converts and copies: the next training step may donate the buffers of `params`.

        Args:
          params: the decoder's parameters as the trainer has them, on the training devices.
          version: the number of constrained steps behind them.

        Raises NotFinite if a parameter is NaN or infinite.
        """
        ...


class Scored(NamedTuple):
    """A rollout with its rewards."""

    rollout: Rollout
    reward: np.ndarray  # [N] float32
    text: tuple[str, ...]  # N decoded completions, stop token left out


class Batch(NamedTuple):
    """Completions packed into rows for the model, with the map back to [n, T] for the mathematics.

    `rollout_logp` is of the distribution that the trainer scores: softmax(logits / temperature)
    over the whole vocabulary, a rollout's `rollout_logp` + log `support_mass`. Where a support was cut,
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
