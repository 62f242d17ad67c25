"""Per-token policy losses of the current and the behaviour log-probabilities.

Every function takes `(logp, old_logp, advantage, mask)` and returns the unreduced loss, float32
`[..., T]`, last axis tokens, 0 outside the mask; `reduce` turns it into a scalar. `old_logp` holds
the log-probabilities that the ratio is taken against: the trainer's own at the rollout's weights,
or the sampler's under `corrections.bypass`. Log ratios are clamped to +-20 nats; beyond that a
ratio has no gradient, but a log-probability that a detached weight multiplies has. No loss takes
importance weights: the train/rollout factor belongs to `corrections`, once.

Shapes, for all of them: `logp`, `old_logp` float32 `[..., T]` in nats; `advantage` float32,
`[..., T]` per token or `[..., 1]` per completion; `mask` bool, int32 or float32 `[..., T]`. They
raise TypeError for another dtype (bfloat16 log-probabilities among them) and ValueError for another
shape or a bound that makes no sense.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
stop = jax.lax.stop_gradient


@separable
def clipped(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_max: float | None = None,
) -> Array:
    """The clipped surrogate of PPO, GRPO and DAPO, with dual clip.

    Formula: L = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 0.2, clip_high 0.2 (DAPO 0.28; DC-GRPO 0.24 on both sides); dual_clip and
        ratio_max off
    Paper: PPO, arXiv 1707.06347; clip-higher, arXiv 2503.14476; dual clip, arXiv 1912.09729

    Dual clip bounds the loss of a negative advantage: where A < 0, L = min(L, -dual_clip A). verl
    has it on (3.0). `ratio_max` bounds the ratio of the unclipped branch, min(r, ratio_max); TRL
    calls it delta.
    """
    _arguments.clip_bounds(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    if ratio_max is not None and not ratio_max > 1 + clip_high:
        raise ValueError(
            f"ratio_max must be above 1 + clip_high = {1 + clip_high}, not {ratio_max}"
        )
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    ratio = _numerics.ratio(logp, old_logp)
    clipped = _numerics.bound(ratio, 1 - clip_low, 1 + clip_high)
    if ratio_max is not None:
        ratio = jnp.minimum(ratio, ratio_max)
    loss = jnp.maximum(-ratio * advantage, -clipped * advantage)
    if dual_clip is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)
    return loss


@separable
def reinforce(logp: Array, old_logp: Array, advantage: Array, mask: Array) -> Array:
    """The score-function loss: no ratio, so off-policy data needs a correction.

    Formula: L = -A logp
    Needs: logp, advantage, mask (old_logp is not read; it is there for the common signature)
    Paper: Williams 1992, doi 10.1007/BF00992696
    """
    logp, _, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    return -advantage * logp


@separable
def gpg(
    logp: Array, old_logp: Array, advantage: Array, mask: Array, *, alpha: Array | float = 1.0
) -> Array:
    """Group policy gradient: the score-function loss, rescaled for groups that carry no signal.

    Formula: L = -alpha A logp
    Needs: logp, advantage, mask (old_logp is not read; it is there for the common signature)
    Default: alpha 1.0; the paper's is N / (completions of groups with unequal rewards), a global
        count
    Paper: GPG, arXiv 2504.02546

    `advantages.gpg` has the same factor: take it there or here, not in both.
    """
    logp, _, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    return -alpha * advantage * logp


@separable
def cispo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    low: float | None = None,
    high: float = 5.0,
) -> Array:
    """Clipped importance weights on the score function: no token is dropped, its weight is bounded.

    Formula: L = -sg(clip(r, low, high)) A logp, r = exp(logp - old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: low none, high 5.0
    Paper: CISPO (MiniMax-M1), arXiv 2506.13585

    `low` and `high` are bounds on the ratio itself. Three conventions go by this name: verl and
    NeMo-RL write distances below and above 1 (here low=1 - 0.2, high=1 + 0.28), slime one distance
    for both (low=1 - d, high=1 + d), TRL, ms-swift and prime-rl the absolute upper bound alone (the
    default here).
    """
    if low is not None and not 0 <= low <= high:
        raise ValueError(f"low must be between 0 and high = {high}, not {low}")
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    ratio = _numerics.ratio(logp, old_logp)
    return -stop(jnp.clip(ratio, low, high) * advantage) * logp


@separable
def sapo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    positive_temperature: float = 1.0,
    negative_temperature: float = 1.05,
) -> Array:
    """Soft adaptive policy optimisation: a sigmoid gate in place of the clip.

    Formula: L = -A sigmoid(tau (r - 1)) 4 / tau, tau = tau+ where A > 0 else tau-, r = exp(logp -
        old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: tau+ 1.0, tau- 1.05
    Paper: SAPO, arXiv 2511.20347

    Reduced by `sequence_mean_token_mean` in the paper.
    """
    if not (positive_temperature > 0 and negative_temperature > 0):
        raise ValueError("positive_temperature and negative_temperature must be above zero")
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    ratio = _numerics.ratio(logp, old_logp)
    tau = jnp.where(advantage > 0, positive_temperature, negative_temperature)
    return -advantage * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau


@separable
def dppo_tv(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    tv_low: float = 0.2,
    tv_high: float = 0.2,
    ratio_max: float = 20.0,
) -> Array:
    """Divergence PPO with the binary total variation: tokens that left the trust region outward are
    dropped.

    Formula: L = -A sg(min(r, ratio_max)) logp 1[A > 0 ? p - p_old <= tv_high : p - p_old >=
        -tv_low]
    Needs: logp, old_logp, advantage, mask
    Default: tv_low 0.2, tv_high 0.2, ratio_max 20.0 (verl names 20; its default is
        3.0)
    Paper: DPPO, arXiv 2602.04879
    """
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    gap = jnp.exp(stop(logp)) - jnp.exp(old_logp)
    keep = jnp.where(advantage > 0, gap <= tv_high, gap >= -tv_low)
    return _truncated_score(logp, old_logp, advantage, keep, ratio_max)


@separable
def dppo_kl(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    kl_max: float = 0.05,
    ratio_max: float = 20.0,
) -> Array:
    """Divergence PPO with the binary KL: tokens outside the trust region count only on their way
    back in.

    Formula: L = -A sg(min(r, ratio_max)) logp 1[KL <= kl_max or A (p - p_old) <= 0]
    Needs: logp, old_logp, advantage, mask
    Default: kl_max 0.05, ratio_max 20.0
    Paper: DPPO, arXiv 2602.04879

    KL = q log(q / p) + (1 - q) log((1 - q + 1e-8) / (1 - p + 1e-8)), q = p_old, in nats.
    """
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    change = stop(logp) - old_logp
    inward = jnp.where(advantage > 0, change <= 0, change >= 0)
    keep = (_numerics.binary_kl(old_logp, stop(logp)) <= kl_max) | inward
    return _truncated_score(logp, old_logp, advantage, keep, ratio_max)


@separable
def prime_tv(
    logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    tv_low: float = 0.2,
    tv_high: float = 0.2,
    penalty: float = 1e-3,
) -> Array:
    """Binary total-variation masking against the sampler, with a quadratic pull on the log ratio.

    Formula: L = -A e 1[A > 0 ? p - p_rollout <= tv_high : p - p_rollout >= -tv_low] + penalty
        (log e)^2
    Needs: logp, rollout_logp (through `corrections.bypass`), advantage, mask
    Default: tv_low 0.2, tv_high 0.2, penalty 1e-3
    Paper: prime-rl's default loss, after DPPO, arXiv 2602.04879

    e = exp(logp - rollout_logp), differentiated.
    """
    logp, rollout_logp, advantage, mask = _arguments.rollout_policy_loss(
        logp, rollout_logp, advantage, mask
    )
    log_ratio = _numerics.clamped(logp - rollout_logp)
    gap = jnp.exp(stop(logp)) - jnp.exp(rollout_logp)
    keep = jnp.where(advantage > 0, gap <= tv_high, gap >= -tv_low)
    ratio = jnp.exp(jnp.where(keep, log_ratio, -jnp.inf))
    return -advantage * ratio + penalty * jnp.square(log_ratio)


@separable
def spo(
    logp: Array, old_logp: Array, advantage: Array, mask: Array, *, epsilon: float = 0.2
) -> Array:
    """Simple policy optimisation: a quadratic penalty on the ratio in place of the clip.

    Formula: L = -A r + |A| (r - 1)^2 / (2 epsilon), r = exp(logp - old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: epsilon 0.2
    Paper: SPO, arXiv 2401.16025
    """
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    return _quadratic(logp, old_logp, advantage, 1.0, epsilon)


@separable
def drpo(
    logp: Array, rollout_logp: Array, advantage: Array, mask: Array, *, epsilon: float = 12.5
) -> Array:
    """The quadratic penalty weighted by the sampler's probability, so that it bounds |p -
    p_rollout|.

    Formula: L = -A e + |A| p_rollout (e - 1)^2 / (2 epsilon), e = exp(logp - rollout_logp)
    Needs: logp, rollout_logp (through `corrections.bypass`), advantage, mask
    Default: epsilon 12.5
    Paper: DRPO, arXiv 2606.09821

    The gradient's weight on a token is 1 - sign(A (e - 1)) |p - p_rollout| / epsilon. `spo` is this
    with weight 1.
    """
    logp, rollout_logp, advantage, mask = _arguments.rollout_policy_loss(
        logp, rollout_logp, advantage, mask
    )
    return _quadratic(logp, rollout_logp, advantage, jnp.exp(stop(rollout_logp)), epsilon)


@separable
def dro(logp: Array, old_logp: Array, advantage: Array, mask: Array, *, beta: float) -> Array:
    """Direct reward optimisation: the score function with a quadratic pull on the log ratio.

    Formula: L = -(A logp - beta / 2 (logp - old_logp)^2)
    Needs: logp, old_logp, advantage, mask, beta
    Default: beta must be given, above zero
    Paper: DRO, arXiv 2405.19107, in the token form of verl
    """
    if not beta > 0:
        raise ValueError(f"beta must be above zero, not {beta}")
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    return -advantage * logp + 0.5 * beta * jnp.square(_numerics.clamped(logp - old_logp))


@separable
def topr(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> Array:
    """Tapered off-policy REINFORCE: good tokens count fully, bad ones as far as the policy still
    makes them.

    Formula: L = -sg(w) A logp, w = 1 where A > 0 else clip(r, low, high), r = exp(logp - old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: low 0.0, high 1.0
    Paper: TOPR, arXiv 2503.14286, with the ratio per token
    """
    logp, old_logp, advantage, mask = _arguments.policy_loss(logp, old_logp, advantage, mask)
    ratio = _numerics.ratio(logp, old_logp)
    weight = jnp.where(advantage > 0, 1.0, jnp.clip(ratio, low, high))
    return -stop(weight * advantage) * logp


def _truncated_score(
    logp: Array, old_logp: Array, advantage: Array, keep: Array, ratio_max: float
) -> Array:
    log_weight = jnp.minimum(_numerics.clamped(logp - old_logp), math.log(ratio_max))
    # exp last: XLA then stores the weight and not its parts
    weight = jnp.exp(jnp.where(keep, log_weight, -jnp.inf))
    return -stop(weight) * advantage * logp


def _quadratic(
    logp: Array, old_logp: Array, advantage: Array, weight: Array | float, epsilon: float
) -> Array:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above zero, not {epsilon}")
    ratio = _numerics.ratio(logp, old_logp)
    return -advantage * ratio + jnp.abs(advantage) * weight * jnp.square(ratio - 1) / (2 * epsilon)
