"""The decoder: Qwen3 (arXiv 2505.09388), dense and Mixture-of-Experts, Qwen2 (arXiv 2407.10671),
and Llama (arXiv 2407.21783), as which Mistral and SmolLM2 are computed.

    x = embed(tokens)
    for each layer:                        (`layers.py`)
        x = x + attention(norm(x))         (`rope.py`, `kernels/attention.py`)
        x = x + feed_forward(norm(x))      (`kernels/swiglu.py`, or experts: `moe.py`)
    logits = head(norm(x))

A model is two values: a `ModelConfig`, whose switches say which decoder it is, and its parameters.
Every function is pure and takes both; the config is hashable and static under jit. `hidden` and
`head` serve training and scoring; `inference.py` runs the same layers with a cache.

Parameters are a plain tree, `{"embed" [V, D], "stacks": [...], "final_norm" [D], "head" [D, V]
unless tied}`. Consecutive layers of one kind (dense or sparse) form a stack, whose leaves carry a
leading layer axis and are scanned. Projections, embedding and head may be `Quantized`; `hidden`
also takes projections of `derived`. An engine whose tied head has another precision than the
embedding has both, `"head"` being [V, D].

B rows, S positions, D model, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models import derived, quantized
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.models.layers import Layer, compute_dtype, parameter, rms_norm
from dcmdp_jax.models.model_config import ModelConfig
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


# What the model computes


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


def hidden(
    params: dict,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prefix_ids: jax.Array | None = None,
    embedded: jax.Array | None = None,
    replayed: jax.Array | None = None,
) -> jax.Array:
    """Returns the residual stream after the final norm, in the compute dtype: tokens [B, S] int32
    -> [B, S, D].

    A token attends to itself, to the tokens before it in its segment and, if that is a branch, to
    the prefix that it continues.

    Args:
        positions: [B, S]; None counts from 0 in each row.
        segment_ids: [B, S], a run of equal ids is a segment; None: every row is one. Padding (0)
            attends to itself alone.
        prefix_ids: [B, S], the segment id of the prefix that a branch continues; 0 for segments
            that are no branch. A prefix is followed by its branches alone. None: there are none.
        embedded: [B, S, D], the tokens' rows of the embedding, if the caller has looked them up.
        replayed: [B, S, sparse layers, j], the experts that tokens are sent to; -1 leaves the
            choice to the router (see `moe.route`).

    Raises ValueError for parameters from `inference.unstack`.
    """
    if params["stacks"][0]["input_norm"]["scale"].ndim != 2:
        raise ValueError(
            "hidden takes the stacked parameters of init or load, not those of unstack"
        )
    cos, sin = rotary(jnp.arange(tokens.shape[1])[None] if positions is None else positions, config)

    def attend(q, k, v):
        return attention.packed(q, k, v, segment_ids, prefix_ids), None

    x = _embed_sharded(params, tokens, config) if embedded is None else embedded
    sparse_before = 0
    for stack, (sparse, n) in zip(params["stacks"], stacks(config), strict=True):
        by_layer = None  # `replayed` of this stack
        if sparse and replayed is not None:
            by_layer = jnp.moveaxis(replayed[:, :, sparse_before : sparse_before + n], 2, 0)
            sparse_before += n

        def layer(x, scanned, sparse=sparse):
            layer_params, layer_replayed = scanned
            layer_params = _gather(layer_params, config, sparse)
            x, _, _ = Layer(config, sparse).apply(
                {"params": layer_params}, x, cos, sin, attend, replayed=layer_replayed
            )
            return sharding.constrain(x, "rows", "positions", None), None

        if config.compute.remat:
            layer = jax.checkpoint(layer, prevent_cse=False, policy=config.compute.remat_policy)
        x, _ = jax.lax.scan(layer, x, (stack, by_layer))
    return final_norm(params, x, config)


def embed(params: dict, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the tokens' rows of the embedding in the compute dtype: [...] int32 -> [..., D]."""
    return quantized.embed(params["embed"], tokens, compute_dtype(config))


