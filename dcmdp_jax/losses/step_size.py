"""How far a batch lets an update go: factors of the learning rate, and whether to keep an update.

Pure functions without gradient. Notation is that of `diagnostics`: D = old_logp - rollout_logp in
float32 nats `[N, T]`, over measured tokens. Factors take `(old_logp, rollout_logp, mask, steps)`,
`steps` being the steps taken before, and multiply the learning rate of the updates that the batch
makes; with nothing to measure they are 1. In a step `old_logp` is at the weights that it updates,
so that D has the age of a stale rollout too. They raise TypeError for another dtype and
ValueError for another shape or a bound that makes no sense.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics, diagnostics, reduce
from dcmdp_jax.losses.operators import geometric

Array = jax.Array


def sqrt_ess(
    old_logp: Array,
    rollout_logp: Array,
    mask: Array,
    steps: Array | int = 0,
    *,
    reference: float = 1.0,
) -> Array:
    """Factor of the learning rate: the square root of the share of the batch that the importance
    weights of completions leave effective.

    Formula: min(1, sqrt(ESS / (N reference))), ESS = (sum_n w_n)^2 / sum_n w_n^2, w_n =
        exp(clip(sum_t D, -20, 20)), N completions with a measured token
    Needs: old_logp, rollout_logp, mask (steps is there for the common signature)
    Default: reference 1.0
    Paper: VCPO, arXiv 2602.17616

    `reference` is the share that a batch of the current weights has, at which the learning rate is
    the one that is set.
    """
    if not 0 < reference <= 1:
        raise ValueError(f"reference must be in (0, 1], a share of the batch, not {reference}")
    share = diagnostics.effective_sample_size(old_logp, rollout_logp, mask)["ess_sequence"]
    factor = jnp.sqrt(jnp.where(share > 0, share, reference) / reference)
    return jnp.minimum(factor, 1.0)


def length_decay(
    old_logp: Array,
    rollout_logp: Array,
    mask: Array,
    steps: Array | int = 0,
    *,
    length: float,
    power: float = 1.0,
    minimum: float = 0.1,
) -> Array:
    """Factor of the learning rate that falls once the completions of the batch get long.

    Formula: clip((length / mean_n |o_n|)^power, minimum, 1), mean over completions with a token
    Needs: mask (the others are there for the common signature), length in tokens
    Default: length must be given; power 1.0, minimum 0.1
    Paper: Zhang et al., arXiv 2602.01826

    The paper triggers a decay by a surge of the response length. How fast the rate falls is the
    choice made here: it follows the length of each batch, and recovers with it.
    """
    if not length > 0:
        raise ValueError(f"length must be above 0 tokens, not {length}")
    if not power > 0:
        raise ValueError(f"power must be above 0, not {power}")
    if not 0 < minimum <= 1:
        raise ValueError(f"minimum must be in (0, 1], not {minimum}")
    _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    tokens = _numerics.row_count(_arguments.mask(mask, rollout_logp))
    mean = reduce.token_mean(tokens, tokens > 0)
    return jnp.clip((length / jnp.maximum(mean, 1.0)) ** power, minimum, 1.0)


def inference_gap(old_logp: Array, rollout_logp: Array, advantage: Array, mask: Array) -> Array:
    """What the sampler's policy gains over the trainer's at the weights that sampled, by the batch:
    MIPU's proxy of the gap that an update leaves behind.

    Formula: -mean_n(R_n A_n), R_n = exp(mean_t clip(D, -20, 20)), A_n = mean_t(advantage), over
        completions with a measured token
    Needs: old_logp, rollout_logp, advantage, mask
    Paper: MIPU, arXiv 2606.29526

    The batch is one that was sampled, and scored, after the update. 0 without a gap if the
    advantages sum to 0. Negative: good completions are those that the trainer rates higher than the
    sampler does.
    """
    old_logp, rollout_logp = jax.lax.stop_gradient(
        _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    )
    advantage = jax.lax.stop_gradient(_arguments.advantage(advantage, old_logp))
    valid = _numerics.measured(rollout_logp, _arguments.mask(mask, old_logp))
    ratio = jnp.exp(geometric(_numerics.difference(old_logp, rollout_logp, valid), valid))
    product = ratio * _numerics.row_mean(advantage, valid)
    return -reduce.token_mean(product, jnp.any(valid, axis=-1, keepdims=True))


def accept(
    old_logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    tolerance: Array | float,
) -> Array:
    """MIPU's acceptance test of the last update, by a batch sampled after it; bool scalar.

    Formula: inference_gap >= -tolerance
    Needs: old_logp, rollout_logp, advantage, mask, tolerance
    Default: tolerance must be given; the paper lets it fall from 1e-3 to 0 over 100 steps (4B), or
        from 4e-3 to 1e-3 (1.7B)
    Paper: MIPU, arXiv 2606.29526

    An update that fails is undone, optimizer state included. `tolerance` may be a traced scalar.
    """
    return inference_gap(old_logp, rollout_logp, advantage, mask) >= -tolerance
