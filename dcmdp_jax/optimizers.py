"""From a gradient to new parameters. An experiment passes one of the functions that return an
`Optimizer`.

Both clip the gradient by its norm (not where `grad_clip` is 0), raise the rate linearly over the
first `lr_warmup_steps` updates, and leave out an update that is not finite. Every donated array is
changed in one pass, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax.config import AlgorithmConfig


class Optimizer(NamedTuple):
    """Pure functions: `init(params) -> state`, `update(grads, norm, finite, params, state) ->
    params, state`.

    A state is a count of updates and trees shaped like the parameters.
    """

    init: Callable[[Any], NamedTuple]
    update: Callable[..., tuple[Any, NamedTuple]]


class Velocity(NamedTuple):
    """State of `sgd`."""

    count: jax.Array  # [] int32, updates made
    m: Any  # as the parameters


def of(config: AlgorithmConfig) -> Optimizer:
    """The experiment's optimizer; `adamw` where it names none."""
    return (config.optimizer or adamw)(config)


def adamw(config: AlgorithmConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101).

    g <- g min(1, grad_clip / norm),    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 -
    beta2) g^2
    w <- w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + 1e-8) + weight_decay w)
    """

    def init(params):
        return optax.ScaleByAdamState(
            jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        )

    return Optimizer(init, partial(_adamw, config=config))


def sgd(config: AlgorithmConfig) -> Optimizer:
    """Stochastic gradient descent with heavy-ball momentum: no second moments, so that a step is
    linear in the gradients.

        g <- g min(1, grad_clip / norm),    m <- beta1 m + g,    w <- w - rate (m + weight_decay w)

    beta2 is not used. A rate that suits AdamW is far too small here.
    """

    def init(params):
        return Velocity(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    return Optimizer(init, partial(_sgd, config=config))


def _clip(norm: jax.Array, config: AlgorithmConfig) -> jax.Array | float:
    """What the gradient is multiplied by."""
    return jnp.minimum(1.0, config.grad_clip / norm) if config.grad_clip else 1.0


def _rate(count: jax.Array, config: AlgorithmConfig) -> jax.Array:
    return config.learning_rate * jnp.minimum(1.0, count / (config.lr_warmup_steps + 1))


def _adamw(
    grads: Any,
    norm: jax.Array,
    finite: jax.Array,
    params: Any,
    state: optax.ScaleByAdamState,
    *,
    config: AlgorithmConfig,
) -> tuple[Any, optax.ScaleByAdamState]:
    scale = _clip(norm, config)
    count = state.count + finite
    rate = _rate(count, config)
    unbias1, unbias2 = (
        1 / (1 - beta ** jnp.maximum(count, 1)) for beta in (config.beta1, config.beta2)
    )

    def moment(beta, power):
        return lambda m, g: jnp.where(finite, beta * m + (1 - beta) * (g * scale) ** power, m)

    # Without the barrier the moments are made once more with the parameters, from copies of what
    # they were.
    mu, nu = jax.lax.optimization_barrier(
        (
            jax.tree.map(moment(config.beta1, 1), state.mu, grads),
            jax.tree.map(moment(config.beta2, 2), state.nu, grads),
        )
    )

    def moved(w, m, v):
        step = m * unbias1 / (jnp.sqrt(v * unbias2) + 1e-8) + config.weight_decay * w
        return jnp.where(finite, w - rate * step, w)

    return jax.tree.map(moved, params, mu, nu), optax.ScaleByAdamState(count, mu, nu)


def _sgd(
    grads: Any,
    norm: jax.Array,
    finite: jax.Array,
    params: Any,
    state: Velocity,
    *,
    config: AlgorithmConfig,
) -> tuple[Any, Velocity]:
    scale = _clip(norm, config)
    count = state.count + finite
    rate = _rate(count, config)
    m = jax.lax.optimization_barrier(
        jax.tree.map(
            lambda m, g: jnp.where(finite, config.beta1 * m + g * scale, m), state.m, grads
        )
    )
    params = jax.tree.map(
        lambda w, m: jnp.where(finite, w - rate * (m + config.weight_decay * w), w), params, m
    )
    return params, Velocity(count, m)
