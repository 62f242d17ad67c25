"""Qwen3 (arXiv 2505.09388), dense and Mixture-of-Experts: one definition for training, scoring,
prefill and decode.

Parameters are a plain tree, `{"embed" [V, D], "stacks": [...], "final_norm" [D], "head" [D, V]
unless tied}`. Consecutive layers of one kind (dense or sparse) form a stack, whose leaves carry a
leading layer axis and are scanned. `prefill` and `decode` take the form `unstack` makes, one tree
per layer. Projections, embedding and head may be `Quantized`, and the engine's tied embedding may
have a head beside it, `"head"` [V, D]. Every function is pure, and `config` is static under jit. B
rows, S positions, D model, KV kv-heads, h head size, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import cache as kv_cache
from dcmdp_jax.models.cache import Cache
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.models.layers import Ends, Layer, compute_dtype, rotary
from dcmdp_jax.models.quantized import Quantized

CONTRACTED = {
    "q_proj": (-3,),
    "k_proj": (-3,),
    "v_proj": (-3,),
    "o_proj": (-3, -2),
    "gate_proj": (-2,),
    "up_proj": (-2,),
    "down_proj": (-2,),
}


def stacks(config: ModelConfig) -> list[tuple[bool, int]]:
    """(sparse, number of layers) of each run of consecutive layers of one kind."""
    kinds = [config.is_sparse(layer) for layer in range(config.num_layers)]
    return [(sparse, len(list(run))) for sparse, run in itertools.groupby(kinds)]


def _init_layer(key: jax.Array, config: ModelConfig, *, sparse: bool, dtype) -> dict:
    x = jnp.zeros((1, 1, config.hidden_size))
    angle = jnp.zeros((1, 1, 1, config.head_dim // 2))
    return Layer(config, sparse, dtype).init(key, x, angle, angle, lambda q, k, v: (q, None))[
        "params"
    ]


def _init_ends(key: jax.Array, config: ModelConfig, *, dtype) -> dict:
    return Ends(config, dtype).init(key, jnp.zeros((1,), jnp.int32), method="embed")["params"]


def init(key: jax.Array, config: ModelConfig, dtype=jnp.float32) -> dict:
    """Fresh parameters: weights normal(0, 0.02), norm scales one, biases zero. Jit with `config`,
    `dtype` static.
    """
    runs = stacks(config)
    first, *rest = jax.random.split(key, len(runs) + 1)

    def stack(key: jax.Array, sparse: bool, layers: int) -> dict:
        keys = jax.random.split(key, layers)
        return jax.lax.map(
            lambda k: nn.unbox(_init_layer(k, config, sparse=sparse, dtype=dtype)), keys
        )

    params = nn.unbox(_init_ends(first, config, dtype=dtype))
    return params | {
        "stacks": [stack(k, sparse, layers) for k, (sparse, layers) in zip(rest, runs, strict=True)]
    }


def logical_axes(config: ModelConfig) -> dict:
    """The logical name of every axis of every parameter: `init`'s tree with a tuple of names (or
    None) per leaf.

    Names: layers, vocab, embed, q_heads, kv_heads, head_dim, mlp, experts, expert_embed.
    """

    def names(init_part, *leading: str) -> dict:
        boxes = jax.eval_shape(lambda: init_part(jax.random.key(0), config, dtype=jnp.float32))
        return jax.tree.map(
            lambda box: leading + box.names, boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned)
        )

    layers = [
        names(functools.partial(_init_layer, sparse=sparse), "layers")
        for sparse, _ in stacks(config)
    ]
    return names(_init_ends) | {"stacks": layers}


def contracting_axes(config: ModelConfig) -> dict:
    """The axes each projection contracts: `init`'s tree with a tuple per projection or expert, None
    elsewhere.

    Axes count from the end and so hold for stacked and single layers. Map with the parameters
    first: `jax.tree.map(f, params, contracting_axes(config))`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: CONTRACTED.get(path[-1].key),
        logical_axes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def unstack(params: dict, config: ModelConfig) -> dict:
    """The same parameters with `stacks` a flat list of one tree per layer, the form `prefill` and
    `decode` take.
    """
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        for stack, (_, n) in zip(params["stacks"], stacks(config), strict=True)
        for i in range(n)
    ]
    return params | {"stacks": layers}


# Passes


def hidden(
    params: dict,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    embedded: jax.Array | None = None,
    experts: jax.Array | None = None,
) -> jax.Array:
    """The residual stream after the final norm, in the compute dtype: tokens [B, S] int32 -> [B, S,
    D].

    A token looks at itself and at the tokens before it in its segment, a run of equal ids.
    segment_ids [B, S]: None is one segment per row; 0 is padding. positions [B, S]: None counts
    from 0 in each row. embedded [B, S, D]: the tokens' rows of the embedding, where the caller has
    looked them up. experts [B, S, sparse layers, j]: those that tokens are sent to, -1 where their
    router chooses (see `moe.route`). Raises ValueError for `unstack`ed parameters.
    """
    if params["stacks"][0]["input_norm"]["scale"].ndim != 2:
        raise ValueError(
            "hidden takes the stacked parameters of init or load, not those of unstack"
        )
    cos, sin = rotary(jnp.arange(tokens.shape[1])[None] if positions is None else positions, config)

    def attend(q, k, v):
        return attention.packed(q, k, v, segment_ids), None

    x = _embedded(params, tokens, config) if embedded is None else embedded
    routed = 0
    for stack, names, (sparse, n) in zip(
        params["stacks"], logical_axes(config)["stacks"], stacks(config), strict=True
    ):
        replayed = (
            jnp.moveaxis(experts[:, :, routed : routed + n], 2, 0)
            if sparse and experts is not None
            else None
        )
        routed += n * sparse
        layer = Layer(config, sparse)
        names = jax.tree.map(lambda axes: axes[1:], names, is_leaf=sharding.is_axis_names)

        def step(x, given, layer=layer, names=names):
            layer_params, replayed = given
            layer_params = sharding.gather_params(_computed(layer_params, config), names)
            x, _ = layer.apply({"params": layer_params}, x, cos, sin, attend, replayed=replayed)
            return sharding.constrain(x, "rows", "positions", None), None

        again = (
            jax.checkpoint(step, prevent_cse=False, policy=config.remat_policy)
            if config.remat
            else step
        )
        x, _ = jax.lax.scan(again, x, (stack, replayed))
    return Ends(config).apply({"params": _ends(params)}, x, method="norm")


