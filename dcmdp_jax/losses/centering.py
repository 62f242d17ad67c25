"""Score centering: subtract the score that the sampler expects, on the head of its distribution.

Samples y come from the sampler q, the gradient is of the trainer's p. E_q[f(p/q) grad log p] is
zero for q = p alone; otherwise a constant advantage already moves the policy. That expectation is
known for the k tokens whose probability the sampler reports, and the tail is taken to be
proportional to p. It applies to score-function losses only, and the reported probabilities must be
of the distribution sampled from (same temperature, full-vocabulary mass). `centred` is the
surrogate for an experiment.

Shapes: `logp`, `rollout_logp` `[..., T]` of the sampled tokens; `head_logp`, `head_rollout_logp`
`[..., T, k]` of the sampler's k likeliest tokens, under trainer and sampler; float32 nats. A head
entry whose `head_rollout_logp` is not finite is empty: pad a short list with -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
stop = jax.lax.stop_gradient


@separable
def unweighted(ratio: Array) -> Array:
    """Weight of plain REINFORCE.

    Formula: f(r) = 1
    Needs: ratio p / q
    Default: the default of score_centering
    Paper: Marek & Ryabinin, arXiv 2609.20807
    """
    return jnp.ones_like(ratio)


@separable
def truncated(ratio: Array, high: float = 2.0) -> Array:
    """Weight of truncated importance sampling; `functools.partial(truncated, high=...)` for another
    bound.

    Formula: f(r) = min(r, high)
    Needs: ratio p / q
    Default: high 2.0
    Paper: Marek & Ryabinin, arXiv 2609.20807
    """
    return jnp.minimum(ratio, high)


@separable
def masked(ratio: Array, low: float = 0.5, high: float = 2.0) -> Array:
    """Weight of masked importance sampling.

    Formula: f(r) = r 1[low <= r <= high]
    Needs: ratio p / q
    Default: low 0.5, high 2.0
    Paper: Marek & Ryabinin, arXiv 2609.20807
    """
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def score_centering(
    logp: Array,
    rollout_logp: Array,
    head_logp: Array,
    head_rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    weight: Callable[[Array], Array] = unweighted,
) -> Array:
    """Centred REINFORCE loss per token, `[..., T]`, 0 where not measured.

    Formula: -A (sg(f(r_y)) logp_y - sum_{v in head} sg(q_v f(r_v) - alpha p_v) logp_v), r = p / q;
        alpha = tail f(1 / tail), tail = max(1 - sum q, 1e-6) / max(1 - sum p, 1e-6)
    Needs: logp and head_logp (differentiated), rollout_logp, head_rollout_logp, advantage, mask
    Default: weight unweighted
    Paper: Marek & Ryabinin, arXiv 2609.20807

    With the whole vocabulary for a head the centring is the exact expectation; otherwise it is the
    expectation with the sampler's tail replaced by tail * p. `weight` is a function of the ratio
    such as `truncated` or `masked`. Tokens whose `rollout_logp` is not finite are dropped. Log
    ratios are clipped to +-20. Raises TypeError or ValueError for other dtypes and shapes.
    """
    logp, rollout_logp = _arguments.tokens(logp=logp, rollout_logp=rollout_logp)
    head_logp, head_rollout_logp = _arguments.tokens(
        head_logp=head_logp, head_rollout_logp=head_rollout_logp
    )
    if head_logp.shape[:-1] != logp.shape:
        raise ValueError(f"head_logp has shape {head_logp.shape}; it must be {logp.shape} + (k,)")
    advantage = _arguments.advantage(advantage, logp)
    valid = _numerics.measured(rollout_logp, _arguments.mask(mask, logp))
    head = _numerics.measured(head_rollout_logp, valid[..., None]) & jnp.isfinite(head_logp)

    trainer = _numerics.select(head, head_logp)
    p = _numerics.select(head, jnp.exp(trainer))
    q = _numerics.select(head, jnp.exp(_numerics.select(head, head_rollout_logp)))
    tail = _missing(q) / _missing(p)
    alpha = tail * weight(1.0 / tail)
    head_weight = weight(jnp.exp(_numerics.log_ratio(head_logp, head_rollout_logp, head)))
    centre = jnp.sum(stop(q * head_weight - alpha * p) * trainer, axis=-1)
    own = stop(weight(jnp.exp(_numerics.log_ratio(logp, rollout_logp, valid)))) * _numerics.select(
        valid, logp
    )
    return _numerics.select(valid, -stop(advantage) * (own - centre))


@separable
def centred(
    logp: Array,
    old_logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    top_logp: Array,
    top_rollout_logp: Array,
    weight: Callable[[Array], Array] = unweighted,
) -> tuple[Array, Array]:
    """`score_centering` as a surrogate: the loss, and the mask to reduce it with.

    Formula: L = score_centering, denominator = m
    Needs: logp, rollout_logp, advantage, mask; top_logp and top_rollout_logp [..., T, k], which a
        run with rollout.top_logprobs = k passes
    Default: weight unweighted
    Paper: Marek & Ryabinin, arXiv 2609.20807

    The head are the sampler's k likeliest tokens. old_logp is not read.
    """
    _arguments.tokens(logp=logp, old_logp=old_logp)
    loss = score_centering(
        logp, rollout_logp, top_logp, top_rollout_logp, advantage, mask, weight=weight
    )
    return loss, _arguments.mask(mask, loss)


def _missing(probability: Array) -> Array:
    """Mass outside the head, `[..., T, 1]`, floored against rounding."""
    return jnp.maximum(1.0 - jnp.sum(probability, axis=-1, keepdims=True), 1e-6)
