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

from dcmdp_jax import acceptance, constraint, entropy_bonus, optimizers, reference, train_state
from dcmdp_jax.config import Config
from dcmdp_jax.losses import _arguments, diagnostics, kl, reduce
from dcmdp_jax.losses._separable import is_separable
from dcmdp_jax.models import engine_formats, scoring
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.monitoring import gaps
from dcmdp_jax.records import Batch, TrainState

Metrics = dict[str, jax.Array | gaps.Gaps]  # scalars, and under "gaps" a summary of the gaps


class Scores(NamedTuple):
    """The log-probs of which a loss is a function, and by which it is differentiated."""

    logp: jax.Array  # [A, n, T]
    top_logp: jax.Array | None = None  # [A, n, T, k], if `rollout.top_logprobs` is k


class Learner(NamedTuple):
    """What an update changes; fields as in `TrainState`."""

    params: Any
    opt_state: Any
    skipped: jax.Array


class Minibatch(NamedTuple):
    """What one update trains on."""

    batch: Batch  # [A, ...]
    old_logp: jax.Array  # [A, n, T]
    ref_logp: jax.Array | None  # [A, n, T]
    advantage: jax.Array  # [A, n, T], shaped


def constrained_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[TrainState, Metrics]:
    """One rollout batch: `epochs` x M updates of the parameters, then one of the multiplier.

    Returns the next state and the step's metrics. Updates whose loss or gradient is not finite are
    left out and counted.
    """
    multiplier = state.dual.multiplier
    alpha = entropy_bonus.coefficient(config.algorithm, state.entropy_dual)
    batch = trained(batch, config)

    # Score: log-probs at the weights that sampled the batch, and the reference's.
    old_logp, entropy = score(train_state.sampled_from(state, config)[0], batch, config, model)
    ref_logp = score_reference(state, batch, config, model)

    # Shape: A' = A - lambda delta, or whatever `constraint.shaping` makes of it.
    charged = charge_reference(batch, old_logp, ref_logp, config)
    advantage = group_advantage(charged, config)
    shaped = shaped_advantage(advantage, old_logp, batch, multiplier, config)

    # Loss, gradients, update.
    scale = update_scale(state, old_logp, batch, config)

    def update(learner: Learner, minibatch: Minibatch) -> tuple[Learner, Metrics]:
        loss, grads, scores = gradients(
            learner.params, state.frozen, minibatch, multiplier, config, model, alpha
        )
        learner, norm = apply_update(learner, loss, grads, config, scale)
        return learner, update_metrics(loss, norm, scores, minibatch, config)

    def epoch(learner: Learner, _: None) -> tuple[Learner, Metrics]:
        return jax.lax.scan(update, learner, Minibatch(batch, old_logp, ref_logp, shaped))

    learner = Learner(state.params, state.opt_state, state.skipped)
    learner, updates = jax.lax.scan(epoch, learner, None, config.algorithm.epochs)

    # Dual: one update, from the mean gap of all trained tokens before any rejection.
    dual, dual_metrics = update_dual(state.dual, old_logp, batch, config)

    metrics = batch_metrics(batch, advantage, shaped, old_logp, entropy)
    metrics |= jax.tree.map(jnp.mean, updates) | {"skipped": learner.skipped}
    metrics |= option_metrics(batch, old_logp, ref_logp, alpha, scale)
    metrics |= staleness_metrics(state, old_logp, batch, config, model)
    new = next_state(state, learner, dual, batch, entropy, config)
    new, accepted = acceptance.keep_or_undo(state, new, old_logp, batch, advantage, config)
    return new, metrics | dual_metrics | accepted


