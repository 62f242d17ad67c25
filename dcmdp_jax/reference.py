"""The reference policy: the penalty that keeps the policy near it, and how it follows the policy.

Where it starts is `algorithm.reference_folder` or the run's starting weights. How it moves is
`algorithm.reference_update`, one of the functions here or your own; None leaves it there. Of a run
that trains adapters it has adapters of its own: a moving average is that of the adapters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax.config import AlgorithmConfig

Update = Callable[[Any, Any, jax.Array], Any]  # (reference, policy, steps taken) -> reference


def ema(decay: float, *, every: int = 1) -> Update:
    """The reference as a moving average of the policy.

    r <- decay r + (1 - decay) policy, after every `every` steps. TRL's `sync_ref_model` has
    1 - decay = 0.6 and every 512.

    Raises ValueError unless 0 <= decay < 1 and every >= 1.
    """
    if not 0 <= decay < 1 or every < 1:
        raise ValueError(
            f"a moving reference needs 0 <= decay < 1 and every >= 1, got {decay} and {every}"
        )
    return functools.partial(_follow, decay=decay, every=every)


def reset_every(steps: int) -> Update:
    """The reference as the policy of the last step whose number is a multiple of `steps` (ProRL,
    arXiv 2505.24864, without its reset of the optimizer).

    Raises ValueError unless steps >= 1.
    """
    return ema(0.0, every=steps)


def _follow(reference: Any, policy: Any, step: jax.Array, *, decay: float, every: int) -> Any:
    is_due = step % every == 0
    return jax.tree.map(
        lambda r, p: jnp.where(is_due, decay * r + (1 - decay) * p, r), reference, policy
    )


def penalty(
    algorithm: AlgorithmConfig,
    logp: jax.Array,
    old_logp: jax.Array,
    ref_logp: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Returns `reference_coefficient` times the reference penalty of each token, [N, T].

    A penalty with a parameter `old_logp`, such as `losses.kl.unbiased`, gets it as its second
    argument.
    """
    function = algorithm.reference_penalty
    takes_old = "old_logp" in inspect.signature(function).parameters
    before = (logp, old_logp) if takes_old else (logp,)
    return algorithm.reference_coefficient * function(*before, ref_logp, mask)
