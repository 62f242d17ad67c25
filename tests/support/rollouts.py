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


class CannedSampler:
    """A sampler of the same completions for every prompt, of which the i-th is token i alone."""

    def sample(self, prompts, *, samples, max_tokens, **how):
        count = len(prompts.lengths) * samples
        tokens = np.tile(np.arange(samples), len(prompts.lengths))[:, None].repeat(max_tokens, 1)
        logp = np.zeros((count, max_tokens))
        return make_rollout(prompts, tokens, [max_tokens] * count, logp, [True] * count)

    def update_weights(self, params, version):
        pass
