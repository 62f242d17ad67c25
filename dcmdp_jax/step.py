"""The one compiled step: Batch x TrainState -> TrainState, metrics.

In this order: advantages, old log-probs, shaping, loss, gradients, optimizer, dual. The parameters and the multiplier
change in the same program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax import constraint, gaps, optimizers, sharding
from dcmdp_jax.config import AlgorithmConfig, Config, ModelConfig
from dcmdp_jax.losses import corrections, diagnostics, reduce
from dcmdp_jax.models import qwen3, scoring
from dcmdp_jax.records import Batch, TrainState

Metrics = dict[str, jax.Array | gaps.Gaps]  # numbers, and under "gaps" where the tokens' gaps lie
Pull = Callable[[jax.Array], tuple[Any]]


def controller(config: Config) -> constraint.Controller:
    c = config.constraint
    return c.dual(dual_lr=c.dual_lr, multiplier_init=c.multiplier_init, multiplier_max=c.multiplier_max)


def init_state(config: Config, params: Any) -> TrainState:
    return TrainState(params=params, opt_state=optimizers.of(config.algorithm).init(params), dual=controller(config).init(),
                      step=jnp.int32(0), skipped=jnp.int32(0),
                      stale=tuple(jax.tree.map(jnp.copy, params) for _ in range(config.rollout.staleness)))


def sampled_from(state: TrainState) -> tuple[Any, Any]:
    """The parameters that the next batch is sampled from, `rollout.staleness` steps old, and their version."""
    return (*state.stale, state.params)[0], jnp.maximum(state.step - len(state.stale), 0)


def state_shardings(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The layout of a `TrainState`: parameters and moments by the TRAIN table, the rest replicated."""
    shapes = jax.eval_shape(lambda: init_state(config, qwen3.init(jax.random.key(0), model)))
    params = sharding.params(qwen3.logical_axes(model), mesh, sharding.TRAIN, shapes.params)
    whole = sharding.replicated(mesh)
    moments = [sharding.on_host(params) if config.algorithm.offload else params] * (len(shapes.opt_state) - 1)
    return jax.tree.map(lambda _: whole, shapes)._replace(
        params=params, opt_state=type(shapes.opt_state)(whole, *moments), stale=(params,) * config.rollout.staleness)


def abstract_state(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and places of a run's state, for reading checkpoints and for plans."""
    shapes = jax.eval_shape(lambda: init_state(config, qwen3.init(jax.random.key(0), model)))
    return sharding.abstract(shapes, state_shardings(config, model, mesh))


def batch_shardings(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Packed rows over the batch axes and their positions over `sequence`; arrays of completions whole on every device."""
    rows, whole = sharding.packed_rows(mesh), sharding.replicated(mesh)
    return Batch(tokens=rows, positions=rows, segment_ids=rows, index=whole, completions=whole, mask=whole,
                 rollout_logp=whole, reward=whole, group=whole, experts=rows if config.algorithm.replay_routing else None)


def compile(config: Config, model: ModelConfig,
            mesh: jax.sharding.Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; its state argument is donated. Raises ValueError on a surrogate that several updates break."""
    surrogate, updates = config.algorithm.surrogate, config.algorithm.epochs * config.algorithm.minibatches
    if isinstance(surrogate, corrections.Bypass) and surrogate.denominator is corrections.surviving and updates > 1:
        raise ValueError("bypass with the surviving denominator judges tokens anew at every update; set "
                         "algorithm.epochs=1 and minibatches=1, or take corrections.original")
    state, batch = state_shardings(config, model, mesh), batch_shardings(config, mesh)
    return jax.jit(sharding.over(mesh, partial(constrained_step, config=config, model=model)), in_shardings=(state, batch),
                   out_shardings=(state, sharding.replicated(mesh)), donate_argnums=0)


def constrained_step(state: TrainState, batch: Batch, *, config: Config, model: ModelConfig) -> tuple[TrainState, Metrics]:
    """One rollout batch: `epochs` x M updates of the parameters, then one of the multiplier.

    A'_t = A_t - lambda delta_t with the current lambda, delta from the trainer's own log-probs at the weights that sampled,
    or whatever `constraint.shape` and `constraint.penalty` make of them; then lambda <- dual(lambda, mean delta) over all completion tokens, before any rejection. Updates whose gradient is
    not finite are left out and counted.
    """
    algorithm, dual = config.algorithm, config.constraint
    advantage = algorithm.advantage(batch.reward.reshape(-1), batch.group.reshape(-1),
                                    num_groups=config.data.prompts_per_step).reshape(batch.reward.shape)[..., None]
    pull, behaviour = None, sampled_from(state)[0]
    if algorithm.epochs * algorithm.minibatches * algorithm.microbatches == 1 and not state.stale:
        old_logp, pull, entropy = _only_pass(state.params, batch, config, model)
    else:
        old_logp, entropy = score(behaviour, batch, config, model)
    multiplier, shaped = state.dual.multiplier, jnp.broadcast_to(advantage, batch.mask.shape)
    if dual.shape:
        shaped = dual.shape(_flat(advantage), _flat(old_logp), _flat(batch.rollout_logp), multiplier, dual.tolerance,
                            _flat(batch.mask)).reshape(batch.mask.shape)

    def update(carry, minibatch):
        params, opt_state, skipped = carry
        loss, grads, norm = _gradients(params, minibatch, multiplier, config, model, pull)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        opt_state = _moved(opt_state, jax.memory.Space.Device, algorithm)
        params, opt_state = optimizers.of(algorithm).update(grads, norm, finite, params, opt_state)
        return (params, _moved(opt_state, jax.memory.Space.Host, algorithm), skipped + ~finite), (loss, norm)

    def epoch(carry, _):
        return jax.lax.scan(update, carry, (batch, old_logp, shaped))

    (params, opt_state, skipped), (loss, norm) = jax.lax.scan(
        epoch, (state.params, state.opt_state, state.skipped), None, length=algorithm.epochs)
    total, count = constraint.measure(_flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask))
    new_dual = controller(config).update(state.dual, total, count, dual.tolerance)
    metrics = _metrics(batch, advantage, old_logp, shaped, entropy) | {
        "loss": jnp.mean(loss), "grad_norm": jnp.mean(norm), "delta_mean": total / jnp.maximum(count, 1),
        "multiplier": state.dual.multiplier, "multiplier_next": new_dual.multiplier, "skipped": skipped,
        "gaps": gaps.measure(_flat(old_logp), _flat(batch.rollout_logp), _flat(batch.completions), _flat(batch.mask),
                             batch.reward.reshape(-1))}
    if state.stale:
        logp, _ = score(state.params, batch, config, model)
        metrics |= diagnostics.staleness(_flat(logp), _flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask))
    stale = (*state.stale, state.params)[1:]
    return TrainState(params, opt_state, new_dual, state.step + 1, skipped, stale), metrics


