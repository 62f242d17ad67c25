"""Train parameters to decode parameters: one layer a tree, in the engine's precision, on the decode mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.config import WEIGHT_DTYPES, ModelConfig
from dcmdp_jax.models import qwen3
from dcmdp_jax.models.quantized import Quantized, quantize


def make(config: ModelConfig, weights: str, mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    """A compiled function from train parameters to the engine's.

    `weights` is the dtype of the projections: int8, int4 and float8_e4m3fn carry one float32 scale per output channel;
    embeddings, norms, router, biases and head keep the trainer's values. bfloat16 casts every parameter. float32 changes
    nothing but the layout; another name raises ValueError. The result shares no buffer with its argument, which the next training step donates.
    """
    if weights not in WEIGHT_DTYPES:
        raise ValueError(f"the engine's weights cannot be {weights!r}; choose one of {', '.join(WEIGHT_DTYPES)}")

    def sync(params):
        params = jax.tree.map(jnp.copy, params)
        if weights == "bfloat16":
            params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        elif weights != "float32":
            params = jax.tree.map(lambda w, axes: quantize(w, weights, axes) if axes else w, params,
                                  qwen3.contracting_axes(config))
        return qwen3.unstack(params, config)

    shapes = jax.eval_shape(sync, jax.eval_shape(partial(qwen3.init, config=config), jax.random.key(0)))
    return jax.jit(sync, out_shardings=_shardings(shapes, config, mesh))


def _shardings(shapes: Any, config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    layers = [stack for stack, (_, n) in zip(qwen3.logical_axes(config)["stacks"], qwen3.stacks(config)) for _ in range(n)]
    axes = jax.tree.map(lambda names: names[1:], layers, is_leaf=lambda x: isinstance(x, tuple))
    logical = qwen3.logical_axes(config) | {"stacks": axes}

    def leaf(names, shape):
        if not isinstance(shape, Quantized):
            return sharding.params(names, mesh, sharding.DECODE, shape)
        whole = tuple(name if size > 1 else None for name, size in zip(names, shape.scale.shape))
        return Quantized(sharding.params(names, mesh, sharding.DECODE, shape.values),
                         sharding.params(whole, mesh, sharding.DECODE, shape.scale))

    return jax.tree.map(leaf, logical, shapes, is_leaf=lambda x: isinstance(x, tuple))
