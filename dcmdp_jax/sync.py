"""Weight sync: from the trainer's parameters to an engine's weights.

The engine holds one tree per layer, in its own precision, laid out over the sampling mesh. Where
the parameters are decides between three compiled conversions:

    the parameters are on            are converted                        and then copied
    the engine's devices             into the engine's layout             no more
    other devices of this process    where they are                       to the engine's devices
    devices of several processes     into one full copy per process       to the engine's devices,
                                                                          if those are others
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dcmdp_jax import sharding
from dcmdp_jax.config import Precision
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import cache, decoder, engine_formats, inference
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Weights


def check(config: ModelConfig, precision: Precision, mesh: Mesh) -> None:
    """Raises ValueError if an engine on `mesh` cannot hold or multiply weights of `precision`.

    Compiles nothing.
    """
    engine_formats.check(precision)
    _weights_shardings(config, precision, mesh)
    jax.eval_shape(partial(cache.init, config, 1, 1, precision.cache))
    if precision.experts_per_token and not 0 < precision.experts_per_token <= config.num_experts:
        raise ValueError(
            f"rollout.precision.experts_per_token={precision.experts_per_token} must lie in "
            f"1..{config.num_experts}, the model's experts, or be 0 for the trainer's"
        )


def converter(
    config: ModelConfig, precision: Precision, mesh: Mesh
) -> Callable[[Any, Any], Weights]:
    """Returns a function from the trainer's parameters and their version to an engine's weights.

    float32 and "" keep a parameter as the trainer has it, bfloat16 casts it, and the other formats
    quantize it: projections as `precision` says, embedding and head with one scale per token of the
    vocabulary. Biases stay as they are. Where embeddings are tied and the head's format differs
    from the embedding's, the engine gets a `"head"` [V, D] of its own. The result shares no buffer
    with the arguments, which the next training step may donate. Where the parameters are on devices
    of several processes, all processes must call.

    Raises ValueError for a format that is not in `engine_formats.FORMATS`, and for groups that do
    not divide the inputs of a projection.
    """
    engine_formats.check(precision)
    shardings = _weights_shardings(config, precision, mesh)
    convert = partial(_convert, config=config, precision=precision)
    into_layout = jax.jit(convert, out_shardings=shardings)
    in_place = jax.jit(convert)

    @functools.cache
    def per_process(training: Mesh) -> tuple[Callable, Mesh]:
        block = sharding.process_block(training, jax.process_index())
        is_engines = set(block.devices.flat) == set(mesh.devices.flat)
        local = mesh if is_engines else block
        return converter_per_process(config, precision, training, local), local

    def to_engine(params: Any, version: Any) -> Weights:
        leaf = jax.tree.leaves(params)[0]
        version = jnp.asarray(version, jnp.int32)
        uncommitted = not isinstance(leaf, jax.Array) or not leaf.committed
        if uncommitted or leaf.sharding.device_set == set(mesh.devices.flat):
            return into_layout(params, version)
        if leaf.is_fully_addressable:
            return jax.device_put(in_place(params, version), shardings)
        convert_for_all, local = per_process(leaf.sharding.mesh)
        copies = convert_for_all(params, version)
        own_copy = jax.tree.map(lambda x: processes.local_copy(x, local), copies)
        return own_copy if local == mesh else jax.device_put(own_copy, shardings)

    return to_engine


def converter_per_process(
    config: ModelConfig, precision: Precision, training: Mesh, local: Mesh
) -> Callable[[Any, Any], Weights]:
    """Returns a compiled function from parameters and version on the `training` mesh to one full
    copy for every process, laid out over its devices as over `local`, those of this process.
    """
    all_copies = processes.per_process_mesh(training, local)
    return jax.jit(
        partial(_convert, config=config, precision=precision),
        out_shardings=jax.tree.map(
            lambda one: NamedSharding(all_copies, one.spec),
            _weights_shardings(config, precision, local),
        ),
    )


def abstract_weights(params: Any, config: ModelConfig, precision: Precision, mesh: Mesh) -> Weights:
    """Returns shapes and shardings of an engine's weights, made of parameters of these shapes."""
    shardings = _weights_shardings(config, precision, mesh)
    return sharding.abstract_arrays(_weights_shapes(params, config, precision), shardings)


def _convert(params: Any, version: Any, *, config: ModelConfig, precision: Precision) -> Weights:
    params, version = jax.tree.map(jnp.copy, (params, version))
    finite = jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(w.astype(jnp.float32))) for w in jax.tree.leaves(params)])
    )
    return Weights(
        inference.unstack(engine_formats.in_formats(params, config, precision), config),
        version,
        finite,
    )


def _weights_shapes(params: Any, config: ModelConfig, precision: Precision) -> Weights:
    stacked = jax.eval_shape(
        partial(engine_formats.in_formats, config=config, precision=precision), params
    )
    layers = []
    for stack, (_, n) in zip(stacked["stacks"], decoder.stacks(config), strict=True):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
        layers += [one] * n
    return Weights(
        stacked | {"stacks": layers},
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.bool_),
    )


def _weights_shardings(config: ModelConfig, precision: Precision, mesh: Mesh) -> Weights:
    trained = jax.eval_shape(partial(decoder.init, config=config), jax.random.key(0))
    params = _weights_shapes(trained, config, precision).params
    replicated = sharding.replicated(mesh)
    return Weights(_params_shardings(params, config, mesh), replicated, replicated)


def _params_shardings(shapes: Any, config: ModelConfig, mesh: Mesh) -> Any:
    logical = decoder.logical_axes(config)
    del logical["stacks"]
    if "head" in shapes and "head" not in logical:
        logical["head"] = logical["embed"]

    def lay_out(names, shapes):
        return engine_formats.shardings(names, shapes, mesh, sharding.DECODE)

    layers = []
    for is_sparse, n in decoder.stacks(config):  # a stack's layers lie alike
        axes = decoder.layer_axes(config, is_sparse)
        layers += [lay_out(axes, shapes["stacks"][len(layers)])] * n
    others = {name: shape for name, shape in shapes.items() if name != "stacks"}
    return lay_out(logical, others) | {"stacks": layers}
