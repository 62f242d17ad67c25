"""The three parts of a correction: the level, the operator, the denominator.

A level turns the difference of log-probabilities into the log of a ratio R, an operator turns R
into a weight and a decision to keep, a denominator says which tokens are counted.
`corrections.Correction` puts them together and prints the `Formula:` line of each. D_t = old_logp_t
- rollout_logp_t in nats, 0 where the sampler's log-probability is not finite; a level clamps to
+-20 itself, the product of a completion once, after the sum. Bounds are in the ratio pi_train /
pi_rollout. Arrays here are already checked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array


@separable
def token(difference: Array, mask: Array) -> Array:
    """Level: the ratio of each token; returns log R.

    Formula: R_t = exp(clip(D_t, -20, 20))
    Needs: D [..., T], mask
    Default: the level of TIS, MIS and IcePop
    Paper: Yao et al. 2025, fengyao.notion.site/off-policy-rl
    """
    return _numerics.clamped(_numerics.select(mask, difference))


@separable
def sequence(difference: Array, mask: Array) -> Array:
    """Level: the product over the completion, the exact ratio of the trajectory; returns log R,
    `[..., 1]`.

    Formula: R_t = exp(clip(sum_s D_s, -20, 20))
    Needs: D [..., T], mask
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse

    "sequence" in verl, TRL, slime and SkyRL; it grows with length.
    """
    return _numerics.clamped(_numerics.row_sum(difference, mask))


@separable
def geometric(difference: Array, mask: Array) -> Array:
    """Level: the geometric mean over the completion, free of its length; returns log R, `[..., 1]`.

    Formula: R_t = exp(mean_s clip(D_s, -20, 20))
    Needs: D [..., T], mask
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse; GSPO, arXiv 2507.18071

    "sequence" in ms-swift and AReaL.
    """
    return _numerics.row_mean(_numerics.clamped(difference), mask)


@separable
def truncate(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Operator: the ratio up to a bound; returns weight and keep.

    Formula: w_t = min(R_t, high)
    Needs: R, high
    Default: the operator of TIS
    Paper: Ionides 2008, doi 10.1198/106186008X320456
    """
    return jnp.minimum(ratio, jnp.inf if high is None else high), jnp.ones_like(ratio, bool)


@separable
def clip(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Operator: the ratio within two bounds; returns weight and keep.

    Formula: w_t = min(max(R_t, low), high)
    Needs: R, low, high
    Paper: slime, OpenRLHF
    """
    return jnp.clip(ratio, low, high), jnp.ones_like(ratio, bool)


@separable
def keep_inside(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Operator: the ratio inside the bounds, nothing outside (MIS, "mask"); returns weight and
    keep.

    Formula: w_t = R_t, keep_t = low <= R_t <= high
    Needs: R, low or high
    Default: the operator of MIS
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse
    """
    return ratio, _inside(ratio, low, high)


@separable
def zero_outside(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Operator: the ratio inside the bounds, weight 0 outside; the token is still counted (IcePop).

    Formula: w_t = R_t 1[low <= R_t <= high]
    Needs: R, low or high
    Default: the operator of IcePop
    Paper: IcePop, arXiv 2510.18855
    """
    return _numerics.select(_inside(ratio, low, high), ratio), jnp.ones_like(ratio, bool)


@separable
def reject(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Operator: weight 1 inside the bounds, nothing outside (rejection sampling); returns weight
    and keep.

    Formula: w_t = 1, keep_t = low <= R_t <= high
    Needs: R, low or high
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse
    """
    return jnp.ones_like(ratio), _inside(ratio, low, high)


@separable
def original(mask: Array, keep: Array) -> Array:
    """Denominator: the mask before rejection, so that rejecting tokens makes the step smaller.

    Formula: denominator = m
    Needs: mask, keep
    Default: the default
    Paper: slime, TRL, prime-rl, NeMo-RL
    """
    return mask


def surviving(mask: Array, keep: Array) -> Array:
    """Denominator: the mask after rejection, so that the remaining tokens weigh more.

    Formula: denominator = m keep
    Needs: mask, keep
    Paper: verl with decoupled rejection
    """
    return mask & keep


def _inside(ratio: Array, low: float | None, high: float | None) -> Array:
    return (ratio >= (0.0 if low is None else low)) & (ratio <= (jnp.inf if high is None else high))
