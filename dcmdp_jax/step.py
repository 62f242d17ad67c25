"""One step of training: TrainState x Batch -> TrainState, metrics.

Score, shape, loss, gradients, update, dual: `constrained_step` is the definition, and parameters
and multiplier change in one program, which `compiled_step` makes.

Sizes are those of `records`: M minibatches of A microbatches of n completions of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax import (
    acceptance,
    constraint,
    entropy_bonus,
    objective,
    optimizers,
    step_metrics,
    train_state,
    trainer_scores,
)
from dcmdp_jax.config import Config
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, TrainState


class Learner(NamedTuple):
    """What an update changes; fields as in `TrainState`."""

    params: Any
    opt_state: Any
    skipped: jax.Array


def constrained_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[TrainState, step_metrics.Metrics]:
    """One rollout batch: `epochs` x M updates of the parameters, then one of the multiplier.

    Returns the next state and the step's metrics. Updates whose loss, gradient or scale is not
    finite are left out and counted.
    """
    multiplier = state.dual.multiplier
    alpha = entropy_bonus.coefficient(config.algorithm, state.entropy_dual)
    batch = objective.apply_mask(batch, config)

    # Score: log-probs at the weights that sampled the batch, and the reference's.
    old_logp, entropy = trainer_scores.score(
        train_state.sampled_from(state, config)[0], batch, config, model
    )
    ref_logp = trainer_scores.score_reference(state, batch, config, model)
    # at the weights that the step updates: others than those that sampled, if these are stale
    logp = old_logp
    if state.stale:
        policy = train_state.policy_params(state, config)
        logp, current_entropy = trainer_scores.score(policy, batch, config, model)
        if batch.version is not None:  # tokens that were sampled once the update before had ended
            current = batch.version == state.step
            old_logp = jnp.where(current, logp, old_logp)
            entropy = jnp.where(current, current_entropy, entropy)

    # Shape: A' = A - lambda delta, or whatever `constraint.shaping` makes of it.
    charge = objective.reference_charge(batch, old_logp, ref_logp, config)
    advantage = objective.group_advantage(batch, config, charge)
    shaped = objective.shaped_advantage(advantage, old_logp, batch, multiplier, config)

    # Loss, gradients, update.
    scale = update_scale(state, logp, batch, config)

    def update(
        learner: Learner, minibatch: objective.Minibatch
    ) -> tuple[Learner, step_metrics.Metrics]:
        loss, grads, scores = gradients(
            learner.params, state.frozen, minibatch, multiplier, config, model, alpha
        )
        learner, norm = apply_update(learner, loss, grads, config, scale)
        return learner, step_metrics.update_metrics(loss, norm, scores, minibatch, config)

    def epoch(learner: Learner, _: None) -> tuple[Learner, step_metrics.Metrics]:
        return jax.lax.scan(update, learner, objective.Minibatch(batch, old_logp, ref_logp, shaped))

    learner = Learner(state.params, state.opt_state, state.skipped)
    learner, updates = jax.lax.scan(epoch, learner, None, config.algorithm.epochs)

    # Dual: one update, from the mean gap of all trained tokens before any rejection.
    dual, dual_metrics = update_dual(state.dual, old_logp, batch, config)

    metrics = step_metrics.batch_metrics(batch, advantage, shaped, old_logp, entropy)
    metrics |= jax.tree.map(jnp.mean, updates) | {"skipped": learner.skipped}
    metrics |= step_metrics.option_metrics(batch, old_logp, ref_logp, alpha, scale)
    metrics |= step_metrics.staleness_metrics(state, logp, old_logp, batch)
    new = next_state(state, learner, dual, batch, entropy, config)
    new, accepted = acceptance.keep_or_undo(state, new, old_logp, batch, advantage, config)
    new = move_reference(new, config)
    return new, metrics | dual_metrics | accepted


def gradients(
    params: Any,
    frozen: Any,
    minibatch: objective.Minibatch,
    multiplier: jax.Array,
    config: Config,
    model: ModelConfig,
    alpha: jax.Array | None = None,
) -> tuple[jax.Array, Any, trainer_scores.Scores]:
    """Returns the loss of a minibatch, its gradient with respect to `params`, the same for any
    number of microbatches, and the log-probs.

    The loss is `loss_of`, less the entropy bonus if `alpha` is not None.

    The loss is a function of all log-probs of the minibatch, and microbatches are backpropagated
    one after the other. For the other microbatches `old_logp` stands in where it is equal (no
    update yet) or cannot matter (separable loss). Elsewhere the minibatch is scored first.
    """
    logp = minibatch.old_logp
    if len(logp) > 1 and not (updates_once(config) or objective.is_separable_loss(config)):
        decoder = train_state.decoder_params(params, frozen, config)
        logp, _ = trainer_scores.score_minibatch(decoder, minibatch.batch, config, model)

    def loss(scores: trainer_scores.Scores) -> jax.Array:
        return objective.loss_of(scores.logp, minibatch, multiplier, config, scores.top_logp)

    slope = entropy_bonus.slope(config.algorithm, alpha, minibatch.batch.mask)
    grads, scores, entropy = backpropagate(
        params, frozen, minibatch.batch, logp, loss, config, model, slope=slope
    )
    value = loss(scores)
    if alpha is not None:
        value -= entropy_bonus.value(config.algorithm, alpha, entropy, minibatch.batch.mask)
    return value, grads, scores


def backpropagate(
    params: Any,
    frozen: Any,
    batch: Batch,
    logp_of_others: jax.Array,
    loss: Callable[[trainer_scores.Scores], jax.Array],
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool = False,
    slope: jax.Array | None = None,
) -> tuple[Any, trainer_scores.Scores, jax.Array | None]:
    """Sums the gradients of the A microbatches of one minibatch, with one forward pass over each.

    Args:
        batch: [A, ...].
        logp_of_others: [A, n, T], the log-probs that `loss` sees of the microbatches other than
            the one that is backpropagated; their `top_logp` it sees as 0.
        loss: a function of the minibatch's log-probs.
        entropy: whether to return entropies; they are with a `slope`.
        slope: [A, n, T], the gradient with respect to the entropies; None: it is 0.

    Returns:
        The gradient with respect to `params`, the log-probs, and the entropies [A, n, T].
    """
    top = batch.top_rollout_logp
    of_others = trainer_scores.Scores(logp_of_others, None if top is None else jnp.zeros_like(top))

    def microbatch_gradient(i: jax.Array | int, micro: Batch) -> tuple[Any, tuple]:
        def scores_of(params: Any) -> tuple[trainer_scores.Scores, jax.Array | None]:
            decoder = train_state.decoder_params(params, frozen, config)
            with_slope = slope is not None
            return trainer_scores.score_microbatch(
                decoder, micro, config, model, entropy=entropy or with_slope, slope=with_slope
            )

        def slopes_of(scores: trainer_scores.Scores) -> trainer_scores.Scores:
            seen = jax.tree.map(lambda x, y: x.at[i].set(y), of_others, scores)
            return jax.tree.map(lambda x: x[i], jax.grad(loss)(seen))

        if slope is None:
            scores, pullback, entropies = jax.vjp(scores_of, params, has_aux=True)
            return pullback(slopes_of(scores))[0], (scores, entropies)
        (scores, entropies), pullback = jax.vjp(scores_of, params)
        return pullback((slopes_of(scores), slope[i]))[0], (scores, entropies)

    def accumulate(total: Any, numbered: tuple) -> tuple[Any, tuple]:
        # Without the barrier the sum over devices would move out of the loop, which would then
        # hold unsharded gradients.
        grads, scores = jax.lax.optimization_barrier(microbatch_gradient(*numbered))
        return jax.tree.map(jnp.add, total, grads), scores

    if len(logp_of_others) == 1:  # no sum, and no memory for one
        grads, scores = microbatch_gradient(0, jax.tree.map(lambda x: x[0], batch))
        return grads, *jax.tree.map(lambda x: x[None], scores)
    zero = jax.tree.map(jnp.zeros_like, params)
    grads, scores = jax.lax.scan(accumulate, zero, (jnp.arange(len(logp_of_others)), batch))
    return grads, *scores


def updates_once(config: Config) -> bool:
    """True if a batch makes a single update, at the weights that sampled it."""
    algorithm = config.algorithm
    return algorithm.epochs * algorithm.minibatches == 1 and not config.rollout.staleness


def update_scale(
    state: TrainState, logp: jax.Array, batch: Batch, config: Config
) -> jax.Array | None:
    """Returns what `algorithm.update_scale` makes of a batch, whose log-probs before the step are
    `logp`; None if it is not set.
    """
    if not config.algorithm.update_scale:
        return None
    return config.algorithm.update_scale(
        objective.flat(logp),
        objective.flat(batch.rollout_logp),
        objective.flat(batch.mask),
        state.step,
    )


def apply_update(
    learner: Learner,
    loss: jax.Array,
    grads: Any,
    config: Config,
    scale: jax.Array | None = None,
) -> tuple[Learner, jax.Array]:
    """Makes one update by the optimizer, from the gradient clipped to the norm `grad_clip`; the
    update is multiplied by `scale`, if there is one.

    If the loss, the gradient or the scale is not finite, nothing changes but the count of skipped
    updates.

    Returns:
        What the update changes, and the norm of the gradient before it was clipped.
    """
    algorithm = config.algorithm
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    if scale is not None:
        finite &= jnp.isfinite(scale)
    clip = jnp.minimum(1.0, algorithm.grad_clip / norm) if algorithm.grad_clip else 1.0

    def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
        clipped = jax.tree.map(lambda g: g * clip, grads)
        optimizer = optimizers.from_config(algorithm)
        updates, opt_state = optimizer.update(clipped, opt_state, params)
        if scale is not None:
            updates = jax.tree.map(lambda u: u * scale, updates)
        return optax.apply_updates(params, updates), opt_state

    opt_state = learner.opt_state
    if algorithm.offload:
        opt_state = optimizers.moments_to(jax.memory.Space.Device, opt_state, learner.params)
    params, opt_state = jax.lax.cond(
        finite, update, lambda *unchanged: unchanged, learner.params, opt_state
    )
    if algorithm.offload:
        opt_state = optimizers.moments_to(jax.memory.Space.Host, opt_state, params)
    return Learner(params, opt_state, learner.skipped + ~finite), norm


def update_dual(
    dual: constraint.DualState, old_logp: jax.Array, batch: Batch, config: Config
) -> tuple[constraint.DualState, step_metrics.Metrics]:
    """Returns the controller's next state, and what it measured and did."""
    total, count = constraint.measure(
        objective.flat(old_logp), objective.flat(batch.rollout_logp), objective.flat(batch.mask)
    )
    new = train_state.controller(config).update(dual, total, count, config.constraint.tolerance)
    return new, {
        "delta_mean": jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan),
        "multiplier": dual.multiplier,
        "multiplier_next": new.multiplier,
        "saturated": new.saturated,
    }


def next_state(
    state: TrainState,
    learner: Learner,
    dual: constraint.DualState,
    batch: Batch,
    entropy: jax.Array,
    config: Config,
) -> TrainState:
    """Returns the state after a step; the parameters before it become the newest stale ones."""
    return state._replace(
        params=learner.params,
        opt_state=learner.opt_state,
        dual=dual,
        step=state.step + 1,
        skipped=learner.skipped,
        stale=(*state.stale, state.params)[1:],
        entropy_dual=entropy_bonus.update(
            config.algorithm, state.entropy_dual, entropy, batch.mask
        ),
    )


def move_reference(new: TrainState, config: Config) -> TrainState:
    """Returns the state after a step with the reference that follows its parameters."""
    if not config.algorithm.reference_update:
        return new
    moved = config.algorithm.reference_update(new.reference, new.params, new.step)
    return new._replace(reference=moved)
