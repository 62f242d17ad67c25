"""Complete surrogates of trainer and sampler that are not a policy loss with a correction.

Signature and result are those of what `corrections.decoupled` returns: `(logp, old_logp,
rollout_logp, advantage, mask)` to the unreduced loss, float32 `[..., T]`, 0 outside the mask, and
the mask to reduce it with, bool `[..., T]`. Options go in by `functools.partial`. Where the
sampler's log-probability is not finite, the token counts as without gap. They raise TypeError for
another dtype and ValueError for another shape or a bound that makes no sense.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
Surrogate = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]
stop = jax.lax.stop_gradient


@separable
def adaptive_clip(
    logp: Array,
    old_logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    high: float = 2.0,
) -> tuple[Array, Array]:
    """The clipped surrogate with a clip range that follows the gap of each token (QuRL's adaptive
    clipping range).

    Formula: L = sg(w) max(-r A, -clip(r, 1 - clip_low s, 1 + clip_high s) A), r = exp(logp -
        old_logp), w = min(rho, high), s = clip(rho, 1 / high, high)
    Needs: logp, old_logp, rollout_logp, advantage, mask
    Default: clip_low 0.2, clip_high 0.2, high 2.0
    Paper: QuRL, arXiv 2602.13953

    The paper scales the clip range by the ratio of the exact to the quantized policy. Here that
    ratio multiplies both distances from 1, and its own bounds are those of the truncated weight,
    up and down. At rho = 1 this is `policy.clipped`.
    """
    _arguments.clip_bounds(clip_low, clip_high)
    if not high >= 1:
        raise ValueError(f"high must be at least 1, not {high}")
    logp, old_logp, rollout_logp = _arguments.tokens(
        logp=logp, old_logp=old_logp, rollout_logp=rollout_logp
    )
    rho = jnp.exp(
        _numerics.log_ratio(
            old_logp,
            rollout_logp,
            _numerics.measured(rollout_logp, _arguments.mask(mask, logp)),
        )
    )
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    scale = stop(jnp.clip(rho, 1 / high, high))
    ratio = _numerics.ratio(logp, old_logp)
    clipped = _numerics.bound(ratio, 1 - clip_low * scale, 1 + clip_high * scale)
    loss = jnp.maximum(-ratio * advantage, -clipped * advantage)
    return stop(jnp.minimum(rho, high)) * loss, mask


@separable
def log_linear_proximal(
    logp: Array, rollout_logp: Array, mask: Array, *, alpha: Array | float
) -> Array:
    """Log-probs of a policy between sampler and trainer, which stand in for the trainer's
    recomputed ones without a forward pass; `[..., T]`, detached.

    Formula: sg(rollout_logp + alpha (logp - rollout_logp)); sg(logp) where rollout_logp is not
        finite
    Needs: logp, rollout_logp, mask, alpha in [0, 1]
    Default: alpha must be given; 0 is the sampler, 1 the trainer
    Paper: A-3PO, arXiv 2512.06547, as AReaL has it

    With versions v, alpha = (v_proximal - v_sampler) / (v - v_sampler). One update behind a trainer
    that is d updates ahead of the sampler it is 1 - 1 / d.
    """
    logp, rollout_logp = _arguments.tokens(logp=logp, rollout_logp=rollout_logp)
    mask = _arguments.mask(mask, logp)
    gap = _numerics.difference(logp, rollout_logp, _numerics.measured(rollout_logp, mask))
    return stop(_numerics.select(mask, logp) - (1 - alpha) * gap)


@separable
def log_linear(
    logp: Array,
    old_logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    surrogate: Surrogate,
    alpha: Array | float,
) -> tuple[Array, Array]:
    """A surrogate against the log-linear proximal policy in place of the trainer's recomputation.

    Formula: surrogate(logp, p, rollout_logp, A), p = `log_linear_proximal`; of its correction,
        rho = exp(p - rollout_logp) = (pi_train / pi_rollout)^alpha
    Needs: logp, rollout_logp, advantage, mask (old_logp is not read)
    Default: surrogate and alpha must be given
    Paper: A-3PO, arXiv 2512.06547

    `surrogate` is one that `corrections.decoupled` makes, with a correction such as `tis`.
    """
    _arguments.tokens(logp=logp, old_logp=old_logp)
    proximal = log_linear_proximal(logp, rollout_logp, mask, alpha=alpha)
    return surrogate(logp, proximal, rollout_logp, advantage, mask)