def final_norm(params: dict, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the norm between the last layer and the head: [..., D] -> [..., D]."""
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def head(params: dict, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the logits of hidden states: [..., D] -> [..., V] float32 (operands in the compute
    dtype, sums in float32).
    """
    if config.tie_word_embeddings:
        table = params.get("head", params["embed"])
        return quantized.unembed(x, table, compute_dtype(config))
    return quantized.product(x, params["head"], compute_dtype(config))


# Over several devices


def _embed_sharded(params: dict, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """`embed` of [B, S]. Every shard of the table looks up its columns of all rows; then the
    sharding changes from columns to rows.
    """
    x = embed(params, sharding.constrain(tokens, "replicas", None), config)
    x = sharding.constrain(x, "replicas", None, "split_embed")
    return sharding.constrain(x, "rows", "positions", None)


def _gather(layer_params: dict, config: ModelConfig, sparse: bool) -> dict:
    """Returns a layer's parameters gathered from their shards, projections in the compute dtype and
    those of `derived` made.
    """

    def cast(path, w):
        w = derived.array(w)
        if path[-1].key in CONTRACTED and not isinstance(w, Quantized):
            return w.astype(compute_dtype(config))
        return w

    in_dtype = jax.tree_util.tree_map_with_path(cast, layer_params, is_leaf=derived.is_weight)
    return sharding.gather_params(in_dtype, layer_axes(config, sparse))


# Parameters


def stacks(config: ModelConfig) -> list[tuple[bool, int]]:
    """Returns (sparse, number of layers) of each run of consecutive layers of one kind."""
    kinds = [config.is_sparse(layer) for layer in range(config.num_layers)]
    return [(sparse, len(list(run))) for sparse, run in itertools.groupby(kinds)]


def init(key: jax.Array, config: ModelConfig, dtype=jnp.float32) -> dict:
    """Returns new parameters: weights normal(0, 0.02), norm scales 1, biases 0. Jit with `config`
    and `dtype` static.
    """
    runs = stacks(config)
    outer_key, *stack_keys = jax.random.split(key, len(runs) + 1)

    def stack(key: jax.Array, sparse: bool, layers: int) -> dict:
        keys = jax.random.split(key, layers)
        return jax.lax.map(lambda k: nn.unbox(_init_layer(k, config, sparse, dtype)), keys)

    params = nn.unbox(_init_outer(outer_key, config, dtype))
    params["stacks"] = [stack(k, *run) for k, run in zip(stack_keys, runs, strict=True)]
    return params


def logical_axes(config: ModelConfig) -> dict:
    """Returns the logical name of every axis of every parameter: `init`'s tree with a tuple of
    names (or None) per leaf.

    Names: layers, vocab, embed, q_heads, kv_heads, head_dim, mlp, experts, expert_embed.
    """

    def stacked(names: tuple) -> tuple:
        return ("layers", *names)

    layers = [
        jax.tree.map(stacked, layer_axes(config, sparse), is_leaf=sharding.is_axis_names)
        for sparse, _ in stacks(config)
    ]
    return _axes(lambda key: _init_outer(key, config, jnp.float32)) | {"stacks": layers}


def layer_axes(config: ModelConfig, sparse: bool) -> dict:
    """Returns the logical axes of the parameters of one layer."""
    return _axes(lambda key: _init_layer(key, config, sparse, jnp.float32))


def contracting_axes(config: ModelConfig) -> dict:
    """Returns the axes that each projection or expert contracts: `init`'s tree with a tuple for
    each of them, None elsewhere.

    Axes count from the end, so they hold for stacked and unstacked layers. Map with the parameters
    first: `jax.tree.map(f, params, contracting_axes(config))`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: CONTRACTED.get(path[-1].key),
        logical_axes(config),
        is_leaf=sharding.is_axis_names,
    )


class _Outer(nn.Module):
    """Declares the parameters outside the layers."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> None:
        v = self.config.vocab_size
        d = self.config.hidden_size
        parameter(self, "embed", (v, d), ("vocab", "embed"))
        parameter(self, "final_norm", (d,), ("embed",), nn.initializers.ones)
        if not self.config.tie_word_embeddings:
            parameter(self, "head", (d, v), ("embed", "vocab"))


def _init_outer(key: jax.Array, config: ModelConfig, dtype) -> dict:
    return _Outer(config, dtype).init(key)["params"]


def _init_layer(key: jax.Array, config: ModelConfig, sparse: bool, dtype) -> dict:
    x = jnp.zeros((1, 1, config.hidden_size))
    angle = jnp.zeros((1, 1, 1, config.head_dim // 2))
    layer = Layer(config, sparse, dtype)
    return layer.init(key, x, angle, angle, lambda q, k, v: (q, None))["params"]


def _axes(init_part: Callable[[jax.Array], dict]) -> dict:
    """Returns the logical axes that a part of the model declares."""
    boxes = jax.eval_shape(init_part, jax.random.key(0))
    return jax.tree.map(
        lambda box: box.names, boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