def _embedded(params: dict, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """[R, S] -> [R, S, D]. Every part of the table looks up all rows; then rows change places with
    parts.
    """
    x = Ends(config).apply(
        {"params": _ends(params)}, sharding.constrain(tokens, "replicas", None), method="embed"
    )
    x = sharding.constrain(x, "replicas", None, "split_embed")
    return sharding.constrain(x, "rows", "positions", None)


def _computed(layer_params: dict, config: ModelConfig) -> dict:
    """Projections in the compute dtype, so that they are gathered in it."""

    def leaf(path, w):
        return (
            w.astype(compute_dtype(config))
            if path[-1].key in CONTRACTED and not isinstance(w, Quantized)
            else w
        )

    return jax.tree_util.tree_map_with_path(
        leaf, layer_params, is_leaf=lambda w: isinstance(w, Quantized)
    )


def head(params: dict, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of hidden states: [..., D] -> [..., V] float32 (operands in the compute dtype, sums in
    float32).
    """
    return Ends(config).apply({"params": _ends(params)}, x, method="head")


def logits(
    params: dict,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """`head(hidden(...))`: tokens [B, S] int32 -> [B, S, V] float32."""
    return head(
        params, hidden(params, tokens, config, positions=positions, segment_ids=segment_ids), config
    )


def prefill(
    params: dict, tokens: jax.Array, config: ModelConfig
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Keys and values of prompts, for `cache.insert`: tokens [N, P] int32 -> per layer, [N, KV, P,
    h] each.

    Prompts are padded on the right; attention is causal, so padding never reaches a prompt. Takes
    `unstack`ed parameters and raises ValueError for stacked ones.
    """
    index = jnp.arange(tokens.shape[1])
    cos, sin = rotary(index[None], config)

    def attend(q, k, v):
        return attention.attention(q, k, v, index[:, None] >= index), (k, v)

    x = Ends(config).apply({"params": _ends(params)}, tokens, method="embed")
    keys = []
    values = []
    for layer, layer_params in _layers(params, config):
        x, (k, v) = layer.apply({"params": layer_params}, x, cos, sin, attend)
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
    live: jax.Array | None = None,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Feed one token to each slot: tokens [B], lengths [B] int32 -> x [B, D] after the final norm,
    the cache, and the router's choice in each of the sparse layers, [B, sparse layers, k] int32.

    Slot b's token stands at position lengths[b]: its key and value are written there, and it
    attends to positions 0..lengths[b]. Attention reads the first `window` (static) positions, so
    every live slot needs lengths[b] < window. What comes of slots that are not `live` [B] (None:
    all are) has no meaning. Takes `unstack`ed parameters and raises ValueError for stacked ones.
    """
    cos, sin = rotary(lengths[:, None], config)

    def attend(q, k, v, keys, values):
        keys = kv_cache.write(keys, k[:, :, 0], lengths)
        values = kv_cache.write(values, v[:, :, 0], lengths)
        return kv_cache.attend(q[..., 0, :], keys, values, lengths, window=window)[..., None, :], (
            keys,
            values,
        )

    x = Ends(config).apply({"params": _ends(params)}, tokens[:, None], method="embed")
    kept = []
    experts = []
    for (layer, layer_params), keys, values in zip(_layers(params, config), *cache, strict=True):
        with_cache = functools.partial(attend, keys=keys, values=values)
        (x, pair), chosen = layer.apply(
            {"params": layer_params}, x, cos, sin, with_cache, live, mutable=["routing"]
        )
        kept.append(pair)
        experts += jax.tree.leaves(chosen)
    x = Ends(config).apply({"params": _ends(params)}, x, method="norm")
    chosen = jnp.stack(experts, axis=1) if experts else jnp.zeros((len(tokens), 0, 0), jnp.int32)
    return x[:, 0], Cache(*map(tuple, zip(*kept, strict=True))), chosen


def _ends(params: dict) -> dict:
    return {name: leaf for name, leaf in params.items() if name != "stacks"}


def _layers(params: dict, config: ModelConfig) -> list[tuple[Layer, dict]]:
    """Each layer's module and parameters, in order."""
    trees = params["stacks"]
    if len(trees) != config.num_layers or trees[0]["input_norm"]["scale"].ndim != 1:
        raise ValueError(
            "prefill and decode take one tree per layer; pass the parameters through unstack first"
        )
    return [(Layer(config, config.is_sparse(i)), tree) for i, tree in enumerate(trees)]
