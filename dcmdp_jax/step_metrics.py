"""What a step measures on the device, beside what its parts return."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax import objective, trainer_scores
from dcmdp_jax.config import Config
from dcmdp_jax.losses import diagnostics, kl, reduce
from dcmdp_jax.monitoring import gaps
from dcmdp_jax.records import Batch, TrainState

Metrics = dict[str, jax.Array | gaps.Gaps]  # scalars, and under "gaps" a summary of the gaps


def batch_metrics(
    batch: Batch, advantage: jax.Array, shaped: jax.Array, old_logp: jax.Array, entropy: jax.Array
) -> Metrics:
    """Rewards, lengths, entropy, and the gap between trainer and sampler."""
    advantage, shaped, old_logp, entropy, rollout_logp, completions, mask = map(
        objective.flat,
        (advantage, shaped, old_logp, entropy, batch.rollout_logp, batch.completions, batch.mask),
    )
    reward = batch.reward.reshape(-1)
    return {
        "reward": jnp.mean(reward),
        "entropy": reduce.token_mean(entropy, mask),
        "response_length": jnp.mean(batch.length.astype(jnp.float32)),
        "logp_finite": jnp.all(jnp.isfinite(old_logp) | ~mask),
        "gaps": gaps.measure(old_logp, rollout_logp, completions, mask, reward),
        **diagnostics.summary(old_logp, rollout_logp, advantage, mask),
        **diagnostics.sign_flip(advantage, shaped, mask),
    }


def update_metrics(
    loss: jax.Array,
    norm: jax.Array,
    scores: trainer_scores.Scores,
    minibatch: objective.Minibatch,
    config: Config,
) -> Metrics:
    """What is measured at each update, and averaged over a step's.

    `clip_fraction` is the share of trained tokens that the surrogate gives no gradient although
    they have an advantage: the clip stopped them, or a rejection dropped them. `approx_kl` is the
    k3 estimate of KL(old || current). Before the first update at the weights that sampled it is 0.
    """
    mask = minibatch.batch.mask
    logp = scores.logp
    slope = jax.grad(objective.surrogate_loss)(logp, minibatch, config, scores.top_logp)
    stopped = (slope == 0) & (minibatch.advantage != 0)
    return {
        "loss": loss,
        "grad_norm": norm,
        "clip_fraction": reduce.token_mean(stopped.astype(jnp.float32), mask),
        "approx_kl": reduce.token_mean(kl.k3(minibatch.old_logp, logp, mask), mask),
    }


def option_metrics(
    batch: Batch,
    old_logp: jax.Array,
    ref_logp: jax.Array | None,
    alpha: jax.Array | None,
    scale: jax.Array | None,
) -> Metrics:
    """Of a reference policy, an entropy bonus and an update scale, each if the run has one.

    `ref_kl` is the k3 estimate of KL(policy || reference) at the weights that sampled, a mean over
    tokens.
    """
    metrics = {}
    if ref_logp is not None:
        metrics["ref_kl"] = reduce.token_mean(kl.k3(old_logp, ref_logp, batch.mask), batch.mask)
    if alpha is not None:
        metrics["entropy_coefficient"] = alpha
    if scale is not None:
        metrics["update_scale"] = scale
    return metrics


def staleness_metrics(
    state: TrainState, logp: jax.Array, old_logp: jax.Array, batch: Batch
) -> Metrics:
    """The gap divided into age and numerics, if the batch comes from stale weights; `logp` is of
    the weights before the step. With weights that change in flight, the share of tokens that come
    from the weights before the step.
    """
    if not state.stale:
        return {}
    metrics = diagnostics.staleness(
        objective.flat(logp),
        objective.flat(old_logp),
        objective.flat(batch.rollout_logp),
        objective.flat(batch.mask),
    )
    if batch.version is not None:
        current = batch.version == state.step
        metrics["on_policy_share"] = reduce.token_mean(current.astype(jnp.float32), batch.mask)
    return metrics
