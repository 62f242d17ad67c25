"""Routing replay for Mixture-of-Experts: train through the experts the sampler used.

Two programs that disagree in the last bits of a router's logits send a token to different experts,
and its log-probability jumps. Replay takes the recorded expert ids as given and recomputes the gate
on them, so that the choice is the sampler's and the gradient still runs through the gate. Ids are
int32 `[..., k]`, `logits` float32 `[..., E]` over the same tokens (and layers). -1, or any id
outside [0, E), marks a token without a record, which is routed by its own top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics

Array = jax.Array


class Flips(NamedTuple):
    """How often trainer and sampler choose different experts; float32."""

    per_layer: Array  # [L], share of recorded tokens whose expert set differs
    # [], share of tokens recorded in every layer whose set differs in at least one
    any_layer: Array
    missing: Array  # [], share of (layer, token) pairs without a record


def replay_ids(logits: Array, recorded_ids: Array) -> Array:
    """The experts to use: the recorded ones, or the token's own top-k where any is missing; int32
    `[..., k]`.

    Formula: ids = recorded if all recorded in [0, E) else top_k(logits)
    Needs: logits [..., E], recorded_ids int32 [..., k]
    Paper: R3 (rollout routing replay), arXiv 2510.11370
    """
    logits, recorded_ids = _checked(logits, recorded_ids)
    own = jax.lax.top_k(logits, recorded_ids.shape[-1])[1]
    return jnp.where(_recorded(logits, recorded_ids), recorded_ids, own)


def replay_weights(logits: Array, ids: Array, *, normalize: bool = True) -> Array:
    """Gate weights on given experts, float32 `[..., k]`; differentiable in the logits, not in the
    choice.

    Formula: normalize: softmax over the chosen logits; else softmax over all E, then the chosen
        entries
    Needs: logits [..., E], ids int32 [..., k] in [0, E), as `replay_ids` returns
    Default: normalize True (norm_topk_prob of Qwen3-MoE)
    Paper: R3, arXiv 2510.11370
    """
    logits, ids = _checked(logits, ids)
    scores = logits if normalize else jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    return jax.nn.softmax(chosen, axis=-1) if normalize else jnp.exp(chosen)


def flips(logits: Array, recorded_ids: Array, mask: Array) -> Flips:
    """Share of tokens that trainer and sampler route to different sets of experts.

    Formula: mean over recorded tokens of 1[set(top_k(logits)) != set(recorded)]
    Needs: logits [L, N, T, E], recorded_ids int32 [L, N, T, k], mask [N, T]
    Paper: R3, arXiv 2510.11370, which finds 10 % per router and 94 % of tokens in at least one
        layer
    """
    logits, recorded_ids = _checked(logits, recorded_ids)
    mask = jnp.broadcast_to(_arguments.mask(mask, logits[0, ..., 0]), logits.shape[:-1])
    recorded = mask & _recorded(logits, recorded_ids)[..., 0]
    own = jax.lax.top_k(_numerics.select(mask[..., None], logits), recorded_ids.shape[-1])[1]
    differs = recorded & jnp.any(jnp.sort(own, axis=-1) != jnp.sort(recorded_ids, axis=-1), axis=-1)
    complete = jnp.all(recorded, axis=0)
    tokens = tuple(range(1, mask.ndim))
    return Flips(
        per_layer=_share(differs, recorded, tokens),
        any_layer=_share(complete & jnp.any(differs, axis=0), complete, None),
        missing=_share(mask & ~recorded, mask, None),
    )


def _checked(logits: Array, ids: Array) -> tuple[Array, Array]:
    (logits,) = _arguments.tokens(logits=logits)
    if getattr(ids, "dtype", None) != jnp.int32:
        raise TypeError("expert ids must be an int32 array; cast them with .astype('int32')")
    if ids.shape[:-1] != logits.shape[:-1] or ids.shape[-1] > logits.shape[-1]:
        raise ValueError(
            f"expert ids have shape {ids.shape}; they must be {logits.shape[:-1]} + (k,), k <= E"
        )
    return logits, jnp.asarray(ids)


def _recorded(logits: Array, ids: Array) -> Array:
    return jnp.all((ids >= 0) & (ids < logits.shape[-1]), axis=-1, keepdims=True)


def _share(hit: Array, counted: Array, axis: int | tuple[int, ...] | None) -> Array:
    return jnp.sum(hit, axis=axis) / jnp.maximum(jnp.sum(counted, axis=axis), 1).astype(jnp.float32)
