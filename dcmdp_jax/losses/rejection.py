"""Which tokens to keep, judged by the gap between trainer and sampler.

Every function takes `(old_logp, rollout_logp, mask)`, float32 `[..., T]` in nats and a bool, int32
or float32 mask, and returns keep, bool `[..., T]`, False outside the mask, without gradient; `opsm`
needs more. They fit `corrections.decoupled(..., rejections=(functools.partial(rejection.k3,
high=0.01),))`, which keeps a token when all of them do. D_t = clip(old_logp_t - rollout_logp_t,
-20, 20), 0 where the sampler's log-probability is not finite, so that such a token is never the
reason for a rejection. Bounds are in the ratio rho = pi_train / pi_rollout; verl's k1 bounds are in
its inverse. They raise TypeError for another dtype and ValueError for another shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
Level = Callable[[Array, Array], Array]
stop = jax.lax.stop_gradient


@separable
def each_token(measure: Array, mask: Array) -> Array:
    """Level: every token is judged by itself.

    Formula: z_t = k_t
    Needs: k [..., T], mask
    Default: the level of k1, k2, k3
    Paper: verl (token_k*)
    """
    return _numerics.select(mask, measure)


@separable
def sequence_sum(measure: Array, mask: Array) -> Array:
    """Level: the completion is judged by the sum over its tokens.

    Formula: z = sum_s k_s
    Needs: k [..., T], mask
    Paper: verl (seq_sum_k*)
    """
    return _numerics.row_sum(measure, mask)


@separable
def sequence_mean(measure: Array, mask: Array) -> Array:
    """Level: the completion is judged by the mean over its tokens.

    Formula: z = mean_s k_s
    Needs: k [..., T], mask
    Paper: verl (seq_mean_k*)
    """
    return _numerics.row_mean(measure, mask)


@separable
def sequence_max(measure: Array, mask: Array) -> Array:
    """Level: the completion is judged by its worst token.

    Formula: z = max_s k_s
    Needs: k [..., T], mask
    Paper: verl (seq_max_k*)
    """
    worst = jnp.max(jnp.where(mask, measure, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), worst, 0.0)


@separable
def k1(
    old_logp: Array,
    rollout_logp: Array,
    mask: Array,
    *,
    low: float,
    high: float,
    level: Level = each_token,
) -> Array:
    """Keeps what has its ratio within bounds.

    Formula: keep = low <= exp(level(D)) <= high
    Needs: old_logp, rollout_logp, mask, low, high
    Default: level each_token
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse

    `sequence_sum` is the product of the ratios, clamped once, after the sum of their logs;
    `sequence_mean` is their geometric mean.
    """
    _check_bounds(low, high)
    old_logp, rollout_logp, mask = _detached(old_logp, rollout_logp, mask)
    measured = _numerics.measured(rollout_logp, mask)
    difference = _numerics.difference(old_logp, rollout_logp, measured)
    each = difference if level is sequence_sum else _numerics.clamped(difference)
    ratio = jnp.exp(_numerics.clamped(level(each, measured)))
    return mask & (ratio >= low) & (ratio <= high)


@separable
def k2(
    old_logp: Array, rollout_logp: Array, mask: Array, *, high: float, level: Level = each_token
) -> Array:
    """Keeps what has a small squared log ratio.

    Formula: keep = level(D^2 / 2) <= high
    Needs: old_logp, rollout_logp, mask, high
    Default: level each_token
    Paper: verl (rollout rejection)
    """
    difference, measured, mask = _difference(old_logp, rollout_logp, mask)
    return mask & (level(0.5 * jnp.square(difference), measured) <= high)


@separable
def k3(
    old_logp: Array,
    rollout_logp: Array,
    mask: Array,
    *,
    high: float = 0.01,
    level: Level = each_token,
) -> Array:
    """Keeps what has a small k3 estimate of KL(rollout || train).

    Formula: keep = level(exp(D) - 1 - D) <= high
    Needs: old_logp, rollout_logp, mask
    Default: high 0.01 (verl), level each_token
    Paper: verl (rollout rejection)
    """
    difference, measured, mask = _difference(old_logp, rollout_logp, mask)
    return mask & (level(_numerics.exp_excess(difference), measured) <= high)


@separable
def trust_region(old_logp: Array, rollout_logp: Array, mask: Array, *, threshold: float) -> Array:
    """Trust-region masking: keeps the completion if no token of it left the region.

    Formula: keep = max_s (exp(D_s) - 1 - D_s) <= threshold
    Needs: old_logp, rollout_logp, mask, threshold
    Paper: TRM, arXiv 2512.23075, with the sampled-token estimate of each token's KL
    """
    return k3(old_logp, rollout_logp, mask, high=threshold, level=sequence_max)


@separable
def veto(old_logp: Array, rollout_logp: Array, mask: Array, *, threshold: float = 1e-4) -> Array:
    """Drops the completion if the trainer gives one of its tokens a tiny share of the sampler's
    probability.

    Formula: keep = min_s rho_s >= threshold
    Needs: old_logp, rollout_logp, mask
    Default: threshold 1e-4 (slime); ROLL 1e-3
    Paper: slime (rs_veto_threshold)
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above zero, not {threshold}")
    _check_bounds(threshold, math.inf)
    difference, measured, mask = _difference(old_logp, rollout_logp, mask)
    return mask & (sequence_max(-difference, measured) <= -math.log(threshold))


