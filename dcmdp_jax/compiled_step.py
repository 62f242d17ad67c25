"""The compiled step: `step.constrained_step`, or the same with one forward pass less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dcmdp_jax import (
    acceptance,
    entropy_bonus,
    objective,
    sharding,
    step,
    step_metrics,
    train_state,
    trainer_scores,
)
from dcmdp_jax.config import Config
from dcmdp_jax.losses._separable import is_separable
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, TrainState


def compile_step(
    config: Config, model: ModelConfig, mesh: jax.sharding.Mesh, *, plain: bool = False
) -> Callable[[TrainState, Batch], tuple[TrainState, step_metrics.Metrics]]:
    """Returns the jitted step, in the plain form if `plain`; its state argument is donated."""
    state = train_state.shardings(config, model, mesh)
    form = one_pass_step if in_one_pass(config) and not plain else step.constrained_step
    return jax.jit(
        sharding.with_mesh(mesh, partial(form, config=config, model=model)),
        in_shardings=(state, train_state.batch_shardings(config, mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def in_one_pass(config: Config) -> bool:
    """True if one forward pass can both score a batch and update from it.

    The batch must make a single update, from the weights that sampled it. It must be a single
    microbatch, or loss and shaping must be declared separable over microbatches. Its rewards must
    not depend on log-probs.
    """
    shaping = config.constraint.shaping
    separable = objective.is_separable_loss(config) and (shaping is None or is_separable(shaping))
    return (
        step.updates_once(config)
        and not config.algorithm.reference_in_reward
        and (config.algorithm.microbatches == 1 or separable)
    )


def one_pass_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[TrainState, step_metrics.Metrics]:
    """`step.constrained_step` for a single update at the weights that sampled: old_logp is logp.

    The batch is not scored first. While a microbatch is backpropagated, the log-probs of the
    others are set to 0, which is allowed because `in_one_pass` holds.
    """
    multiplier = state.dual.multiplier
    alpha = entropy_bonus.coefficient(config.algorithm, state.entropy_dual)
    batch = objective.apply_mask(batch, config)
    advantage = objective.group_advantage(batch, config)
    ref_logp = trainer_scores.score_reference(state, batch, config, model)

    def loss(scores: trainer_scores.Scores) -> jax.Array:
        return on_policy_loss(
            scores.logp, batch, ref_logp, advantage, multiplier, config, scores.top_logp
        )

    only = jax.tree.map(lambda x: x[0], batch)
    logp_of_others = jnp.zeros_like(only.rollout_logp)
    grads, scores, entropy = step.backpropagate(
        state.params,
        state.frozen,
        only,
        logp_of_others,
        loss,
        config,
        model,
        entropy=True,
        slope=entropy_bonus.slope(config.algorithm, alpha, only.mask),
    )
    learner = step.Learner(state.params, state.opt_state, state.skipped)
    value = loss(scores)
    if alpha is not None:
        value -= entropy_bonus.value(config.algorithm, alpha, entropy, only.mask)
    scale = step.update_scale(state, scores.logp[None], batch, config)
    learner, norm = step.apply_update(learner, value, grads, config, scale)

    old_logp = scores.logp[None]
    entropy = entropy[None]
    shaped = objective.shaped_advantage(advantage, old_logp, batch, multiplier, config)
    dual, dual_metrics = step.update_dual(state.dual, old_logp, batch, config)
    metrics = step_metrics.batch_metrics(batch, advantage, shaped, old_logp, entropy)
    minibatch = _only(batch, old_logp, ref_logp, shaped)
    metrics |= step_metrics.update_metrics(value, norm, scores, minibatch, config)
    metrics["skipped"] = learner.skipped
    metrics |= step_metrics.option_metrics(batch, old_logp, ref_logp, alpha, scale)
    new = step.next_state(state, learner, dual, batch, entropy, config)
    new, accepted = acceptance.keep_or_undo(state, new, old_logp, batch, advantage, config)
    new = step.move_reference(new, config)
    return new, metrics | dual_metrics | accepted


def on_policy_loss(
    logp: jax.Array,
    batch: Batch,
    ref_logp: jax.Array | None,
    advantage: jax.Array,
    multiplier: jax.Array,
    config: Config,
    top_logp: jax.Array | None = None,
) -> jax.Array:
    """Returns the loss of the only minibatch of a batch [1, A, ...] as a function of its log-probs
    [A, n, T], which are the old ones too, and of `top_logp` as in `trainer_scores.Scores`.
    """
    old_logp = jax.lax.stop_gradient(logp)[None]
    shaped = objective.shaped_advantage(advantage, old_logp, batch, multiplier, config)
    minibatch = _only(batch, old_logp, ref_logp, shaped)
    return objective.loss_of(logp, minibatch, multiplier, config, top_logp)


def _only(*fields: Batch | jax.Array | None) -> objective.Minibatch:
    """Returns the only minibatch of a batch, from its fields [1, A, ...]."""
    return objective.Minibatch(*jax.tree.map(lambda x: x[0], fields))
