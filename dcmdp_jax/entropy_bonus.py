"""The entropy bonus: a term of the loss that keeps the policy from becoming certain too soon.

    loss - alpha * reduce(entropy)

The entropy is that of the whole distribution at each token, softmax(logits / temperature), and is
differentiated as such. alpha is `algorithm.entropy_coefficient`, or follows
`algorithm.entropy_target`:

    alpha <- clip(alpha + entropy_lr * (entropy_target - mean entropy), 0, entropy_coefficient_max)

which is the dual update of the constraint E[entropy] >= target (SAC, arXiv 1812.05905, whose
temperature is alpha).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import constraint
from dcmdp_jax.config import AlgorithmConfig


def controller(algorithm: AlgorithmConfig) -> constraint.Controller:
    """Returns the controller of alpha. What it is told are costs: entropies times -1."""
    return constraint.projected_ascent(
        algorithm.entropy_lr,
        multiplier_init=algorithm.entropy_coefficient,
        multiplier_max=algorithm.entropy_coefficient_max,
    )


def coefficient(algorithm: AlgorithmConfig, dual: Any) -> jax.Array | None:
    """Returns alpha, from the controller's state `dual` if there is a target; None: no bonus."""
    if algorithm.entropy_target:
        return dual.multiplier
    if algorithm.entropy_coefficient:
        return jnp.float32(algorithm.entropy_coefficient)
    return None


def value(
    algorithm: AlgorithmConfig, alpha: jax.Array, entropy: jax.Array, mask: jax.Array
) -> jax.Array:
    """Returns alpha times the reduced entropies; `entropy` and `mask` are [..., T]."""
    width = mask.shape[-1]
    return alpha * algorithm.reduce(entropy.reshape(-1, width), mask.reshape(-1, width))


def slope(algorithm: AlgorithmConfig, alpha: jax.Array | None, mask: jax.Array) -> jax.Array | None:
    """Returns the gradient of the loss with respect to the entropies, [..., T]: the bonus is linear
    in them. None if there is no bonus.
    """
    if alpha is None:
        return None
    zero = jnp.zeros(mask.shape, jnp.float32)
    return -jax.grad(value, 2)(algorithm, alpha, zero, mask)


def update(algorithm: AlgorithmConfig, dual: Any, entropy: jax.Array, mask: jax.Array) -> Any:
    """Returns the controller's state after a step; () stays if there is no target."""
    if not algorithm.entropy_target:
        return dual
    total = jnp.sum(jnp.where(mask, entropy, 0.0))
    count = jnp.sum(mask, dtype=jnp.float32)
    return controller(algorithm).update(dual, -total, count, -algorithm.entropy_target)
