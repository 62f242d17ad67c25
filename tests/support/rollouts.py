"""Rollouts made by hand."""

import numpy as np

from dcmdp_jax.records import Prompts, Rollout, Sampling


def make_rollout(
    prompts: Prompts, tokens, lengths, rollout_logp, stopped, temperature=1.0
) -> Rollout:
    """Returns a rollout by the weights of step 0, from the full support. A stopped completion ends
    with a stop token.
    """
    tokens = np.asarray(tokens, np.int32)
    lengths = np.asarray(lengths, np.int32)
    stopped = np.asarray(stopped, bool)
    logp = np.asarray(rollout_logp, np.float32)
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        lengths=lengths,
        text_lengths=lengths - stopped,
        rollout_logp=logp,
        stopped=stopped,
        version=np.zeros_like(tokens),
        sampling=Sampling(temperature),
    )
