"""The trainer's parameters in the number formats of an engine.

`in_formats` makes what an engine stores. `straight_through` makes the same numbers for the
trainer's own forward pass, differentiable.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder, derived
from dcmdp_jax.models.derived import LowRank, Rounded
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import SCALED, Quantized, formats, quantize

# the formats of each field of `Precision`; those of the cache are `cache.DTYPES`
FORMATS = {
    "weights": formats("weights"),
    "activations": ("", *formats("activations")),
    "embed": ("", *formats("weights")),
    "head": ("", *formats("weights")),
    "router": ("", *formats("norms")),
    "norms": ("", *formats("norms")),
}


def check(precision: Precision) -> None:
    """Raises ValueError for a format that is not in `FORMATS`, and for a group that is none."""
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


def in_formats(params: Any, config: ModelConfig, precision: Precision) -> Any:
    """Returns stacked parameters with every leaf in its format: an array or `Quantized`.

    Where embeddings are tied and the head's format differs from the embedding's, there is a
    `"head"` [V, D] of its own.
    """

    def leaf(path, w, contracted):
        if contracted:
            return _projection(w, contracted, precision)
        form, axes = _other_format(path, precision)
        return _in_format(w, form, axes)

    out = _map_weights(leaf, params, config)
    if _has_own_head(config, precision):
        out["head"] = _in_format(params["embed"], precision.head, (-1,))
    return out


def straight_through(params: Any, config: ModelConfig, precision: Precision) -> Any:
    """Returns stacked parameters with the numbers that `in_formats` stores, for the trainer's
    forward pass; their gradients are those of `params` (see `derived.straight_through`).

    Projections are rounded where their layer is run (`derived.Rounded`).
    """

    def leaf(path, w, contracted):
        if contracted:
            return Rounded(w, precision.weights, contracted, precision.group)
        return _rounded(w, *_other_format(path, precision))

    out = _map_weights(leaf, params, config)
    if _has_own_head(config, precision):
        out["head"] = _rounded(params["embed"], precision.head, (-1,))
    return out


def shardings(
    logical_axes: Any, shapes: Any, mesh: jax.sharding.Mesh, table: sharding.Table
) -> Any:
    """Returns `sharding.param_shardings` of a tree that may hold `Quantized` weights."""

    def leaf(names, shape):
        if not isinstance(shape, Quantized):
            return sharding.param_shardings(names, mesh, table, shape)
        # An axis with fewer scales than values is not split: its groups need not divide over the
        # devices.
        scale_names = tuple(
            name if scales == values else None
            for name, scales, values in zip(names, shape.scale.shape, shape.shape)
        )
        return Quantized(
            sharding.param_shardings(names, mesh, table, shape.values),
            sharding.param_shardings(scale_names, mesh, table, shape.scale),
            shape.input_format,
        )

    return jax.tree.map(leaf, logical_axes, shapes, is_leaf=sharding.is_axis_names)


def _map_weights(leaf, params: Any, config: ModelConfig) -> Any:
    return jax.tree_util.tree_map_with_path(
        leaf, params, decoder.contracting_axes(config), is_leaf=derived.is_weight
    )


def _other_format(path: tuple, precision: Precision) -> tuple[str, tuple[int, ...]]:
    """Returns the format of a parameter that is no projection, and the axes that share a scale."""
    name = path[-1].key
    if name == "embed":
        return precision.embed, (-1,)
    if name == "head":
        return precision.head, (-2,)
    if name == "router":
        return precision.router, ()
    is_norm = "norm" in jax.tree_util.keystr(path)
    return (precision.norms if is_norm else ""), ()


def _has_own_head(config: ModelConfig, precision: Precision) -> bool:
    head = precision.head or "float32"
    return config.tie_word_embeddings and head != (precision.embed or "float32")


def _projection(
    w: jax.Array | LowRank, contracted: tuple[int, ...], precision: Precision
) -> jax.Array | Quantized:
    if isinstance(w, LowRank):  # the sum of one layer at a time
        return jax.lax.map(lambda one: _projection(one.array(), contracted, precision), w)
    if precision.weights in SCALED:
        return quantize(w, precision.weights, contracted, precision.group, precision.activations)
    w = _in_format(w, precision.weights, contracted)
    if not precision.activations:
        return w
    # exact weights whose products quantize what they take in: all scales are 1
    outer = w.shape[: w.ndim + contracted[0]]
    scale = jnp.ones((*outer, *(1,) * (w.ndim - len(outer))), jnp.float32)
    return Quantized(w, scale, precision.activations)


def _rounded(w: jax.Array, form: str, axes: tuple[int, ...]) -> jax.Array:
    """Returns `derived.straight_through` of a parameter, in float32 if its dtype might not hold the
    rounded numbers: a frozen one may be bfloat16.
    """
    return derived.straight_through(w.astype(jnp.float32) if form in SCALED else w, form, axes)


def _in_format(w: jax.Array, name: str, contracted: tuple[int, ...]) -> jax.Array | Quantized:
    if name in ("", "float32"):
        return w
    return quantize(w, name, contracted) if name in SCALED else w.astype(name)
