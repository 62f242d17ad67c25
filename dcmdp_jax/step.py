"""The one compiled step: Batch x TrainState -> TrainState, metrics.

In this order: advantages, old log-probs, shaping, loss, gradients, optimizer, dual. The parameters
    and the multiplier
change in the same program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcmdp_jax import constraint, gaps, optimizers, sharding
from dcmdp_jax.config import AlgorithmConfig, Config, ModelConfig
from dcmdp_jax.losses import corrections, diagnostics, reduce
from dcmdp_jax.models import decoder
from dcmdp_jax.models.kernels import scoring
from dcmdp_jax.records import Batch, TrainState

Metrics = dict[str, jax.Array | gaps.Gaps]  # numbers, and under "gaps" where the tokens' gaps lie
Slope = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def controller(config: Config) -> constraint.Controller:
    c = config.constraint
    return c.dual(
        dual_lr=c.dual_lr, multiplier_init=c.multiplier_init, multiplier_max=c.multiplier_max
    )


def init_state(config: Config, params: Any) -> TrainState:
    return TrainState(
        params=params,
        opt_state=optimizers.of(config.algorithm).init(params),
        dual=controller(config).init(),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        stale=tuple(jax.tree.map(jnp.copy, params) for _ in range(config.rollout.staleness)),
    )


def sampled_from(state: TrainState) -> tuple[Any, Any]:
    """The parameters that the next batch is sampled from, `rollout.staleness` steps old, and their
    version.
    """
    return (*state.stale, state.params)[0], jnp.maximum(state.step - len(state.stale), 0)


def state_shardings(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The layout of a `TrainState`: parameters and moments by the TRAIN table, the rest replicated."""
    shapes = jax.eval_shape(lambda: init_state(config, decoder.init(jax.random.key(0), model)))
    params = sharding.param_shardings(
        decoder.logical_axes(model), mesh, sharding.TRAIN, shapes.params
    )
    whole = sharding.replicated(mesh)
    moments = [sharding.on_host(params) if config.algorithm.offload else params] * (
        len(shapes.opt_state) - 1
    )
    return jax.tree.map(lambda _: whole, shapes)._replace(
        params=params,
        opt_state=type(shapes.opt_state)(whole, *moments),
        stale=(params,) * config.rollout.staleness,
    )


