"""The decoder: Qwen3 (arXiv 2505.09388) and its relatives, dense and Mixture-of-Experts, in one
definition for training, scoring, prefill and decode.

A model is two values: a `ModelConfig`, whose switches say which decoder it is, and its parameters.
Every function here is pure and takes both; the config is hashable and static under jit. There is no
object that binds them, since the parameters change at every step and the config never does.

Parameters are a plain tree, `{"embed" [V, D], "stacks": [...], "final_norm" [D], "head" [D, V]
unless tied}`. Consecutive layers of one kind (dense or sparse) form a stack, whose leaves carry a
leading layer axis and are scanned. `prefill` and `decode` take the form that `unstack` returns, one
tree per layer. Projections, embedding and head may be `Quantized`. An engine whose tied head has
another precision than the embedding has both, `"head"` being [V, D]. B rows or slots, S positions,
D model, KV kv-heads, h head size, V vocabulary.
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
from dcmdp_jax.models.layers import Ends, Layer, compute_dtype
from dcmdp_jax.models.quantized import Quantized
from dcmdp_jax.models.rope import rotary

# The axes over which a projection or expert sums, counted from the end.
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
    """Returns (sparse, number of layers) of each run of consecutive layers of one kind."""
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
    """Returns new parameters: weights normal(0, 0.02), norm scales 1, biases 0. Jit with `config`
    and `dtype` static.
    """
    runs = stacks(config)
    ends_key, *stack_keys = jax.random.split(key, len(runs) + 1)

    def stack(key: jax.Array, sparse: bool, layers: int) -> dict:
        keys = jax.random.split(key, layers)
        return jax.lax.map(
            lambda k: nn.unbox(_init_layer(k, config, sparse=sparse, dtype=dtype)), keys
        )

    params = nn.unbox(_init_ends(ends_key, config, dtype=dtype))
    params["stacks"] = [stack(k, *run) for k, run in zip(stack_keys, runs, strict=True)]
    return params


def logical_axes(config: ModelConfig) -> dict:
    """Returns the logical name of every axis of every parameter: `init`'s tree with a tuple of
    names (or None) per leaf.

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
    """Returns the axes that each projection or expert contracts: `init`'s tree with a tuple for
    each of them, None elsewhere.

    Axes count from the end, so they hold for stacked and unstacked layers. Map with the parameters
    first: `jax.tree.map(f, params, contracting_axes(config))`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: CONTRACTED.get(path[-1].key),
        logical_axes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def unstack(params: dict, config: ModelConfig) -> dict:
    """Returns the same parameters with `stacks` a flat list of one tree per layer, the form that
    `prefill` and `decode` take.
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
    """Returns the residual stream after the final norm, in the compute dtype: tokens [B, S] int32
    -> [B, S, D].

    A token attends to itself and to the tokens before it in its segment.

    Args:
        positions: [B, S]; None counts from 0 in each row.
        segment_ids: [B, S], a run of equal ids is a segment; None: every row is one. Padding is a
            segment of its own (0).
        embedded: [B, S, D], the tokens' rows of the embedding, if the caller has looked them up.
        experts: [B, S, sparse layers, j], the experts that tokens are sent to; -1 leaves the choice
            to the router (see `moe.route`).

    Raises ValueError for `unstack`ed parameters.
    """
    if params["stacks"][0]["input_norm"]["scale"].ndim != 2:
        raise ValueError(
            "hidden takes the stacked parameters of init or load, not those of unstack"
        )
    cos, sin = rotary(jnp.arange(tokens.shape[1])[None] if positions is None else positions, config)

    def attend(q, k, v):
        return attention.packed(q, k, v, segment_ids), None

    x = _embedded(params, tokens, config) if embedded is None else embedded
    sparse_before = 0
    for stack, names, (sparse, n) in zip(
        params["stacks"], logical_axes(config)["stacks"], stacks(config), strict=True
    ):
        replayed = (
            jnp.moveaxis(experts[:, :, sparse_before : sparse_before + n], 2, 0)
            if sparse and experts is not None
            else None
        )
        sparse_before += n * sparse
        layer = Layer(config, sparse)
        names = jax.tree.map(lambda axes: axes[1:], names, is_leaf=sharding.is_axis_names)

        def step(x, scanned, layer=layer, names=names):
            layer_params, replayed = scanned
            layer_params = sharding.gather_params(_in_compute_dtype(layer_params, config), names)
            x, _ = layer.apply({"params": layer_params}, x, cos, sin, attend, replayed=replayed)
            return sharding.constrain(x, "rows", "positions", None), None

        if config.compute.remat:
            step = jax.checkpoint(step, prevent_cse=False, policy=config.compute.remat_policy)
        x, _ = jax.lax.scan(step, x, (stack, replayed))
    return Ends(config).apply({"params": _ends(params)}, x, method="norm")


