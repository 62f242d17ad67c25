"""The decoder with a key-value cache: `prefill` reads prompts, `decode` feeds each slot a token.

The layers are those of `decoder.hidden`; what they attend to and what they keep differs. They are
not scanned: `unstack` turns the parameters into one tree per layer. B slots, KV kv-heads, h head
size, D model, k experts a token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dcmdp_jax.models import cache as kv_cache
from dcmdp_jax.models import decoder
from dcmdp_jax.models.cache import Cache
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.models.layers import Layer
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.rope import rotary


def unstack(params: dict, config: ModelConfig) -> dict:
    """Returns the same parameters with `stacks` a flat list of one tree per layer."""
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        for stack, (_, n) in zip(params["stacks"], decoder.stacks(config), strict=True)
        for i in range(n)
    ]
    return params | {"stacks": layers}


def prefill(
    params: dict, tokens: jax.Array, config: ModelConfig, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns the keys and values of prompts, for `cache.insert`: tokens [N, P] int32 -> one
    [N, KV, P, h] per layer, of each.

    Prompts are padded on the right; attention is causal, so padding never reaches a prompt.
    `mesh` is the one over which the parameters are split, if any. Takes `unstack`ed parameters and
    raises ValueError for stacked ones.
    """
    index = jnp.arange(tokens.shape[1])
    cos, sin = rotary(index[None], config)

    def attend(q, k, v):
        return attention.attention(q, k, v, index[:, None] >= index), (k, v)

    x = decoder.embed(params, tokens, config)
    keys = []
    values = []
    for layer, layer_params in _layers(params, config, mesh):
        x, (k, v), _ = layer.apply({"params": layer_params}, x, cos, sin, attend)
        keys.append(k)
        values.append(v)
    return tuple(keys), tuple(values)


def decode(
    params: dict,
    tokens: jax.Array,
    cache: Cache,
    lengths: jax.Array,
    config: ModelConfig,
    *,
    window: int,
    active: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Feeds one token to each slot: tokens [B], lengths [B] int32.

    Slot b's token stands at position lengths[b]: its key and value are written there, and it
    attends to positions 0..lengths[b].

    Args:
        window: static; every active slot needs lengths[b] < window, the positions that attention
            reads at most.
        active: [B] bool; results of other slots are meaningless. None: all are active.
        mesh: the one over which the parameters and the cache are split, if any.

    Returns:
        x [B, D] after the final norm, the cache, and the router's choice in each of the sparse
        layers [B, sparse layers, k] int32.

    Takes `unstack`ed parameters and raises ValueError for stacked ones.
    """
    cos, sin = rotary(lengths[:, None], config)
    # of a slot that is idle, as little as possible is read
    attended = lengths if active is None else jnp.where(active, lengths, 0)

    def attend(q, k, v, keys, values):
        keys = kv_cache.write(keys, k[:, :, 0], lengths)
        values = kv_cache.write(values, v[:, :, 0], lengths)
        out = kv_cache.attend(q[..., 0, :], keys, values, attended, window=window, mesh=mesh)
        return out[..., None, :], (keys, values)

    active = None if active is None else active[:, None]
    x = decoder.embed(params, tokens[:, None], config)
    written = []
    chosen = []
    layers = _layers(params, config, mesh)
    for (layer, layer_params), keys, values in zip(layers, *cache, strict=True):
        with_cache = functools.partial(attend, keys=keys, values=values)
        x, keys_and_values, experts = layer.apply(
            {"params": layer_params}, x, cos, sin, with_cache, active
        )
        written.append(keys_and_values)
        if experts is not None:
            chosen.append(experts[:, 0])
    x = decoder.final_norm(params, x, config)
    experts = jnp.stack(chosen, axis=1) if chosen else jnp.zeros((len(tokens), 0, 0), jnp.int32)
    return x[:, 0], Cache(*map(tuple, zip(*written, strict=True))), experts


def _layers(
    params: dict, config: ModelConfig, mesh: jax.sharding.Mesh | None
) -> list[tuple[Layer, dict]]:
    """Returns each layer's module and parameters, in order."""
    trees = params["stacks"]
    if len(trees) != config.num_layers or trees[0]["input_norm"]["scale"].ndim != 1:
        raise ValueError(
            "prefill and decode take one tree per layer; pass the parameters through unstack first"
        )
    return [(Layer(config, config.is_sparse(i), mesh=mesh), tree) for i, tree in enumerate(trees)]