def abstract_state(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and places of a run's state, for reading checkpoints and for plans."""
    shapes = jax.eval_shape(lambda: init_state(config, decoder.init(jax.random.key(0), model)))
    return sharding.abstract_arrays(shapes, state_shardings(config, model, mesh))


def batch_shardings(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Packed rows over the batch axes and their positions over `sequence`; arrays of completions
    whole on every device.
    """
    rows = sharding.batch_shardings(mesh)
    whole = sharding.replicated(mesh)
    return Batch(
        tokens=rows,
        positions=rows,
        segment_ids=rows,
        index=whole,
        completions=whole,
        mask=whole,
        rollout_logp=whole,
        reward=whole,
        group=whole,
        experts=rows if config.algorithm.replay_routing else None,
    )


def check(config: Config) -> None:
    """Raises ValueError on a surrogate that other weights than those that sampled break."""
    surrogate = config.algorithm.surrogate
    bypasses = isinstance(surrogate, corrections.Bypass)
    if bypasses and surrogate.denominator is corrections.surviving and not _is_single(config):
        raise ValueError(
            "bypass with the surviving denominator counts the tokens that survive at "
            "the weights that sampled, and judges them anew at those that train; set "
            "algorithm.epochs=1, algorithm.minibatches=1 and rollout.staleness=0, or "
            "take corrections.original"
        )


def compile(
    config: Config, model: ModelConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; its state argument is donated. Raises ValueError as `check` does."""
    check(config)
    state = state_shardings(config, model, mesh)
    batch = batch_shardings(config, mesh)
    update = partial(constrained_step, config=config, model=model, one_pass=in_one_pass(config))
    return jax.jit(
        sharding.with_mesh(mesh, update),
        in_shardings=(state, batch),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def in_one_pass(config: Config) -> bool:
    """Whether one forward pass both scores a batch and updates from it: there is a single update,
    it starts from the weights that sampled, and the loss of one microbatch does not hang on the
    log-probs of others.
    """
    return _is_single(config) and (config.algorithm.microbatches == 1 or _judged_apart(config))


def _is_single(config: Config) -> bool:
    """Whether a batch has one update, at the weights that sampled it."""
    return (
        config.algorithm.epochs * config.algorithm.minibatches == 1 and not config.rollout.staleness
    )


def _judged_apart(config: Config) -> bool:
    """Tried out on a made-up batch: every other microbatch is moved a little, far, and to NaN, and
    the rest looked at.

    Where nothing has a slope, as when all of it is rejected, nothing is shown, and the answer is
    no.
    """
    parts = config.algorithm.microbatches
    samples = config.rollout.samples
    width = config.rollout.max_tokens
    count = config.data.prompts_per_step * samples
    rng = np.random.default_rng(0)
    shape = 1, parts, count // parts, width
    logp, noise = -rng.exponential(size=(2, *shape)).astype(np.float32)
    # completions without a gap, which nothing rejects
    exact = np.arange(count).reshape(shape[:3])[..., None] % 2 == 0
    batch = Batch(*[None] * len(Batch._fields))._replace(
        mask=np.arange(width) < rng.integers(1, width + 1, shape[:3])[..., None],
        rollout_logp=logp + np.where(exact, 0, rng.normal(0, 0.1, shape)).astype(np.float32),
        reward=rng.integers(0, 2, shape[:3]).astype(np.float32),
        group=(rng.permutation(count).reshape(shape[:3]) // samples).astype(np.int32),
    )
    multiplier = controller(config).init().multiplier + 0.1
    slope = jax.jit(
        lambda logp, batch: _slope(logp, batch, _advantage(batch, config), multiplier, config)[1]
    )
    for odd in (0, 1):
        moved = (np.arange(parts) % 2 == odd)[None, :, None, None]
        fixed, *others = (
            np.asarray(slope(np.where(moved, logp + far * noise, logp), batch))[:, 1 - odd :: 2]
            for far in np.float32([0, 0.01, 3, 30, np.nan])
        )
        if not fixed.any() or not all(np.array_equal(fixed, other) for other in others):
            return False
    return True


def constrained_step(
    state: TrainState, batch: Batch, *, config: Config, model: ModelConfig, one_pass: bool
) -> tuple[TrainState, Metrics]:
    """One rollout batch: `epochs` x M updates of the parameters, then one of the multiplier.

    A'_t = A_t - lambda delta_t with the current lambda, delta from the trainer's own log-probs at
    the weights that sampled, or whatever `constraint.shaping` and `constraint.penalty` make of them;
    then lambda <- dual(lambda, mean delta) over all completion tokens, before any rejection.
    Updates whose loss or gradient is not finite are left out and counted. `one_pass` is what
    `in_one_pass` says. Where it is wrong about a batch, the metric "apart" is False and the state
    stays as it was.
    """
    algorithm, dual, multiplier = config.algorithm, config.constraint, state.dual.multiplier
    advantage = _advantage(batch, config)

    def update(carry, loss, grads):
        params, opt_state, skipped = carry
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss) & apart
        opt_state = _moved(opt_state, jax.memory.Space.Device, algorithm)
        params, opt_state = optimizers.of(algorithm).update(grads, norm, finite, params, opt_state)
        opt_state = _moved(opt_state, jax.memory.Space.Host, algorithm)
        return (params, opt_state, skipped + (apart & ~finite)), (loss, norm)

    carry = (state.params, state.opt_state, state.skipped)
    apart = jnp.bool_(True)
    if _is_single(config):
        known = None if one_pass else score(state.params, batch, config, model)[0]
        slope = partial(
            _slope, batch=batch, advantage=advantage, multiplier=multiplier, config=config
        )
        loss, grads, old_logp, entropy, apart = _single(
            state.params, batch, known, slope, config, model
        )
        shaped = _shaped(old_logp, batch, advantage, multiplier, config)
        (params, opt_state, skipped), (loss, norm) = update(carry, loss, grads)
    else:
        old_logp, entropy = score(sampled_from(state)[0], batch, config, model)
        shaped = _shaped(old_logp, batch, advantage, multiplier, config)

        def one(carry, minibatch):
            return update(carry, *_gradients(carry[0], minibatch, multiplier, config, model))

        def epoch(carry, _):
            return jax.lax.scan(one, carry, (batch, old_logp, shaped))

        (params, opt_state, skipped), (loss, norm) = jax.lax.scan(
            epoch, carry, None, length=algorithm.epochs
        )
    total, count = constraint.measure(_flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask))
    seen = jnp.where(apart, count, 0)
    new_dual = controller(config).update(state.dual, total, seen, dual.tolerance)
    metrics = _metrics(batch, advantage, old_logp, shaped, entropy) | {
        "loss": jnp.mean(loss),
        "grad_norm": jnp.mean(norm),
        "delta_mean": jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan),
        "multiplier": state.dual.multiplier,
        "multiplier_next": new_dual.multiplier,
        "saturated": new_dual.saturated,
        "skipped": skipped,
        "apart": apart,
        "logp_finite": jnp.all(jnp.isfinite(old_logp) | ~batch.mask),
        "gaps": gaps.measure(
            _flat(old_logp),
            _flat(batch.rollout_logp),
            _flat(batch.completions),
            _flat(batch.mask),
            batch.reward.reshape(-1),
        ),
    }
    if state.stale:
        logp, _ = score(state.params, batch, config, model)
        metrics |= diagnostics.staleness(
            _flat(logp), _flat(old_logp), _flat(batch.rollout_logp), _flat(batch.mask)
        )
    stale = (*state.stale, state.params)[1:]
    return TrainState(params, opt_state, new_dual, state.step + apart, skipped, stale), metrics


def _moved(opt_state: Any, memory: Any, algorithm: AlgorithmConfig) -> Any:
    """The optimizer's trees in that memory, where they are offloaded; its count stays on the
    device.
    """
    count, *trees = opt_state
    return (
        type(opt_state)(count, *jax.device_put(trees, memory)) if algorithm.offload else opt_state
    )


def score(
    params: Any, batch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """The trainer's log-probs and entropies at the weights that sampled, [M, A, n, T]."""

    def one(micro):
        return _score(params, micro, config, model, entropy=True)

    return jax.lax.map(lambda minibatch: jax.lax.map(one, minibatch), batch)


def _advantage(batch: Batch, config: Config) -> jax.Array:
    """[M, A, n, 1]"""
    advantage = config.algorithm.advantage(
        batch.reward.reshape(-1), batch.group.reshape(-1), num_groups=config.data.prompts_per_step
    )
    return advantage.reshape(*batch.reward.shape, 1)


def _shaped(
    old_logp: jax.Array, batch: Batch, advantage: jax.Array, multiplier: jax.Array, config: Config
) -> jax.Array:
    """Every token's advantage, [M, A, n, T]."""
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


def _slope(
    old_logp: jax.Array, batch: Batch, advantage: jax.Array, multiplier: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """The loss where the log-probs are the old ones, and its gradient by them: [1, A, n, T] ->
    scalar, [1, A, n, T].
    """
    shaped = _shaped(old_logp, batch, advantage, multiplier, config)

    def loss_of(logp):
        loss, denominator = config.algorithm.surrogate(
            _flat(logp), *map(_flat, (old_logp, batch.rollout_logp, shaped, batch.mask))
        )
        loss = config.algorithm.reduce(loss, denominator)
        if config.constraint.penalty:  # of rejected tokens too, the worst, as the dual measures it
            mask = _flat(batch.mask)
            rollout_logp = _flat(batch.rollout_logp)
            penalty = config.constraint.penalty(_flat(logp), rollout_logp, mask, multiplier)
            loss += config.algorithm.reduce(penalty, mask)
        return loss

    return jax.value_and_grad(loss_of)(old_logp)


def _single(
    params: Any,
    batch: Batch,
    known: jax.Array | None,
    slope: Slope,
    config: Config,
    model: ModelConfig,
) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array]:
    """Loss, its gradient, the old log-probs and entropies, by a forward and a backward pass over
    each microbatch.

    `known` are the old log-probs [1, A, n, T], where the loss weighs microbatches against each
    other. Elsewhere it is None: each is judged beside the sampler's log-probs of the others. The
    last result is whether that was right: False where more than a thousandth of the slopes turns
    out to have hung on those.
    """
    judged_apart = jnp.bool_(True)
    if known is not None:
        loss, slopes = slope(known)

    def one(i, micro):
        logp, pull, entropy = jax.vjp(
            lambda params: _score(params, micro, config, model, entropy=True), params, has_aux=True
        )
        pulled = (
            slopes[0, i]
            if known is not None
            else slope(batch.rollout_logp.at[0, i].set(logp))[1][0, i]
        )
        return pull(pulled)[0], (logp, pulled, entropy)

    def accumulate(total, given):
        # The barrier keeps sums over devices in the loop: behind it they would need whole
        # gradients.
        grads, made = jax.lax.optimization_barrier(one(*given))
        return jax.tree.map(jnp.add, total, grads), made

    micros = jax.tree.map(lambda x: x[0], batch)
    if len(micros.mask) == 1:  # nothing to add up, and no room for a sum
        grads, made = one(0, jax.tree.map(lambda x: x[0], micros))
        logp, apart, entropy = (x[None, None] for x in made)
    else:
        zero = jax.tree.map(jnp.zeros_like, params)
        grads, made = jax.lax.scan(accumulate, zero, (jnp.arange(len(micros.mask)), micros))
        logp, apart, entropy = (x[None] for x in made)
    if known is None:
        loss, whole = slope(logp)
        difference = jnp.sum(jnp.abs(whole - apart))
        size = jnp.sum(jnp.abs(whole))
        known = logp
        shown = jnp.isfinite(size)
        judged_apart = (difference <= 1e-3 * size) | ~shown
        loss = jnp.where(shown, loss, jnp.nan)  # slopes that are not finite make no update
    return loss, grads, known, entropy, judged_apart


def _score(
    params: Any, micro: Batch, config: Config, model: ModelConfig, *, entropy: bool = False
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


def _gradients(
    params: Any, minibatch: tuple, multiplier: jax.Array, config: Config, model: ModelConfig
) -> tuple[jax.Array, Any]:
    """Loss and its gradient, accumulated over the A microbatches of one minibatch.

    The reducer is linear, so its gradient gives every token's weight in the minibatch as a whole;
    microbatches then add up to what the minibatch in one piece would give, but for a loss that
    weighs tokens against others: it sees its microbatch.
    """
    batch, old_logp, shaped = minibatch
    surrogate = config.algorithm.surrogate
    penalty = config.constraint.penalty
    _, denominator = surrogate(
        _flat(old_logp),
        _flat(old_logp),
        _flat(batch.rollout_logp),
        _flat(shaped),
        _flat(batch.mask),
    )

    def weight_of(mask):
        zero = jnp.zeros_like(_flat(shaped))
        return jax.grad(lambda x: config.algorithm.reduce(x, mask))(zero).reshape(shaped.shape)

    weight = weight_of(denominator)
    of_all = weight_of(_flat(batch.mask))

    def loss_fn(params, micro, old_logp, shaped, weight, of_all):
        logp, _ = _score(params, micro, config, model)
        loss, _ = surrogate(logp, old_logp, micro.rollout_logp, shaped, micro.mask)
        loss = jnp.sum(loss * weight)
        if penalty:  # as in `_slope`
            loss += jnp.sum(penalty(logp, micro.rollout_logp, micro.mask, multiplier) * of_all)
        return loss

    def accumulate(total, micro):
        # The barrier as in `_single`.
        return jax.tree.map(
            jnp.add,
            total,
            jax.lax.optimization_barrier(jax.value_and_grad(loss_fn)(params, *micro)),
        ), None

    micros = batch, old_logp, shaped, weight, of_all
    if len(shaped) == 1:
        return jax.value_and_grad(loss_fn)(params, *jax.tree.map(lambda x: x[0], micros))
    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(accumulate, zero, micros)[0]


def _metrics(
    batch: Batch, advantage: jax.Array, old_logp: jax.Array, shaped: jax.Array, entropy: jax.Array
) -> Metrics:
    mask = _flat(batch.mask)
    advantage = _flat(advantage)
    return (
        {
            "reward": jnp.mean(batch.reward),
            "entropy": reduce.token_mean(_flat(entropy), mask),
            "response_length": jnp.mean(jnp.sum(mask, axis=-1).astype(jnp.float32)),
        }
        | diagnostics.summary(_flat(old_logp), _flat(batch.rollout_logp), advantage, mask)
        | diagnostics.sign_flip(advantage, _flat(shaped), mask)
    )


def _flat(x: jax.Array) -> jax.Array:
    """[..., n, T] -> [N, T]."""
    return x.reshape(-1, x.shape[-1])