def score(
    params: Any, batch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs and entropies [M, A, n, T] of a batch under the decoder's `params`."""
    return jax.lax.map(lambda minibatch: _score_minibatch(params, minibatch, config, model), batch)


def score_reference(
    state: TrainState, batch: Batch, config: Config, model: ModelConfig
) -> jax.Array | None:
    """Returns the reference's log-probs [M, A, n, T]; None if there is no reference penalty."""
    if not config.algorithm.reference_penalty:
        return None
    params = train_state.decoder_params(state.reference, state.frozen, config)
    return score(params, batch, config, model)[0]


def charge_reference(
    batch: Batch, old_logp: jax.Array, ref_logp: jax.Array | None, config: Config
) -> Batch:
    """Returns the batch with rewards less the reference penalty, summed over each completion, if
    that is where it is charged.

    Formula: R_i - sum_t penalty_it, before the group's mean is taken (as TRL's RLOO and verl's
    `use_kl_in_reward` do).
    """
    if not config.algorithm.reference_in_reward:
        return batch
    old_logp = _flat(old_logp)
    penalty = reference.penalty(
        config.algorithm, old_logp, old_logp, _flat(ref_logp), _flat(batch.mask)
    )
    charge = jnp.sum(penalty, axis=-1).reshape(batch.reward.shape)
    return batch._replace(reward=batch.reward - charge)


def trained(batch: Batch, config: Config) -> Batch:
    """Returns the batch with the mask of the tokens that `algorithm.mask` leaves."""
    if not config.algorithm.mask:
        return batch
    mask = config.algorithm.mask(
        _flat(batch.mask),
        batch.reward.reshape(-1),
        batch.truncated.reshape(-1),
        batch.group.reshape(-1),
        num_groups=config.data.prompts_per_step,
    )
    return batch._replace(mask=mask.reshape(batch.mask.shape))


def group_advantage(batch: Batch, config: Config) -> jax.Array:
    """Returns the advantage of each completion within its group, [M, A, n, 1], or of each token,
    [M, A, n, T], as `algorithm.advantage` returns it.
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
    function = config.algorithm.advantage
    mask = {"mask": _flat(batch.mask)} if _arguments.takes(function, "mask") else {}
    advantage = function(reward, group, num_groups=num_groups, **mask)
    return advantage.reshape(*batch.reward.shape, -1)


def shaped_advantage(
    advantage: jax.Array, old_logp: jax.Array, batch: Batch, multiplier: jax.Array, config: Config
) -> jax.Array:
    """Returns the shaped advantage of each token, [M, A, n, T]."""
    if not config.constraint.shaping:
        return jnp.broadcast_to(advantage, batch.mask.shape)
    shaped = config.constraint.shaping(
        _flat(advantage),
        _flat(old_logp),
        _flat(batch.rollout_logp),
        multiplier,
        config.constraint.tolerance,
        _flat(batch.mask),
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
    logp = _flat(logp)
    rollout_logp = _flat(batch.rollout_logp)
    mask = _flat(batch.mask)
    reduce_loss = config.algorithm.reduce
    # Penalties are of all trained tokens, those that the surrogate rejects too.
    if config.constraint.penalty:
        penalty = config.constraint.penalty(logp, rollout_logp, mask, multiplier)
        loss += reduce_loss(penalty, mask)
    if config.algorithm.reference_penalty and not config.algorithm.reference_in_reward:
        old_logp = _flat(minibatch.old_logp)
        ref_logp = _flat(minibatch.ref_logp)
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
        _flat(logp),
        _flat(minibatch.old_logp),
        _flat(batch.rollout_logp),
        _flat(minibatch.advantage),
        _flat(batch.mask),
        **top,
    )
    return config.algorithm.reduce(loss, denominator)


def gradients(
    params: Any,
    frozen: Any,
    minibatch: Minibatch,
    multiplier: jax.Array,
    config: Config,
    model: ModelConfig,
    alpha: jax.Array | None = None,
) -> tuple[jax.Array, Any, Scores]:
    """Returns the loss of a minibatch, its gradient with respect to `params`, the same for any
    number of microbatches, and the log-probs.

    The loss is `loss_of`, less the entropy bonus if `alpha` is not None.

    The loss is a function of all log-probs of the minibatch, and microbatches are backpropagated
    one after the other. For the other microbatches `old_logp` stands in where it is equal (no
    update yet) or cannot matter (separable loss). Elsewhere the minibatch is scored first.
    """
    logp = minibatch.old_logp
    if len(logp) > 1 and not (updates_once(config) or is_separable_loss(config)):
        decoder = train_state.decoder_params(params, frozen, config)
        logp, _ = _score_minibatch(decoder, minibatch.batch, config, model)

    def loss(scores: Scores) -> jax.Array:
        return loss_of(scores.logp, minibatch, multiplier, config, scores.top_logp)

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
    loss: Callable[[Scores], jax.Array],
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool = False,
    slope: jax.Array | None = None,
) -> tuple[Any, Scores, jax.Array | None]:
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
    of_others = Scores(logp_of_others, None if top is None else jnp.zeros_like(top))

    def microbatch_gradient(i: jax.Array | int, micro: Batch) -> tuple[Any, tuple]:
        def scores_of(params: Any) -> tuple[Scores, jax.Array | None]:
            decoder = train_state.decoder_params(params, frozen, config)
            with_slope = slope is not None
            return _score_all(
                decoder, micro, config, model, entropy=entropy or with_slope, slope=with_slope
            )

        def slopes_of(scores: Scores) -> Scores:
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


def is_separable_loss(config: Config) -> bool:
    """True if all functions of which `loss_of` is made are declared separable over microbatches."""
    parts = (
        config.algorithm.surrogate,
        config.algorithm.reference_penalty,
        config.constraint.penalty,
    )
    return all(is_separable(part) for part in parts if part is not None)


def update_scale(
    state: TrainState, old_logp: jax.Array, batch: Batch, config: Config
) -> jax.Array | None:
    """Returns what `algorithm.update_scale` makes of a batch; None if it is not set."""
    if not config.algorithm.update_scale:
        return None
    return config.algorithm.update_scale(
        _flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask), state.step
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

    If the loss or the gradient is not finite, nothing changes but the count of skipped updates.

    Returns:
        What the update changes, and the norm of the gradient before it was clipped.
    """
    algorithm = config.algorithm
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
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
) -> tuple[constraint.DualState, Metrics]:
    """Returns the controller's next state, and what it measured and did."""
    total, count = constraint.measure(_flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask))
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
    new = state._replace(
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
    if config.algorithm.reference_update:
        moved = config.algorithm.reference_update(state.reference, new.params, new.step)
        new = new._replace(reference=moved)
    return new


def batch_metrics(
    batch: Batch, advantage: jax.Array, shaped: jax.Array, old_logp: jax.Array, entropy: jax.Array
) -> Metrics:
    """Rewards, lengths, entropy, and the gap between trainer and sampler."""
    advantage, shaped, old_logp, entropy, rollout_logp, completions, mask = map(
        _flat,
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
    loss: jax.Array, norm: jax.Array, scores: Scores, minibatch: Minibatch, config: Config
) -> Metrics:
    """What is measured at each update, and averaged over a step's.

    `clip_fraction` is the share of trained tokens that the surrogate gives no gradient although
    they have an advantage: the clip stopped them, or a rejection dropped them. `approx_kl` is the
    k3 estimate of KL(old || current). Before the first update at the weights that sampled it is 0.
    """
    mask = minibatch.batch.mask
    logp = scores.logp
    slope = jax.grad(surrogate_loss)(logp, minibatch, config, scores.top_logp)
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

    `ref_kl` is the k3 estimate of KL(policy || reference) before the step, a mean over tokens.
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
    state: TrainState, old_logp: jax.Array, batch: Batch, config: Config, model: ModelConfig
) -> Metrics:
    """The gap divided into age and numerics, if the batch comes from stale weights."""
    if not state.stale:
        return {}
    logp, _ = score(train_state.policy_params(state, config), batch, config, model)
    return diagnostics.staleness(
        _flat(logp), _flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask)
    )


