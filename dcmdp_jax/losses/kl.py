"""Per-token estimates of KL(pi || reference) from the log-probabilities of sampled tokens, in nats.

Each takes `(logp, ref_logp, mask)`, float32 `[..., T]` in nats and a bool, int32 or float32 mask,
and returns the unreduced estimate `[..., T]`, 0 outside the mask; x = ref_logp - logp. Value and
gradient are different questions: on samples of pi the gradient of k1 is zero on average, that of k2
is the gradient of KL(pi || reference), that of k3 is the gradient of KL(reference || pi). They
raise TypeError for another dtype (bfloat16 log-probabilities among them) and ValueError for another
shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
stop = jax.lax.stop_gradient


@separable
def k1(logp: Array, ref_logp: Array, mask: Array) -> Array:
    """The log ratio itself: unbiased in value, of either sign.

    Formula: k1 = -x = logp - ref_logp
    Needs: logp, ref_logp, mask
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html
    """
    return -_log_ratio(logp, ref_logp, mask)


@separable
def k2(logp: Array, ref_logp: Array, mask: Array) -> Array:
    """Half the squared log ratio: its gradient is that of KL(pi || reference) on samples of pi.

    Formula: k2 = x^2 / 2
    Needs: logp, ref_logp, mask
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html
    """
    return 0.5 * jnp.square(_log_ratio(logp, ref_logp, mask))


@separable
def k3(logp: Array, ref_logp: Array, mask: Array, *, value_max: float | None = None) -> Array:
    """The low-variance estimate that is never negative while x < 4e8.

    Formula: k3 = exp(clip(x, -20, 20)) - 1 - x, at most value_max where that is given
    Needs: logp, ref_logp, mask
    Default: value_max none, as TRL; verl has 10.0, beyond which the gradient is 0
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300

    Without value_max the slope in logp is 1 where x > 20: descent moves away from the reference.
    Give it where log-probabilities may be masked.
    """
    x = _log_ratio(logp, ref_logp, mask)
    if value_max is not None:
        x = jnp.minimum(x, 20.0)  # or the tail -x would come back under value_max
    inside = jnp.clip(x, -20.0, 20.0)
    value = _numerics.exp_excess(inside) + (inside - x)
    return value if value_max is None else jnp.minimum(value, value_max)


@separable
def k3_k2_gradient(
    logp: Array, ref_logp: Array, mask: Array, *, value_max: float | None = None
) -> Array:
    """The value of k3 with the gradient of k2 (straight-through); verl calls it k3+.

    Formula: sg(k3) + k2 - sg(k2)
    Needs: logp, ref_logp, mask
    Default: value_max none, of k3
    Paper: Tang and Munos, arXiv 2506.09477
    """
    gradient = k2(logp, ref_logp, mask)
    return stop(k3(logp, ref_logp, mask, value_max=value_max)) + gradient - stop(gradient)


@separable
def unbiased(
    logp: Array, old_logp: Array, ref_logp: Array, mask: Array, *, value_max: float | None = None
) -> Array:
    """k3 weighted by the current ratio, which makes value and gradient unbiased on samples of the
    old policy.

    Formula: exp(clip(logp - old_logp, -20, 20)) k3
    Needs: logp, old_logp, ref_logp, mask
    Default: value_max none, of k3
    Paper: DeepSeek-V3.2, arXiv 2512.02556

    The gradient runs through the ratio as well. `old_logp` is that of the policy that sampled.
    """
    logp, old_logp, ref_logp = _arguments.tokens(logp=logp, old_logp=old_logp, ref_logp=ref_logp)
    ratio = jnp.exp(_numerics.log_ratio(logp, old_logp, _arguments.mask(mask, logp)))
    return ratio * k3(logp, ref_logp, mask, value_max=value_max)


def _log_ratio(logp: Array, ref_logp: Array, mask: Array) -> Array:
    logp, ref_logp = _arguments.tokens(logp=logp, ref_logp=ref_logp)
    return _numerics.difference(ref_logp, logp, _arguments.mask(mask, logp))
