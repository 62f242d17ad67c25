"""Log-probs of the completions in packed rows: the forward pass that trains and scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models import decoder
from dcmdp_jax.models.kernels.head import token_logp
from dcmdp_jax.models.layers import compute_dtype
from dcmdp_jax.models.model_config import ModelConfig


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
    replayed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns log-prob and entropy [n, T] of completion tokens in packed rows [R, S]; `index` and
    `replayed` as in `records.Batch`, `entropy` and `entropy_gradient` as in `token_logp`.

    Values at masked places are meaningless.
    """
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
        embedded=embedded,
        replayed=replayed,
    )
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