def _moved(opt_state: Any, memory: Any, algorithm: AlgorithmConfig) -> Any:
    """The optimizer's trees in that memory, where they are offloaded; its count stays on the device."""
    count, *trees = opt_state
    return type(opt_state)(count, *jax.device_put(trees, memory)) if algorithm.offload else opt_state


def score(params: Any, batch: Batch, config: Config, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The trainer's log-probs and entropies at the weights that sampled, [M, A, n, T]."""
    def one(micro):
        return _score(params, micro, config, model, entropy=True)

    return jax.lax.map(lambda minibatch: jax.lax.map(one, minibatch), batch)


def _only_pass(params: Any, batch: Batch, config: Config, model: ModelConfig) -> tuple[jax.Array, Pull, jax.Array]:
    """`score` of a single microbatch whose only update starts from the weights that sampled: the update's own forward
    pass. Between its results stands the way back, from the gradient of the log-probs to the parameters'.
    """
    micro = jax.tree.map(lambda x: x[0, 0], batch)
    logp, pull, entropy = jax.vjp(lambda params: _score(params, micro, config, model, entropy=True), params, has_aux=True)
    return logp[None, None], pull, entropy[None, None]


def _score(params: Any, micro: Batch, config: Config, model: ModelConfig, *,
           entropy: bool = False) -> tuple[jax.Array, jax.Array | None]:
    return scoring.packed_logp(params, micro.tokens, micro.positions, micro.segment_ids, micro.index, model,
                               config.rollout.temperature, entropy=entropy, experts=micro.experts)


def _gradients(params: Any, minibatch: tuple, multiplier: jax.Array, config: Config, model: ModelConfig,
               pull: Pull | None = None) -> tuple[jax.Array, Any, jax.Array]:
    """Loss, its gradient and the gradient's norm, accumulated over the A microbatches of one minibatch.

    The reducer is linear, so its gradient gives every token's weight in the minibatch as a whole; microbatches then add up
    to what the minibatch in one piece would give. `pull` is that of `_only_pass`, if there was one.
    """
    batch, old_logp, shaped = minibatch
    surrogate, penalty = config.algorithm.surrogate, config.constraint.penalty
    _, denominator = surrogate(_flat(old_logp), _flat(old_logp), _flat(batch.rollout_logp), _flat(shaped), _flat(batch.mask))
    weight = jax.grad(lambda x: config.algorithm.reduce(x, denominator))(jnp.zeros_like(_flat(shaped))).reshape(shaped.shape)

    def loss_of(logp, micro, old_logp, shaped, weight):
        loss, _ = surrogate(logp, old_logp, micro.rollout_logp, shaped, micro.mask)
        if penalty:
            loss += penalty(logp, micro.rollout_logp, micro.mask, multiplier)
        return jnp.sum(loss * weight)

    def loss_fn(params, micro, *arrays):
        return loss_of(_score(params, micro, config, model)[0], micro, *arrays)

    def accumulate(total, micro):
        # The barrier keeps sums over devices in the loop: behind it they would need whole gradients.
        return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(jax.value_and_grad(loss_fn)(params, *micro))), None

    micros = batch, old_logp, shaped, weight
    if len(shaped) == 1:  # nothing to add up, and no room for a sum
        only = jax.tree.map(lambda x: x[0], micros)
        loss, grads = jax.value_and_grad(loss_of if pull else loss_fn)(old_logp[0] if pull else params, *only)
        grads = pull(grads)[0] if pull else grads
    else:
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        (loss, grads), _ = jax.lax.scan(accumulate, zero, micros)
    return loss, grads, optax.tree.norm(grads)


def _metrics(batch: Batch, advantage: jax.Array, old_logp: jax.Array, shaped: jax.Array, entropy: jax.Array) -> Metrics:
    mask, advantage = _flat(batch.mask), _flat(advantage)
    return {
        "reward": jnp.mean(batch.reward),
        "entropy": reduce.token_mean(_flat(entropy), mask),
        "response_length": jnp.mean(jnp.sum(mask, axis=-1).astype(jnp.float32)),
    } | diagnostics.summary(_flat(old_logp), _flat(batch.rollout_logp), advantage, mask) \
      | diagnostics.sign_flip(advantage, _flat(shaped), mask)


def _flat(x: jax.Array) -> jax.Array:
    """[..., n, T] -> [N, T]."""
    return x.reshape(-1, x.shape[-1])