def _embedded(params: dict, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, S] -> [B, S, D]. Every shard of the table looks up its columns of all rows; then the
    sharding changes from columns to rows.
    """
    x = Ends(config).apply(
        {"params": _ends(params)}, sharding.constrain(tokens, "replicas", None), method="embed"
    )
    x = sharding.constrain(x, "replicas", None, "split_embed")
    return sharding.constrain(x, "rows", "positions", None)


def _in_compute_dtype(layer_params: dict, config: ModelConfig) -> dict:
    """Casts projections to the compute dtype, so that they are gathered in it."""

    def leaf(path, w):
        if path[-1].key in CONTRACTED and not isinstance(w, Quantized):
            return w.astype(compute_dtype(config))
        return w

    return jax.tree_util.tree_map_with_path(
        leaf, layer_params, is_leaf=lambda w: isinstance(w, Quantized)
    )


def head(params: dict, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the logits of hidden states: [..., D] -> [..., V] float32 (operands in the compute
    dtype, sums in float32).
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
    """Returns `head(hidden(...))`: tokens [B, S] int32 -> [B, S, V] float32."""
    return head(
        params, hidden(params, tokens, config, positions=positions, segment_ids=segment_ids), config
    )


def prefill(
    params: dict, tokens: jax.Array, config: ModelConfig, *, expert_shards: int = 0
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns the keys and values of prompts, for `cache.insert`: tokens [N, P] int32 -> one
    [N, KV, P, h] per layer, of each.

    Prompts are padded on the right; attention is causal, so padding never reaches a prompt.
    `expert_shards` is the size of the mesh's tensor axis, if XLA splits the experts over it (see
    `moe.mixture`). Takes `unstack`ed parameters and raises ValueError for stacked ones.
    """
    index = jnp.arange(tokens.shape[1])
    cos, sin = rotary(index[None], config)

    def attend(q, k, v):
        return attention.attention(q, k, v, index[:, None] >= index), (k, v)

    x = Ends(config).apply({"params": _ends(params)}, tokens, method="embed")
    keys = []
    values = []
    for layer, layer_params in _layers(params, config, expert_shards):
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
    expert_shards: int = 0,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Feeds one token to each slot: tokens [B], lengths [B] int32.

    Slot b's token stands at position lengths[b]: its key and value are written there, and it
    attends to positions 0..lengths[b].

    Args:
        window: static; attention reads the first `window` positions, so every live slot needs
            lengths[b] < window.
        live: [B] bool; results of other slots are meaningless. None: all are live.
        expert_shards: as for `prefill`.

    Returns:
        x [B, D] after the final norm, the cache, and the router's choice in each of the sparse
        layers [B, sparse layers, k] int32.

    Takes `unstack`ed parameters and raises ValueError for stacked ones.
    """
    cos, sin = rotary(lengths[:, None], config)

    def attend(q, k, v, keys, values):
        keys = kv_cache.write(keys, k[:, :, 0], lengths)
        values = kv_cache.write(values, v[:, :, 0], lengths)
        out = kv_cache.attend(q[..., 0, :], keys, values, lengths, window=window)
        return out[..., None, :], (keys, values)

    x = Ends(config).apply({"params": _ends(params)}, tokens[:, None], method="embed")
    written = []
    experts = []
    layers = _layers(params, config, expert_shards)
    for (layer, layer_params), keys, values in zip(layers, *cache, strict=True):
        with_cache = functools.partial(attend, keys=keys, values=values)
        (x, keys_and_values), chosen = layer.apply(
            {"params": layer_params}, x, cos, sin, with_cache, live, mutable=["routing"]
        )
        written.append(keys_and_values)
        experts += jax.tree.leaves(chosen)
    x = Ends(config).apply({"params": _ends(params)}, x, method="norm")
    chosen = jnp.stack(experts, axis=1) if experts else jnp.zeros((len(tokens), 0, 0), jnp.int32)
    return x[:, 0], Cache(*map(tuple, zip(*written, strict=True))), chosen


def _ends(params: dict) -> dict:
    return {name: leaf for name, leaf in params.items() if name != "stacks"}


def _layers(params: dict, config: ModelConfig, expert_shards: int) -> list[tuple[Layer, dict]]:
    """Returns each layer's module and parameters, in order."""
    trees = params["stacks"]
    if len(trees) != config.num_layers or trees[0]["input_norm"]["scale"].ndim != 1:
        raise ValueError(
            "prefill and decode take one tree per layer; pass the parameters through unstack first"
        )
    return [
        (Layer(config, config.is_sparse(i), expert_shards=expert_shards), tree)
        for i, tree in enumerate(trees)
    ]
