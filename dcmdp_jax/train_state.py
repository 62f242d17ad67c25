"""The state that is trained: its start, its layout over devices, and the policy it stands for."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import constraint, entropy_bonus, optimizers, seeds, sharding
from dcmdp_jax.config import Config
from dcmdp_jax.models import decoder, derived, engine_formats, lora
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, Before, TrainState
from dcmdp_jax.seeds import Stream


def init(config: Config, params: Any, reference: Any = None, adapters: Any = None) -> TrainState:
    """Returns the state at step 0 of a run that starts from the decoder's `params`.

    Args:
        reference: the reference policy's parameters; None: those that are trained, at their start.
        adapters: those of `model.lora` to start from; None: new ones.
    """
    algorithm = config.algorithm
    trained, frozen = divide(config, params, adapters)
    kept = trained if reference is None else reference
    opt_state = optimizers.from_config(algorithm).init(trained)
    before = ()
    if algorithm.accept:
        before = Before(_copy(trained), _copy(opt_state), jnp.bool_(False))
    return TrainState(
        params=trained,
        opt_state=opt_state,
        dual=controller(config).init(),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        stale=tuple(_copy(trained) for _ in range(config.rollout.staleness)),
        frozen=frozen,
        reference=_copy(kept) if algorithm.reference_penalty else (),
        entropy_dual=entropy_bonus.controller(algorithm).init() if algorithm.entropy_target else (),
        before=before,
    )


def divide(config: Config, params: Any, adapters: Any = None) -> tuple[Any, Any]:
    """Returns what is trained and what is frozen at the start; arguments as for `init`."""
    source = config.model
    key = jax.random.key(seeds.seed(config.seed, Stream.TRAINABLE))
    if source.lora.rank:
        trained = lora.init(params, key, source.lora) if adapters is None else adapters
        return trained, lora.freeze(params, source.lora)
    if source.trainable:
        return source.trainable(params, key), params
    return params, ()


def controller(config: Config) -> constraint.Controller:
    """Returns the controller that updates the multiplier."""
    c = config.constraint
    return c.dual(
        dual_lr=c.dual_lr, multiplier_init=c.multiplier_init, multiplier_max=c.multiplier_max
    )


def policy_params(state: TrainState, config: Config) -> Any:
    """Returns the decoder's parameters: what is scored, synced to the sampler and exported."""
    return decoder_params(state.params, state.frozen, config)


def decoder_params(trained: Any, frozen: Any, config: Config) -> Any:
    """Returns the decoder's parameters that trained and frozen ones stand for."""
    if config.model.lora.rank:
        return lora.with_adapters(trained, frozen, config.model.lora)
    if config.model.policy_params is None:
        return trained
    return jax.jit(config.model.policy_params)(trained, frozen)


def sampled_from(state: TrainState, config: Config) -> tuple[Any, jax.Array]:
    """Returns the decoder's parameters that the next batch is sampled from, `rollout.staleness`
    steps old, and their version.
    """
    oldest = (*state.stale, state.params)[0]
    return decoder_params(oldest, state.frozen, config), sampled_version(state)


def sampled_version(state: TrainState) -> jax.Array:
    """Returns the version of the parameters that the next batch is sampled from."""
    return jnp.maximum(state.step - len(state.stale), 0)


def for_sampler(params: Any, config: Config) -> Any:
    """Returns the decoder's parameters as the run's sampler takes them.

    The library's own engine converts projections of `models.derived` a layer at a time; any other
    sampler gets arrays.
    """
    return params if config.rollout.own_engine else derived.arrays(params)


def params_shardings(model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the layout of the decoder's parameters on the mesh that trains."""
    axes = decoder.logical_axes(model)
    return sharding.param_shardings(axes, mesh, sharding.TRAIN, _params_shapes(model))


def abstract_params(model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns shapes and shardings of the decoder's parameters on the mesh that trains."""
    return sharding.abstract_arrays(_params_shapes(model), params_shardings(model, mesh))


def abstract_policy_params(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns shapes and shardings of `policy_params` on the mesh that trains."""
    if config.model.lora.rank:
        return policy_params(abstract(config, model, mesh), config)
    return abstract_params(model, mesh)


def shardings(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the layout of a `TrainState`.

    What is shaped like a parameter of the decoder lies as that parameter does, and adapters of
    `model.lora` as the axes that they share with it; the rest is replicated.
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
    frozen = like_decoder(shapes.frozen)
    if config.model.lora.rank:
        axes = lora.logical_axes(config.model.lora, model)
        params = sharding.param_shardings(axes, mesh, sharding.TRAIN, shapes.params)
        frozen = engine_formats.shardings(
            decoder.logical_axes(model), shapes.frozen, mesh, sharding.TRAIN
        )
    moments = sharding.on_host(params) if config.algorithm.offload else params
    opt_state = optimizers.map_param_like(shapes.opt_state, shapes.params, moments, replicated)
    before = Before(params, opt_state, replicated) if config.algorithm.accept else ()
    return jax.tree.map(lambda _: replicated, shapes)._replace(
        params=params,
        opt_state=opt_state,
        stale=(params,) * config.rollout.staleness,
        frozen=frozen,
        reference=params if config.algorithm.reference_penalty else (),
        before=before,
    )


def abstract(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns shapes and shardings of a run's state, for reading checkpoints and for plans."""
    return sharding.abstract_arrays(_state_shapes(config, model), shardings(config, model, mesh))


def batch_shardings(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the layout of a `Batch`: packed rows over the batch axes and their positions over
    `sequence`; arrays of completions replicated.
    """
    rows = sharding.batch_shardings(mesh)
    replicated = sharding.replicated(mesh)
    top = replicated if config.rollout.top_logprobs else None
    return Batch(
        tokens=rows,
        positions=rows,
        segment_ids=rows,
        index=replicated,
        completions=replicated,
        mask=replicated,
        rollout_logp=replicated,
        reward=replicated,
        length=replicated,
        truncated=replicated,
        group=replicated,
        prefix_ids=rows if config.shares_prompts else None,
        replayed=rows if config.algorithm.replay_routing else None,
        top_tokens=top,
        top_rollout_logp=top,
        version=replicated if config.rollout.in_flight else None,
    )


def _params_shapes(model: ModelConfig) -> Any:
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), model))


def _state_shapes(config: Config, model: ModelConfig) -> TrainState:
    return jax.eval_shape(partial(init, config), _params_shapes(model))


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
