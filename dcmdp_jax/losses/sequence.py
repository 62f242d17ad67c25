"""Policy losses whose ratio belongs to the whole completion.

Signature and shapes are those of `policy`. The result is per token all the same, float32 `[...,
T]`, 0 outside the mask, such that `reduce.sequence_mean_token_mean` of it is the published value
and gradient: each token of a row carries the row's loss. `advantage` is one value per
completion, `[..., 1]` or the same on all its tokens.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
stop = jax.lax.stop_gradient
_LOG_RATIO_MAX = 10.0  # nats


@separable
def gspo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Array:
    """Group sequence policy optimisation: the clipped surrogate of the length-normalised sequence
    ratio.

    Formula: L = max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(min(mean_t(d), 10)),
        d = clip(logp - old_logp, -20, 20), A = mean_t(advantage)
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 3e-4, clip_high 4e-4
    Paper: GSPO, arXiv 2507.18071

    Reduced by `reduce.sequence_mean_token_sum` it is LUSPO (arXiv 2602.05261).
    """
    _arguments.clip_bounds(clip_low, clip_high)
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    log_ratio = _numerics.row_mean(_numerics.clamped(logp - old_logp), mask)
    ratio = jnp.exp(jnp.minimum(log_ratio, _LOG_RATIO_MAX))
    clipped = _numerics.bound(ratio, 1 - clip_low, 1 + clip_high)
    advantage = _numerics.row_mean(advantage, mask)
    loss = jnp.maximum(-ratio * advantage, -clipped * advantage)
    return _numerics.select(mask, jnp.broadcast_to(loss, mask.shape))


@separable
def gspo_token(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Array:
    """GSPO with an advantage per token: the sequence ratio in value, each token's own gradient.

    Formula: as `gspo` with s_t = exp(min(sg(mean_t(d)) + logp_t - sg(logp_t), 10))
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 3e-4, clip_high 4e-4
    Paper: GSPO, arXiv 2507.18071

    Equal to `gspo` in value and gradient where the advantage is constant over the completion and no
    log ratio lies beyond 20 nats. This is the form verl, TRL and Tunix run under the name GSPO.
    """
    _arguments.clip_bounds(clip_low, clip_high)
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    log_ratio = stop(_numerics.row_mean(_numerics.clamped(logp - old_logp), mask))
    log_ratio += logp - stop(logp)  # 0, with the gradient of the token
    ratio = jnp.exp(jnp.minimum(log_ratio, _LOG_RATIO_MAX))
    clipped = _numerics.bound(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.maximum(-ratio * advantage, -clipped * advantage)


@separable
def tbpo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    dual_clip: float,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Array:
    """Trust-band policy optimisation: GSPO with a second clip of completions of negative advantage,
    whose ratio is thus kept in a band.

    Formula: L = max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A), and min(L, -dual_clip A) where
        A < 0; s and A as in `gspo`
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 3e-4, clip_high 4e-4, those of `gspo`; dual_clip must be given, above 1
    Paper: TBPO (QaRL), arXiv 2604.07853

    A bad completion has a gradient while 1 - clip_low <= s <= dual_clip: above it the policy makes
    the completion so much more often than the sampler that its loss would dominate the batch. The
    paper's ratio is of the sequence; the length-normalised one is the choice made here.
    """
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    loss = gspo(logp, old_logp, advantage, mask, clip_low=clip_low, clip_high=clip_high)
    *_, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    advantage = _numerics.row_mean(advantage, mask)
    bounded = jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)
    return _numerics.select(mask, bounded)


@separable
def gmpo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Array:
    """Geometric-mean policy optimisation: token log ratios are clipped, then averaged.

    Formula: L = -mean_t(A) exp(mean_t(x)), x = s min(s d, s clip(d, -clip_low, clip_high)),
        d = clip(logp - old_logp, -20, 20), s = sign(A)
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 0.4, clip_high 0.4, in nats
    Paper: GMPO, arXiv 2507.20673

    verl averages over all rows, empty ones included: pass count = N to the reducer for its value.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError("clip_low and clip_high must be at least 0, in nats")
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    sign = jnp.sign(advantage)
    log_ratio = _numerics.clamped(logp - old_logp)
    clipped = sign * jnp.minimum(sign * log_ratio, sign * jnp.clip(log_ratio, -clip_low, clip_high))
    loss = -_numerics.row_mean(advantage, mask) * jnp.exp(_numerics.row_mean(clipped, mask))
    return _numerics.select(mask, jnp.broadcast_to(loss, mask.shape))


@separable
def vespo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Array:
    """Score function under a smooth gate of the sequence ratio, greatest near ratio 1.

    Formula: L = -sg(phi) A logp, phi = exp(lam + k log w - lam w), log w = clip(sum_t(logp -
        old_logp), log 1e-8, 20)
    Needs: logp, old_logp, advantage, mask
    Default: (k, lam) = (2, 3) where A >= 0, (3, 2) where A < 0
    Paper: VESPO, arXiv 2602.10693

    TRL folds the train/rollout factor into log w; here it stays with `corrections`.
    """
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    log_weight = jnp.clip(_numerics.row_sum(logp - old_logp, mask), math.log(1e-8), 20.0)
    power = jnp.where(advantage >= 0, positive[0], negative[0])
    decay = jnp.where(advantage >= 0, positive[1], negative[1])
    gate = jnp.exp(decay + power * log_weight - decay * jnp.exp(log_weight))
    return -stop(gate * advantage) * logp
