"""Train parameters to decode parameters: one layer a tree, in the engine's precision, on the decode
mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig, Precision
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import cache, decoder
from dcmdp_jax.models.quantized import SCALED, Quantized, formats, quantize
from dcmdp_jax.records import Weights

ALLOWED = {
    "weights": formats("weights"),
    "activations": ("", *formats("activations")),
    "embed": ("", *formats("weights")),
    "head": ("", *formats("weights")),
    "router": ("", *formats("norms")),
    "norms": ("", *formats("norms")),
}


def converter(
    config: ModelConfig, precision: Precision, mesh: jax.sharding.Mesh
) -> Callable[[Any, Any], Weights]:
    """A compiled function from train parameters and their version to the engine's weights.

    float32 and "" leave a parameter as the trainer has it, bfloat16 casts it, the rest quantizes
    it: projections as `precision` says, embedding and head with one scale per token of the
    vocabulary. Biases stay as they are. Where embeddings are tied and the head's precision is
    another, the engine's parameters have a `"head"` [V, D] of their own. `finite` of the weights
    tells whether all are numbers, so that an engine can refuse them. Parameters on other devices
    than the mesh's are converted there and sent over. Where they are spread over several processes,
    each gets a whole copy on its own devices, and all must call. The result shares no buffer with
    its arguments, which the next training step donates. Raises ValueError for a precision not in
    `ALLOWED`, and for groups that do not divide the inputs of a projection.
    """
    _check_names(precision)

    places = _places(config, precision, mesh)
    here = jax.jit(partial(_convert, config=config, precision=precision), out_shardings=places)
    elsewhere = jax.jit(partial(_convert, config=config, precision=precision))

    @functools.cache
    def on_every_process(training):
        block = sharding.process_block(training, jax.process_index())
        own = mesh if set(block.devices.flat) == set(mesh.devices.flat) else block
        return converter_per_process(config, precision, training, own), own

    def sync(params: Any, version: Any) -> Weights:
        leaf = jax.tree.leaves(params)[0]
        version = jnp.asarray(version, jnp.int32)
        if (
            not isinstance(leaf, jax.Array)
            or not leaf.committed
            or leaf.sharding.device_set == set(mesh.devices.flat)
        ):
            return here(params, version)
        if leaf.is_fully_addressable:
            return jax.device_put(elsewhere(params, version), places)
        f, own = on_every_process(leaf.sharding.mesh)
        copies = jax.tree.map(lambda x: processes.local_copy(x, own), f(params, version))
        return copies if own == mesh else jax.device_put(copies, places)

    return sync


def converter_per_process(
    config: ModelConfig, precision: Precision, training: jax.sharding.Mesh, own: jax.sharding.Mesh
) -> Callable:
    """Compiled: parameters and version on the training mesh to a whole copy for every process, laid
    out like `own`, its mesh.
    """
    whole = processes.per_process_mesh(training, own)
    places = _places(config, precision, own)
    return jax.jit(
        partial(_convert, config=config, precision=precision),
        out_shardings=jax.tree.map(lambda place: NamedSharding(whole, place.spec), places),
    )


def abstract(config: ModelConfig, precision: Precision, mesh: jax.sharding.Mesh) -> Weights:
    """Shapes and places of an engine's weights."""
    return sharding.abstract_arrays(_shapes(config, precision), _places(config, precision, mesh))


def _convert(params: Any, version: Any, *, config: ModelConfig, precision: Precision) -> Weights:
    params, version = jax.tree.map(jnp.copy, (params, version))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(params)]))
    return Weights(decoder.unstack(_cast(params, config, precision), config), version, finite)


