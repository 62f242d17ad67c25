"""LoRA (arXiv 2106.09685): low-rank adapters of projections and experts.

Adapters are a tree like the decoder's stacks that holds `{"down", "up"}` for each target:

    down    [..., *I, r], the axes of layers and experts, then the projection's inputs
    up      [..., r, *O], the same, then its outputs
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax.config import Lora
from dcmdp_jax.models import decoder, derived
from dcmdp_jax.models.derived import LowRank
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import SCALED, Quantized, formats, quantize


def check(lora: Lora, config: ModelConfig) -> None:
    """Raises ValueError if the frozen weights of a model cannot have the formats of `lora`."""
    if lora.base not in formats("weights"):
        raise ValueError(
            f"model.lora.base={lora.base!r} is not one of {', '.join(formats('weights'))}"
        )
    params = jax.eval_shape(partial(decoder.init, config=config), jax.random.key(0))
    jax.eval_shape(partial(freeze, lora=lora), params)


def init(params: Any, key: jax.Array, lora: Lora) -> dict:
    """Returns new adapters of the decoder's `params`; they change nothing, because `up` is 0."""
    keys = iter(jax.random.split(key, _count(params["stacks"], lora)))

    def adapter(w: Any, inputs: tuple[int, ...]) -> dict:
        down, up = _split(w.shape, inputs, lora.rank)
        bound = math.prod(w.shape[axis] for axis in inputs) ** -0.5
        return {
            "down": jax.random.uniform(next(keys), down, jnp.float32, -bound, bound),
            "up": jnp.zeros(up),
        }

    return {"stacks": [map_targets(adapter, stack, lora) for stack in params["stacks"]]}


def freeze(params: Any, lora: Lora) -> Any:
    """Returns the decoder's `params` in the formats that `lora.base` gives them; those that have
    them already are kept.
    """
    return jax.tree_util.tree_map_with_path(
        partial(freeze_weight, lora=lora), params, is_leaf=derived.is_weight
    )


def freeze_weight(path: tuple, w: Any, lora: Lora) -> Any:
    """Returns one parameter, by its path in the decoder's tree, as `freeze` does.

    It is rounded a layer at a time: a chip may hold no more than the complete weight beside that.
    """
    name = path[-1].key
    contracted = decoder.CONTRACTED.get(name)
    if lora.base == "float32" or isinstance(w, Quantized):
        return w
    if name in lora.targets and lora.base in SCALED:
        return jax.lax.map(lambda layer: quantize(layer, lora.base, contracted, lora.base_group), w)
    return w.astype(jnp.bfloat16) if contracted or name in ("embed", "head") else w


def abstract(lora: Lora, config: ModelConfig) -> dict:
    """Returns the shapes of a model's adapters."""
    params = jax.eval_shape(partial(decoder.init, config=config), jax.random.key(0))
    return jax.eval_shape(partial(init, lora=lora), params, jax.random.key(0))


def with_adapters(adapters: dict, params: Any, lora: Lora) -> Any:
    """Returns the decoder's `params` with `derived.LowRank` for each projection that is adapted."""

    def add(w: Any, adapter: Any) -> Any:
        if not isinstance(w, dict):
            return LowRank(w, adapter["down"], adapter["up"], lora.alpha / lora.rank)
        return w | {name: add(w[name], inner) for name, inner in adapter.items()}

    stacks = zip(params["stacks"], adapters["stacks"], strict=True)
    return params | {"stacks": [add(stack, adapter) for stack, adapter in stacks]}


def logical_axes(lora: Lora, config: ModelConfig) -> dict:
    """Returns the logical name of every axis of every adapter, as `decoder.logical_axes` does."""

    def names(axes: tuple, inputs: tuple[int, ...]) -> dict:
        down, up = _split(axes, inputs, None)
        return {"down": down, "up": up}

    stacks = decoder.logical_axes(config)["stacks"]
    return {"stacks": [map_targets(names, stack, lora) for stack in stacks]}


def _split(axes: tuple, inputs: tuple[int, ...], rank: Any) -> tuple[tuple, tuple]:
    """Returns the axes of `down` and `up` of a projection with `axes`."""
    first = len(axes) + inputs[0]
    last = first + len(inputs)
    return (*axes[:last], rank), (*axes[:first], rank, *axes[last:])


def map_targets(f: Any, tree: dict, lora: Lora) -> dict:
    """Returns `f(leaf, its contracted axes)` of each target of one stack; other leaves are left
    out.
    """
    out = {}
    for name, node in sorted(tree.items()):
        if name in lora.targets:
            out[name] = f(node, decoder.CONTRACTED[name])
        elif isinstance(node, dict) and (inner := map_targets(f, node, lora)):
            out[name] = inner
    return out


def _count(stacks: list[dict], lora: Lora) -> int:
    found: list[Any] = []
    for stack in stacks:
        map_targets(lambda leaf, _: found.append(leaf), stack, lora)
    return len(found)
