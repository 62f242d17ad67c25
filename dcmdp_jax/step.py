"""The compiled step: TrainState x Batch -> TrainState, metrics.

Score, shape, loss, gradients, update, dual: `constrained_step` is the definition, and parameters
and multiplier change in one program. `one_pass_step` below it computes the same with one forward
pass less, for the configurations that `in_one_pass` accepts.

Sizes are those of `records`: M minibatches of A microbatches of n completions of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax import constraint, gaps, optimizers, seeds, sharding
from dcmdp_jax.config import Config, ModelConfig
from dcmdp_jax.losses import diagnostics, reduce
from dcmdp_jax.losses._separable import is_separable
from dcmdp_jax.models import decoder
from dcmdp_jax.models.kernels import scoring
from dcmdp_jax.records import Batch, TrainState
from dcmdp_jax.seeds import Stream

Metrics = dict[str, jax.Array | gaps.Gaps]  # scalars, and under "gaps" a summary of the gaps


class Updated(NamedTuple):
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


def compile(
    config: Config, model: ModelConfig, mesh: jax.sharding.Mesh, *, plain: bool = False
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step, in the plain form if `plain`; its state argument is donated."""
    state = state_shardings(config, model, mesh)
    form = one_pass_step if in_one_pass(config) and not plain else constrained_step
    return jax.jit(
        sharding.with_mesh(mesh, partial(form, config=config, model=model)),
        in_shardings=(state, batch_shardings(config, mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def constrained_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[TrainState, Metrics]:
    """One rollout batch: `epochs` x M updates of the parameters, then one of the multiplier.

    Returns the next state and the step's metrics. Updates whose loss or gradient is not finite are
    left out and counted.
    """
    multiplier = state.dual.multiplier

    # Score: log-probs at the weights that sampled the batch, and the reference's.
    old_logp, entropy = score(sampled_from(state, config)[0], batch, config, model)
    ref_logp = score_reference(state, batch, config, model)

    # Shape: A' = A - lambda delta, or whatever `constraint.shaping` makes of it.
    advantage = group_advantage(batch, config)
    shaped = shape(advantage, old_logp, batch, multiplier, config)

    # Loss, gradients, update.
    def update(updated: Updated, minibatch: Minibatch) -> tuple[Updated, tuple]:
        loss, grads = gradients(updated.params, state.frozen, minibatch, multiplier, config, model)
        updated, norm = apply_update(updated, loss, grads, config)
        return updated, (loss, norm)

    def epoch(updated: Updated, _: None) -> tuple[Updated, tuple]:
        return jax.lax.scan(update, updated, Minibatch(batch, old_logp, ref_logp, shaped))

    updated = Updated(state.params, state.opt_state, state.skipped)
    updated, (loss, norm) = jax.lax.scan(epoch, updated, None, config.algorithm.epochs)

    # Dual: one update, from the mean gap of all trained tokens before any rejection.
    dual, dual_metrics = update_dual(state.dual, old_logp, batch, config)

    metrics = batch_metrics(batch, advantage, shaped, old_logp, entropy)
    metrics |= update_metrics(loss, norm, updated.skipped)
    metrics |= staleness_metrics(state, old_logp, batch, config, model)
    return next_state(state, updated, dual), metrics | dual_metrics


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
    return score(state.reference, batch, config, model)[0]


def group_advantage(batch: Batch, config: Config) -> jax.Array:
    """Returns the advantage of each completion within its group, [M, A, n, 1]."""
    advantage = config.algorithm.advantage(
        batch.reward.reshape(-1), batch.group.reshape(-1), num_groups=config.data.prompts_per_step
    )
    return advantage.reshape(*batch.reward.shape, 1)


def shape(
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
    logp: jax.Array, minibatch: Minibatch, multiplier: jax.Array, config: Config
) -> jax.Array:
    """Returns the loss of a minibatch as a function of its log-probs [A, n, T]."""
    batch = minibatch.batch
    logp = _flat(logp)
    rollout_logp = _flat(batch.rollout_logp)
    mask = _flat(batch.mask)
    reduce_loss = config.algorithm.reduce
    loss, denominator = config.algorithm.surrogate(
        logp, _flat(minibatch.old_logp), rollout_logp, _flat(minibatch.advantage), mask
    )
    loss = reduce_loss(loss, denominator)
    # Penalties are of all trained tokens, those that the surrogate rejects too.
    if config.constraint.penalty:
        penalty = config.constraint.penalty(logp, rollout_logp, mask, multiplier)
        loss += reduce_loss(penalty, mask)
    if config.algorithm.reference_penalty:
        ref_logp = _flat(minibatch.ref_logp)
        loss += reduce_loss(config.algorithm.reference_penalty(logp, ref_logp, mask), mask)
    return loss


def gradients(
    params: Any,
    frozen: Any,
    minibatch: Minibatch,
    multiplier: jax.Array,
    config: Config,
    model: ModelConfig,
) -> tuple[jax.Array, Any]:
    """Returns the loss of a minibatch and its gradient with respect to `params`; the same for any
    number of microbatches.

    The loss is a function of all log-probs of the minibatch, and microbatches are backpropagated
    one after the other. For the other microbatches `old_logp` stands in where it is equal (no
    update yet) or cannot matter (separable loss). Elsewhere the minibatch is scored first.
    """
    logp = minibatch.old_logp
    if len(logp) > 1 and not (updates_once(config) or is_separable_loss(config)):
        decoder_params = _policy_params(params, frozen, config)
        logp, _ = _score_minibatch(decoder_params, minibatch.batch, config, model)
    loss = partial(loss_of, minibatch=minibatch, multiplier=multiplier, config=config)
    grads, logp, _ = backpropagate(params, frozen, minibatch.batch, logp, loss, config, model)
    return loss(logp), grads


def backpropagate(
    params: Any,
    frozen: Any,
    batch: Batch,
    logp_of_others: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool = False,
) -> tuple[Any, jax.Array, jax.Array | None]:
    """Sums the gradients of the A microbatches of one minibatch, with one forward pass over each.

    Args:
        batch: [A, ...].
        logp_of_others: [A, n, T], the log-probs that `loss` sees of the microbatches other than
            the one that is backpropagated.
        loss: a function of the minibatch's log-probs [A, n, T].
        entropy: whether to return entropies.

    Returns:
        The gradient with respect to `params`, and the log-probs and entropies [A, n, T].
    """

    def microbatch_gradient(i: jax.Array | int, micro: Batch) -> tuple[Any, tuple]:
        def logp_of(params: Any) -> tuple[jax.Array, jax.Array | None]:
            decoder_params = _policy_params(params, frozen, config)
            return _score(decoder_params, micro, config, model, entropy=entropy)

        logp, pullback, entropies = jax.vjp(logp_of, params, has_aux=True)
        slope = jax.grad(loss)(logp_of_others.at[i].set(logp))
        return pullback(slope[i])[0], (logp, entropies)

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


def apply_update(
    updated: Updated, loss: jax.Array, grads: Any, config: Config
) -> tuple[Updated, jax.Array]:
    """Makes one update by the optimizer, from the gradient clipped to the norm `grad_clip`.

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
        return optax.apply_updates(params, updates), opt_state

    opt_state = updated.opt_state
    if algorithm.offload:
        opt_state = optimizers.moments_to(jax.memory.Space.Device, opt_state, updated.params)
    params, opt_state = jax.lax.cond(
        finite, update, lambda *unchanged: unchanged, updated.params, opt_state
    )
    if algorithm.offload:
        opt_state = optimizers.moments_to(jax.memory.Space.Host, opt_state, params)
    return Updated(params, opt_state, updated.skipped + ~finite), norm


def update_dual(
    dual: constraint.DualState, old_logp: jax.Array, batch: Batch, config: Config
) -> tuple[constraint.DualState, Metrics]:
    """Returns the controller's next state, and what it measured and did."""
    total, count = constraint.measure(_flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask))
    new = controller(config).update(dual, total, count, config.constraint.tolerance)
    return new, {
        "delta_mean": jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan),
        "multiplier": dual.multiplier,
        "multiplier_next": new.multiplier,
        "saturated": new.saturated,
    }


def next_state(state: TrainState, updated: Updated, dual: constraint.DualState) -> TrainState:
    """Returns the state after a step; the parameters before it become the newest stale ones."""
    return state._replace(
        params=updated.params,
        opt_state=updated.opt_state,
        dual=dual,
        step=state.step + 1,
        skipped=updated.skipped,
        stale=(*state.stale, state.params)[1:],
    )


# ---- the one-pass form --------------------------------------------------------------------------


def in_one_pass(config: Config) -> bool:
    """True if one forward pass can both score a batch and update from it.

    The batch must make a single update, from the weights that sampled it. It must be a single
    microbatch, or loss and shaping must be declared separable over microbatches.
    """
    shaping = config.constraint.shaping
    is_separable_shaping = shaping is None or is_separable(shaping)
    return updates_once(config) and (
        config.algorithm.microbatches == 1 or (is_separable_loss(config) and is_separable_shaping)
    )


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


def one_pass_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[TrainState, Metrics]:
    """`constrained_step` for a single update at the weights that sampled: old_logp is logp.

    The batch is not scored first. While a microbatch is backpropagated, the log-probs of the
    others are set to 0, which is allowed because `in_one_pass` holds.
    """
    multiplier = state.dual.multiplier
    advantage = group_advantage(batch, config)
    ref_logp = score_reference(state, batch, config, model)
    loss = partial(
        on_policy_loss,
        batch=batch,
        ref_logp=ref_logp,
        advantage=advantage,
        multiplier=multiplier,
        config=config,
    )
    only = jax.tree.map(lambda x: x[0], batch)
    logp_of_others = jnp.zeros_like(only.rollout_logp)
    grads, logp, entropy = backpropagate(
        state.params, state.frozen, only, logp_of_others, loss, config, model, entropy=True
    )
    updated = Updated(state.params, state.opt_state, state.skipped)
    value = loss(logp)
    updated, norm = apply_update(updated, value, grads, config)

    old_logp = logp[None]
    entropy = entropy[None]
    shaped = shape(advantage, old_logp, batch, multiplier, config)
    dual, dual_metrics = update_dual(state.dual, old_logp, batch, config)
    metrics = batch_metrics(batch, advantage, shaped, old_logp, entropy)
    metrics |= update_metrics(value, norm, updated.skipped)
    return next_state(state, updated, dual), metrics | dual_metrics


def on_policy_loss(
    logp: jax.Array,
    batch: Batch,
    ref_logp: jax.Array | None,
    advantage: jax.Array,
    multiplier: jax.Array,
    config: Config,
) -> jax.Array:
    """Returns the loss of the only minibatch of a batch [1, A, ...] as a function of its log-probs
    [A, n, T], which are the old ones too.
    """
    old_logp = jax.lax.stop_gradient(logp)[None]
    shaped = shape(advantage, old_logp, batch, multiplier, config)
    fields = batch, old_logp, ref_logp, shaped
    minibatch = Minibatch(*jax.tree.map(lambda x: x[0], fields))
    return loss_of(logp, minibatch, multiplier, config)


# ---- metrics ------------------------------------------------------------------------------------


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
        "response_length": jnp.mean(jnp.sum(mask, axis=-1).astype(jnp.float32)),
        "logp_finite": jnp.all(jnp.isfinite(old_logp) | ~mask),
        "gaps": gaps.measure(old_logp, rollout_logp, completions, mask, reward),
        **diagnostics.summary(old_logp, rollout_logp, advantage, mask),
        **diagnostics.sign_flip(advantage, shaped, mask),
    }


