"""What a step minimises: rewards -> advantages -> shaped advantages -> the loss of log-probs.

Sizes are those of `records`: M minibatches of A microbatches of n completions of T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import reference
from dcmdp_jax.config import Config
from dcmdp_jax.losses import _arguments
from dcmdp_jax.losses._separable import is_separable
from dcmdp_jax.records import Batch


class Minibatch(NamedTuple):
    """What one update trains on."""

    batch: Batch  # [A, ...]
    old_logp: jax.Array  # [A, n, T]
    ref_logp: jax.Array | None  # [A, n, T]
    advantage: jax.Array  # [A, n, T], shaped


def apply_mask(batch: Batch, config: Config) -> Batch:
    """Returns the batch with the mask of the tokens that `algorithm.mask` leaves; it adds none."""
    if not config.algorithm.mask:
        return batch
    mask = config.algorithm.mask(
        flat(batch.mask),
        batch.reward.reshape(-1),
        batch.truncated.reshape(-1),
        batch.group.reshape(-1),
        num_groups=config.data.prompts_per_step,
    )
    return batch._replace(mask=batch.mask & (mask.reshape(batch.mask.shape) > 0))


def reference_charge(
    batch: Batch, old_logp: jax.Array, ref_logp: jax.Array | None, config: Config
) -> jax.Array | None:
    """Returns what is taken from each completion's reward, [M, A, n]: the sum of its reference
    penalty. None if the penalty is a part of the loss.
    """
    if not config.algorithm.reference_in_reward:
        return None
    old_logp = flat(old_logp)
    penalty = reference.penalty(
        config.algorithm, old_logp, old_logp, flat(ref_logp), flat(batch.mask)
    )
    return jnp.sum(penalty, axis=-1).reshape(batch.reward.shape)


def group_advantage(batch: Batch, config: Config, charge: jax.Array | None = None) -> jax.Array:
    """Returns the advantage of each completion within its group, [M, A, n, 1], or of each token,
    [M, A, n, T], as `algorithm.advantage` returns it.

    It is made of shaping(R_i) - charge_i: the verifier's reward is shaped before `reference_charge`
    is taken, which changes its scale (as TRL's RLOO and verl's `use_kl_in_reward` do).
    """
    reward = batch.reward.reshape(-1)
    group = batch.group.reshape(-1)
    num_groups = config.data.prompts_per_step
    if config.algorithm.reward_shaping:
        reward = config.algorithm.reward_shaping(
            reward,
            batch.length.reshape(-1),
            batch.truncated.reshape(-1),
            group,
            num_groups=num_groups,
        )
    if charge is not None:
        reward = reward - charge.reshape(-1)
    function = config.algorithm.advantage
    mask = {"mask": flat(batch.mask)} if _arguments.takes(function, "mask") else {}
    advantage = function(reward, group, num_groups=num_groups, **mask)
    return advantage.reshape(*batch.reward.shape, -1)


def shaped_advantage(
    advantage: jax.Array, old_logp: jax.Array, batch: Batch, multiplier: jax.Array, config: Config
) -> jax.Array:
    """Returns the shaped advantage of each token, [M, A, n, T]."""
    if not config.constraint.shaping:
        return jnp.broadcast_to(advantage, batch.mask.shape)
    shaped = config.constraint.shaping(
        flat(advantage),
        flat(old_logp),
        flat(batch.rollout_logp),
        multiplier,
        config.constraint.tolerance,
        flat(batch.mask),
    )
    return shaped.reshape(batch.mask.shape)


def loss_of(
    logp: jax.Array,
    minibatch: Minibatch,
    multiplier: jax.Array,
    config: Config,
    top_logp: jax.Array | None = None,
) -> jax.Array:
    """Returns the loss of a minibatch as a function of its log-probs; arrays as in `Scores`."""
    batch = minibatch.batch
    loss = surrogate_loss(logp, minibatch, config, top_logp)
    logp = flat(logp)
    rollout_logp = flat(batch.rollout_logp)
    mask = flat(batch.mask)
    reduce_loss = config.algorithm.reduce
    # Penalties are of all trained tokens, those that the surrogate rejects too.
    if config.constraint.penalty:
        penalty = config.constraint.penalty(logp, rollout_logp, mask, multiplier)
        loss += reduce_loss(penalty, mask)
    if config.algorithm.reference_penalty and not config.algorithm.reference_in_reward:
        old_logp = flat(minibatch.old_logp)
        ref_logp = flat(minibatch.ref_logp)
        penalty = reference.penalty(config.algorithm, logp, old_logp, ref_logp, mask)
        loss += reduce_loss(penalty, mask)
    return loss


def surrogate_loss(
    logp: jax.Array, minibatch: Minibatch, config: Config, top_logp: jax.Array | None = None
) -> jax.Array:
    """Returns the part of `loss_of` that has the advantages: the surrogate, reduced."""
    batch = minibatch.batch
    top = {}
    if top_logp is not None:
        size = (-1, *top_logp.shape[-2:])
        top["top_logp"] = top_logp.reshape(size)
        top["top_rollout_logp"] = batch.top_rollout_logp.reshape(size)
    loss, denominator = config.algorithm.surrogate(
        flat(logp),
        flat(minibatch.old_logp),
        flat(batch.rollout_logp),
        flat(minibatch.advantage),
        flat(batch.mask),
        **top,
    )
    return config.algorithm.reduce(loss, denominator)


def is_separable_loss(config: Config) -> bool:
    """True if all functions of which `loss_of` is made are declared separable over microbatches."""
    parts = (
        config.algorithm.surrogate,
        config.algorithm.reference_penalty,
        config.constraint.penalty,
    )
    return all(is_separable(part) for part in parts if part is not None)


def flat(x: jax.Array) -> jax.Array:
    """[..., n, T] -> [N, T]."""
    return x.reshape(-1, x.shape[-1])
