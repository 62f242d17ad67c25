"""The sparse feed-forward of Qwen3-MoE: `route`, a softmax router, then `mixture`, a sum of experts
that drops no token.

N tokens, D model, E experts of size F, k experts a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.models.kernels.experts import expert_outputs
from dcmdp_jax.models.kernels.swiglu import Experts
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import einsum


def route(
    x: jax.Array, router: jax.Array, config: ModelConfig, replayed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the top-k experts of each token and their gates.

        p = softmax(x @ router) over all E experts, in float32
        gates = top-k of p, divided by their sum if norm_topk_prob

    `replayed` [..., j] replaces the top k of a token unless its first entry is -1 (arXiv
    2510.11370). Only the choice is replayed; gates are still computed from p and differentiated. If
    fewer than max(j, k) experts are used, the rest have gate 0. x [..., D], router [D, E] -> gates
    [..., k] float32, experts [..., k] int32; with `replayed`, max(j, k) of them.
    """
    probs = jax.nn.softmax(einsum("...d,de->...e", x, router, jnp.float32), axis=-1)
    if replayed is None:
        gates, experts = jax.lax.top_k(probs, config.experts_per_token)
    else:
        gates, experts = _replay(probs, replayed.astype(jnp.int32), config.experts_per_token)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


def _replay(probs: jax.Array, replayed: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    j = replayed.shape[-1]
    size = max(k, j)
    top = jax.lax.top_k(probs, size)[1]
    column = jnp.arange(size)
    is_replayed = replayed[..., :1] >= 0
    padded = jnp.pad(replayed, [(0, 0)] * (replayed.ndim - 1) + [(0, size - j)])
    experts = jnp.where(is_replayed & (column < j), padded, top)
    used = column < jnp.where(is_replayed, j, k)
    return jnp.where(used, jnp.take_along_axis(probs, experts, axis=-1), 0), experts


def mixture(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: Experts,
    active: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """`sum over k of gates_k * down_e(silu(gate_e x) * up_e x)`, e = experts_k: x [..., D], gates,
    experts [..., k] -> [..., D].

    `active` ([...] bool, None: all are) and `mesh` are those of `expert_outputs`. Results of
    tokens that are not active are meaningless.
    """
    tokens, gates, experts = (a.reshape(-1, a.shape[-1]) for a in (x, gates, experts))
    active = None if active is None else active.reshape(-1)
    rows_NxKxD = expert_outputs(tokens, experts, weights, active, mesh).astype(jnp.float32)
    # Summed in the order of k, which does not depend on the other tokens.
    return jnp.sum(rows_NxKxD * gates[..., None], axis=1).astype(x.dtype).reshape(x.shape)