def update_metrics(loss: jax.Array, norm: jax.Array, skipped: jax.Array) -> Metrics:
    """Means over a step's updates, and the updates skipped so far."""
    return {"loss": jnp.mean(loss), "grad_norm": jnp.mean(norm), "skipped": skipped}


def staleness_metrics(
    state: TrainState, old_logp: jax.Array, batch: Batch, config: Config, model: ModelConfig
) -> Metrics:
    """The gap divided into age and numerics, if the batch comes from stale weights."""
    if not state.stale:
        return {}
    logp, _ = score(policy_params(state, config), batch, config, model)
    return diagnostics.staleness(
        _flat(logp), _flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask)
    )


# ---- the state ----------------------------------------------------------------------------------


def init_state(config: Config, params: Any) -> TrainState:
    """Returns the state at step 0 of a run that starts from the decoder's `params`."""
    frozen, trained = (), params
    if config.model.trainable:
        key = jax.random.key(seeds.seed(config.seed, Stream.TRAINABLE))
        trained = config.model.trainable(params, key)
        frozen = params
    return TrainState(
        params=trained,
        opt_state=optimizers.from_config(config.algorithm).init(trained),
        dual=controller(config).init(),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        stale=tuple(_copy(trained) for _ in range(config.rollout.staleness)),
        frozen=frozen,
        reference=_copy(params) if config.algorithm.reference_penalty else (),
    )


