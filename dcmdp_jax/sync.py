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
from dcmdp_jax.models import cache, decoder, inference
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import SCALED, Quantized, formats, quantize
from dcmdp_jax.records import Weights

# the formats of each field of `Precision`; those of the cache are `cache.DTYPES`
FORMATS = {
    "weights": formats("weights"),
    "activations": ("", *formats("activations")),
    "embed": ("", *formats("weights")),
    "head": ("", *formats("weights")),
    "router": ("", *formats("norms")),
    "norms": ("", *formats("norms")),
}


def check(config: ModelConfig, precision: Precision, mesh: Mesh) -> None:
    """Raises ValueError if an engine on `mesh` cannot hold or multiply weights of `precision`.

    Compiles nothing.
    """
    _check_formats(precision)
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

    Raises ValueError for a format that is not in `FORMATS`, and for groups that do not divide the
    inputs of a projection.
    """
    _check_formats(precision)
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


def abstract_weights(config: ModelConfig, precision: Precision, mesh: Mesh) -> Weights:
    """Returns shapes and shardings of an engine's weights."""
    shardings = _weights_shardings(config, precision, mesh)
    return sharding.abstract_arrays(_weights_shapes(config, precision), shardings)


def _check_formats(precision: Precision) -> None:
    for field, allowed in FORMATS.items():
        if getattr(precision, field) not in allowed:
            raise ValueError(
                f"rollout.precision.{field}={getattr(precision, field)!r} is not one of "
                f"{', '.join(name or repr(name) for name in allowed)}"
            )
    if precision.group < -1:
        raise ValueError(
            f"rollout.precision.group={precision.group} must be -1 (one scale per weight), 0 (one "
            "per output channel) or positive"
        )


def _convert(params: Any, version: Any, *, config: ModelConfig, precision: Precision) -> Weights:
    params, version = jax.tree.map(jnp.copy, (params, version))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(params)]))
    return Weights(
        inference.unstack(_in_formats(params, config, precision), config), version, finite
    )


def _weights_shapes(config: ModelConfig, precision: Precision) -> Weights:
    params = jax.eval_shape(partial(decoder.init, config=config), jax.random.key(0))
    return jax.eval_shape(
        partial(_convert, config=config, precision=precision),
        params,
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def _weights_shardings(config: ModelConfig, precision: Precision, mesh: Mesh) -> Weights:
    params = _weights_shapes(config, precision).params
    replicated = sharding.replicated(mesh)
    return Weights(_params_shardings(params, config, mesh), replicated, replicated)


def _in_formats(params: Any, config: ModelConfig, precision: Precision) -> Any:
    """Stacked parameters with every leaf in its format."""

    def leaf(path, w, contracted):
        name = path[-1].key
        if contracted:
            return _projection(w, contracted, precision)
        if name == "embed":
            return _in_format(w, precision.embed, (-1,))
        if name == "head":
            return _in_format(w, precision.head, (-2,))
        if name == "router":
            return _in_format(w, precision.router, ())
        is_norm = "norm" in jax.tree_util.keystr(path)
        return _in_format(w, precision.norms, ()) if is_norm else w

    out = jax.tree_util.tree_map_with_path(leaf, params, decoder.contracting_axes(config))
    head = precision.head or "float32"
    if config.tie_word_embeddings and head != (precision.embed or "float32"):
        out["head"] = _in_format(params["embed"], precision.head, (-1,))
    return out


def _projection(
    w: jax.Array, contracted: tuple[int, ...], precision: Precision
) -> jax.Array | Quantized:
    if precision.weights in SCALED:
        return quantize(w, precision.weights, contracted, precision.group, precision.activations)
    w = _in_format(w, precision.weights, contracted)
    if not precision.activations:
        return w
    # exact weights whose products quantize what they take in: all scales are 1
    outer = w.shape[: w.ndim + contracted[0]]
    scale = jnp.ones((*outer, *(1,) * (w.ndim - len(outer))), jnp.float32)
    return Quantized(w, scale, precision.activations)


def _in_format(w: jax.Array, name: str, contracted: tuple[int, ...]) -> jax.Array | Quantized:
    if name in ("", "float32"):
        return w
    return quantize(w, name, contracted) if name in SCALED else w.astype(name)


def _params_shardings(shapes: Any, config: ModelConfig, mesh: Mesh) -> Any:
    logical = decoder.logical_axes(config)
    logical["stacks"] = [
        decoder.layer_axes(config, config.is_sparse(i)) for i in range(config.num_layers)
    ]
    if "head" in shapes and "head" not in logical:
        logical["head"] = logical["embed"]

    def leaf(names, shape):
        if not isinstance(shape, Quantized):
            return sharding.param_shardings(names, mesh, sharding.DECODE, shape)
        # An axis with fewer scales than values is not split: its groups need not divide over the
        # devices.
        scale_names = tuple(
            name if scales == values else None
            for name, scales, values in zip(names, shape.scale.shape, shape.shape)
        )
        return Quantized(
            sharding.param_shardings(names, mesh, sharding.DECODE, shape.values),
            sharding.param_shardings(scale_names, mesh, sharding.DECODE, shape.scale),
            shape.input_format,
        )

    return jax.tree.map(leaf, logical, shapes, is_leaf=lambda x: isinstance(x, tuple))