@separable
def kpop(old_logp: Array, rollout_logp: Array, mask: Array, *, threshold: float = 0.75) -> Array:
    """Keeps tokens whose binary KL is small both ways.

    Formula: keep = KL2(old || rollout) <= threshold and KL2(rollout || old) <= threshold
    Needs: old_logp, rollout_logp, mask
    Default: threshold 0.75 nats (mathematics); 2.0 for logic
    Paper: KPop (Ring team, 2026); the formula is from a summary of it

    KL2(q || p) = q log(q / p) + (1 - q) log((1 - q + 1e-8) / (1 - p + 1e-8)): this token or
    another.
    """
    old_logp, rollout_logp, mask = _detached(old_logp, rollout_logp, mask)
    measured = _numerics.measured(rollout_logp, mask)
    old_logp = _numerics.select(measured, old_logp)
    rollout_logp = _numerics.select(measured, rollout_logp)
    forward = _numerics.binary_kl(old_logp, rollout_logp)
    backward = _numerics.binary_kl(rollout_logp, old_logp)
    return mask & (jnp.maximum(forward, backward) <= threshold)


@separable
def ipo(old_logp: Array, rollout_logp: Array, mask: Array, *, threshold: float = 0.1) -> Array:
    """Keeps tokens whose probability differs little between trainer and sampler.

    Formula: keep = |exp(old_logp) - exp(rollout_logp)| <= threshold
    Needs: old_logp, rollout_logp, mask
    Default: threshold 0.1
    Paper: prime-rl (IPO)
    """
    old_logp, rollout_logp, mask = _detached(old_logp, rollout_logp, mask)
    gap = _numerics.probability_gap(old_logp, rollout_logp, _numerics.measured(rollout_logp, mask))
    return mask & (jnp.abs(gap) <= threshold)


def m2po(old_logp: Array, rollout_logp: Array, mask: Array, *, threshold: float = 0.04) -> Array:
    """Drops the tokens of greatest squared log ratio until the mean square of the rest is small.

    Formula: keep = D^2 <= cut, cut the greatest with mean{D^2 : D^2 <= cut} < threshold
    Needs: old_logp, rollout_logp, mask
    Default: threshold 0.04
    Paper: M2PO, arXiv 2510.01161

    The mean is over the batch given. At least the token of least D^2 is kept. Tokens of equal D^2
    go together. Sorts the batch.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above zero, not {threshold}")
    difference, measured, mask = _difference(old_logp, rollout_logp, mask)
    square = jnp.square(difference)
    ordered = jnp.sort(jnp.where(measured, square, jnp.inf).reshape(-1))
    last_of_ties = ordered < jnp.append(ordered[1:], jnp.inf)
    small_mean = jnp.cumsum(ordered - threshold) < 0
    cut = jnp.max(jnp.where(last_of_ties & small_mean, ordered, ordered[0]))
    return mask & (square <= cut)  # D of an unmeasured token is 0


def opsm(
    logp: Array, rollout_logp: Array, advantage: Array, mask: Array, *, threshold: float = 0.5
) -> Array:
    """Off-policy sequence masking: drops bad completions that the current policy no longer makes.

    Formula: keep_t = A_t >= 0 or mean_s(rollout_logp_s - logp_s) <= threshold
    Needs: logp (current), rollout_logp, advantage, mask
    Default: threshold 0.5 nats per token (TRL); slime 1e-4
    Paper: DeepSeek-V3.2, arXiv 2512.02556

    It reads the current policy, so it multiplies the loss of a surrogate: `jnp.where(keep, loss,
    0)`.
    """
    _arguments.tokens(logp=logp, rollout_logp=rollout_logp)
    difference, measured, mask = _difference(logp, rollout_logp, mask)
    advantage = _arguments.advantage(advantage, difference)
    return mask & ((advantage >= 0) | (sequence_mean(-difference, measured) <= threshold))


def _check_bounds(low: float, high: float) -> None:
    """Raises ValueError if bounds of a ratio make no sense, or if one but 0 and infinity lies where
    log ratios are clamped and it would reject nothing.
    """
    if not 0 <= low <= high:
        raise ValueError(f"bounds must satisfy 0 <= low <= high, not low = {low}, high = {high}")
    for bound in (low, high):
        if 0 < bound < math.inf and abs(math.log(bound)) > 20:
            raise ValueError(
                f"a bound of {bound} would reject nothing: log ratios are clamped to +-20 nats, so "
                "take one between 2.1e-9 and 4.8e8"
            )


def _detached(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array, Array]:
    old_logp, rollout_logp = _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    return stop(old_logp), stop(rollout_logp), _arguments.mask(mask, old_logp)


def _difference(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array, Array]:
    """D, the tokens where it was measured, and the mask."""
    old_logp, rollout_logp, mask = _detached(old_logp, rollout_logp, mask)
    measured = _numerics.measured(rollout_logp, mask)
    return _numerics.log_ratio(old_logp, rollout_logp, measured), measured, mask