def controller(config: Config) -> constraint.Controller:
    """Returns the controller that updates the multiplier."""
    c = config.constraint
    return c.dual(
        dual_lr=c.dual_lr, multiplier_init=c.multiplier_init, multiplier_max=c.multiplier_max
    )


def policy_params(state: TrainState, config: Config) -> Any:
    """Returns the decoder's parameters: what is scored, synced to the sampler and exported."""
    return _policy_params(state.params, state.frozen, config)


def sampled_from(state: TrainState, config: Config) -> tuple[Any, jax.Array]:
    """Returns the decoder's parameters that the next batch is sampled from, `rollout.staleness`
    steps old, and their version.
    """
    oldest = (*state.stale, state.params)[0]
    version = jnp.maximum(state.step - len(state.stale), 0)
    return _policy_params(oldest, state.frozen, config), version


def params_shardings(model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the layout of the decoder's parameters on the mesh that trains."""
    axes = decoder.logical_axes(model)
    return sharding.param_shardings(axes, mesh, sharding.TRAIN, _params_shapes(model))


def abstract_params(model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns shapes and shardings of the decoder's parameters on the mesh that trains."""
    return sharding.abstract_arrays(_params_shapes(model), params_shardings(model, mesh))


def state_shardings(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the layout of a `TrainState`.

    What is shaped like a parameter of the decoder lies as that parameter does; the rest is
    replicated.
    """
    shapes = _state_shapes(config, model)
    replicated = sharding.replicated(mesh)
    like_decoder = partial(
        optimizers.map_param_like,
        like=_params_shapes(model),
        values=params_shardings(model, mesh),
        default=replicated,
    )
    params = like_decoder(shapes.params)
    moments = sharding.on_host(params) if config.algorithm.offload else params
    return jax.tree.map(lambda _: replicated, shapes)._replace(
        params=params,
        opt_state=optimizers.map_param_like(shapes.opt_state, shapes.params, moments, replicated),
        stale=(params,) * config.rollout.staleness,
        frozen=like_decoder(shapes.frozen),
        reference=like_decoder(shapes.reference),
    )


def abstract_state(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns shapes and shardings of a run's state, for reading checkpoints and for plans."""
    return sharding.abstract_arrays(
        _state_shapes(config, model), state_shardings(config, model, mesh)
    )


def batch_shardings(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the layout of a `Batch`: packed rows over the batch axes and their positions over
    `sequence`; arrays of completions replicated.
    """
    rows = sharding.batch_shardings(mesh)
    replicated = sharding.replicated(mesh)
    return Batch(
        tokens=rows,
        positions=rows,
        segment_ids=rows,
        index=replicated,
        completions=replicated,
        mask=replicated,
        rollout_logp=replicated,
        reward=replicated,
        group=replicated,
        experts=rows if config.algorithm.replay_routing else None,
    )


def _params_shapes(model: ModelConfig) -> Any:
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), model))


def _state_shapes(config: Config, model: ModelConfig) -> TrainState:
    return jax.eval_shape(partial(init_state, config), _params_shapes(model))


def _policy_params(trained: Any, frozen: Any, config: Config) -> Any:
    if config.model.policy_params is None:
        return trained
    return jax.jit(config.model.policy_params)(trained, frozen)


def _score_minibatch(
    params: Any, minibatch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of [A, ...] microbatches, one after the other: [A, n, T]."""
    return jax.lax.map(lambda micro: _score(params, micro, config, model, entropy=True), minibatch)


def _score(
    params: Any, micro: Batch, config: Config, model: ModelConfig, *, entropy: bool
) -> tuple[jax.Array, jax.Array | None]:
    return scoring.packed_logp(
        params,
        micro.tokens,
        micro.positions,
        micro.segment_ids,
        micro.index,
        model,
        config.rollout.temperature,
        entropy=entropy,
        experts=micro.experts,
    )


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _flat(x: jax.Array) -> jax.Array:
    """[..., n, T] -> [N, T]."""
    return x.reshape(-1, x.shape[-1])