def _shapes(config: ModelConfig, precision: Precision) -> Weights:
    params = jax.eval_shape(partial(decoder.init, config=config), jax.random.key(0))
    return jax.eval_shape(
        partial(_convert, config=config, precision=precision),
        params,
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def _places(config: ModelConfig, precision: Precision, mesh: jax.sharding.Mesh) -> Weights:
    whole = sharding.replicated(mesh)
    return Weights(_shardings(_shapes(config, precision).params, config, mesh), whole, whole)


def _check_names(precision: Precision) -> None:
    for field, allowed in ALLOWED.items():
        if getattr(precision, field) not in allowed:
            raise ValueError(
                f"rollout.precision.{field}={getattr(precision, field)!r} is not one of "
                f"{', '.join(name or repr(name) for name in allowed)}"
            )
    if precision.group < -1:
        raise ValueError(
            f"rollout.precision.group={precision.group} must be -1 (one scale a weight), 0 (an "
            "output channel) or positive"
        )


def check(config: ModelConfig, precision: Precision, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError where an engine on `mesh` cannot hold or multiply so; compiles nothing."""
    converter(config, precision, mesh)
    jax.eval_shape(partial(cache.init, config, 1, 1, precision.cache))
    if precision.experts_per_token and not 0 < precision.experts_per_token <= config.num_experts:
        raise ValueError(
            f"rollout.precision.experts_per_token={precision.experts_per_token} must lie in "
            f"1..{config.num_experts}, the model's experts, or be 0 for the trainer's"
        )


def _cast(params: Any, config: ModelConfig, precision: Precision) -> Any:
    """Stacked parameters with every leaf in its precision."""

    def leaf(path, w, contracted):
        name = path[-1].key
        if contracted:
            return _projection(w, contracted, precision)
        if name == "embed":
            return _hold(w, precision.embed, (-1,))
        if name == "head":
            return _hold(w, precision.head, (-2,))
        if name == "router":
            return _hold(w, precision.router, ())
        return _hold(w, precision.norms, ()) if "norm" in jax.tree_util.keystr(path) else w

    new = jax.tree_util.tree_map_with_path(leaf, params, decoder.contracting_axes(config))
    if config.tie_word_embeddings and (precision.head or "float32") != (
        precision.embed or "float32"
    ):
        new["head"] = _hold(params["embed"], precision.head, (-1,))
    return new


def _projection(
    w: jax.Array, contracted: tuple[int, ...], precision: Precision
) -> jax.Array | Quantized:
    if precision.weights in SCALED:
        return quantize(w, precision.weights, contracted, precision.group, precision.activations)
    w = _hold(w, precision.weights, contracted)
    if not precision.activations:
        return w
    first = w.ndim + contracted[0]
    return Quantized(
        w,
        jnp.ones((*w.shape[:first], *(1,) * (w.ndim - first)), jnp.float32),
        precision.activations,
    )


def _hold(w: jax.Array, dtype: str, contracted: tuple[int, ...]) -> jax.Array | Quantized:
    if dtype in ("", "float32"):
        return w
    return quantize(w, dtype, contracted) if dtype in SCALED else w.astype(dtype)


def _shardings(shapes: Any, config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    logical = decoder.logical_axes(config)
    layers = [
        stack for stack, (_, n) in zip(logical["stacks"], decoder.stacks(config)) for _ in range(n)
    ]
    logical["stacks"] = jax.tree.map(
        lambda names: names[1:], layers, is_leaf=lambda x: isinstance(x, tuple)
    )
    if "head" in shapes and "head" not in logical:
        logical["head"] = logical["embed"]

    def leaf(names, shape):
        if not isinstance(shape, Quantized):
            return sharding.param_shardings(names, mesh, sharding.DECODE, shape)
        # An axis with fewer scales than values is not split: its groups need not divide over the
        # devices.
        whole = tuple(
            name if few == size else None
            for name, few, size in zip(names, shape.scale.shape, shape.shape)
        )
        return Quantized(
            sharding.param_shardings(names, mesh, sharding.DECODE, shape.values),
            sharding.param_shardings(whole, mesh, sharding.DECODE, shape.scale),
            shape.activations,
        )

    return jax.tree.map(leaf, logical, shapes, is_leaf=lambda x: isinstance(x, tuple))
