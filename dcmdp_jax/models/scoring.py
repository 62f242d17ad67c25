"""Log-probs of the completions in packed rows: the forward pass that trains and scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models import decoder
from dcmdp_jax.models.kernels.head import token_logp, weight_of
from dcmdp_jax.models.layers import compute_dtype
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import einsum

GATHERED = 1 << 26  # numbers of gathered rows of the head that exist at a time


def packed_logp(
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    index: jax.Array,
    config: ModelConfig,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
    prefix_ids: jax.Array | None = None,
    replayed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns log-prob and entropy [n, T] of completion tokens in packed rows [R, S]; `index`,
    `prefix_ids` and `replayed` as in `records.Batch`, `entropy` and `entropy_gradient` as in
    `token_logp`.

    Values at masked places are meaningless.
    """
    params, hidden = _hidden(params, tokens, positions, segment_ids, prefix_ids, config, replayed)
    return _of_tokens(params, hidden, tokens, index, config, temperature, entropy, entropy_gradient)


def packed_top_logp(
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    index: jax.Array,
    candidates: jax.Array,
    config: ModelConfig,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
    prefix_ids: jax.Array | None = None,
    replayed: jax.Array | None = None,
    gathered: int = GATHERED,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """As `packed_logp`, and the log-probs [n, T, k] of other tokens at the same places.

    Args:
        candidates: [n, T, k] int32, tokens that might have followed.
        gathered: largest number of entries of the head's rows in memory at a time, except that
            those of one place always are.
    """
    params, hidden = _hidden(params, tokens, positions, segment_ids, prefix_ids, config, replayed)
    logp, entropies = _of_tokens(
        params, hidden, tokens, index, config, temperature, entropy, entropy_gradient
    )
    sampled = jnp.roll(tokens, -1, axis=1).reshape(-1)[index]
    size = hidden.shape[-1]
    tied = config.tie_word_embeddings
    weight = weight_of(params, config)

    def differences(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        """[p, D] and [p, 1 + k] -> the logits [p, k] less that of the first token."""
        x, ids = place
        rows = weight[ids] if tied else jnp.moveaxis(weight[:, ids], 0, -1)
        z = einsum("pd,pkd->pk", x, rows, compute_dtype(config)) / temperature
        return z[:, 1:] - z[:, :1]

    ids = jnp.concatenate([sampled[..., None], candidates], axis=-1)
    ids = ids.reshape(-1, ids.shape[-1])
    x = hidden.reshape(-1, size)[index.reshape(-1)]
    at_once = max(gathered // (ids.shape[-1] * size), 1)
    if at_once >= len(ids):
        difference = differences((x, ids))
    else:
        padding = -len(ids) % at_once
        parts = jax.tree.map(
            lambda a: jnp.pad(a, ((0, padding), (0, 0))).reshape(-1, at_once, a.shape[-1]),
            (x, ids),
        )
        difference = jax.lax.map(jax.checkpoint(differences), parts)
        difference = difference.reshape(-1, difference.shape[-1])[: len(ids)]
    # the sampled token's log-prob has the normaliser
    return logp, entropies, logp[..., None] + difference.reshape(candidates.shape)


def _hidden(
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    prefix_ids: jax.Array | None,
    config: ModelConfig,
    replayed: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Returns the parameters for the head, and the last hidden states of packed rows, [R, S, D]."""
    embedded = None
    if sharding.current_mesh() is None:
        rows, table = _look_up(params["embed"], tokens)
        params = params | {"embed": table}
        embedded = rows.astype(compute_dtype(config))
    hidden = decoder.hidden(
        params,
        tokens,
        config,
        positions=positions,
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        embedded=embedded,
        replayed=replayed,
    )
    return params, hidden


def _of_tokens(
    params: Any,
    hidden: jax.Array,
    tokens: jax.Array,
    index: jax.Array,
    config: ModelConfig,
    temperature: float,
    entropy: bool,
    entropy_gradient: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns log-prob and entropy [n, T] of the tokens that follow the places of `index`."""
    # the last column predicts nothing and is not in `index`
    targets = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.zeros(tokens.size, bool).at[index].set(True).reshape(tokens.shape)
    out = token_logp(
        params,
        hidden,
        targets,
        wanted,
        config,
        temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
    )
    return jax.tree.map(lambda x: x.reshape(-1)[index], out)


@jax.custom_vjp
def _look_up(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns rows of the table, and the table for a head tied to it. Their gradients add up in one
    array, which is as large as the table.
    """
    return table[tokens], table


_look_up.defvjp(
    lambda table, tokens: (_look_up(table, tokens), tokens),
    lambda tokens, grads: (grads[1].at[tokens].add(grads[0]), None),
)