def scored_params(params: Any, config: Config, model: ModelConfig) -> Any:
    """Returns the decoder's parameters that the forward pass is run with: `params`, or those with
    the engine's rounding and a straight-through gradient.
    """
    if not config.algorithm.quantize_aware:
        return params
    return engine_formats.straight_through(params, model, config.rollout.precision)


def _score_minibatch(
    params: Any, minibatch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of [A, ...] microbatches, one after the other: [A, n, T]."""
    return jax.lax.map(lambda micro: _score(params, micro, config, model, entropy=True), minibatch)


def _score(
    params: Any,
    micro: Batch,
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool,
    slope: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    return scoring.packed_logp(
        scored_params(params, config, model),
        micro.tokens,
        micro.positions,
        micro.segment_ids,
        micro.index,
        model,
        config.rollout.temperature,
        entropy=entropy,
        entropy_gradient=slope,
        replayed=micro.replayed,
    )


def _score_all(
    params: Any,
    micro: Batch,
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool,
    slope: bool = False,
) -> tuple[Scores, jax.Array | None]:
    """As `_score`, with the log-probs of the sampler's likeliest tokens if the batch has them."""
    if micro.top_tokens is None:
        logp, entropies = _score(params, micro, config, model, entropy=entropy, slope=slope)
        return Scores(logp), entropies
    logp, entropies, top_logp = scoring.packed_top_logp(
        scored_params(params, config, model),
        micro.tokens,
        micro.positions,
        micro.segment_ids,
        micro.index,
        micro.top_tokens,
        model,
        config.rollout.temperature,
        entropy=entropy,
        entropy_gradient=slope,
        replayed=micro.replayed,
    )
    return Scores(logp, top_logp), entropies


def _flat(x: jax.Array) -> jax.Array:
    """[..., n, T] -> [N, T]."""
    return x.reshape(-1, x.shape[-1])
