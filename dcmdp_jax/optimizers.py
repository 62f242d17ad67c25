"""The optimizers that experiments name, as optax transformations.

`AlgorithmConfig.optimizer` may be any function of the configuration that returns an
`optax.GradientTransformation`. The step clips gradients by their norm before the optimizer sees
them, and leaves out updates that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax.config import AlgorithmConfig
from dcmdp_jax.models import decoder

OptState = Any
Mask = Callable[[Any], Any]  # (params) -> the same tree of booleans
# What `matrices` leaves out; a bias is named after its projection.
NOT_MATRICES = ("embed", "head", "final_norm", "scale")


def from_config(config: AlgorithmConfig) -> optax.GradientTransformation:
    """Returns the experiment's optimizer: `adamw` if it names none."""
    return (config.optimizer or adamw)(config)


def adamw(config: AlgorithmConfig, *, mask: Mask | None = None) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101).

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    w <- w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + 1e-8) + weight_decay w)

    Args:
        mask: says which parameters decay, such as `matrices`; None: all of them.
    """
    return optax.adamw(
        learning_rate(config),
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=mask,
    )


def sgd(config: AlgorithmConfig, *, mask: Mask | None = None) -> optax.GradientTransformation:
    """Stochastic gradient descent with heavy-ball momentum.

    m <- beta1 m + g,    w <- w - rate (m + weight_decay w)

    There are no second moments, so an update is linear in the gradients. beta2 is not used. A rate
    that suits AdamW is far too small here. `mask` as in `adamw`.
    """
    return optax.chain(
        optax.trace(config.beta1),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def muon(config: AlgorithmConfig) -> optax.GradientTransformation:
    """Muon (optax's) for projections and experts, AdamW for all other parameters.

    m <- beta1 m + g,    w <- w - rate (0.2 sqrt(max(inputs, outputs)) U V^T + weight_decay w)

    U V^T is the orthogonal factor of the matrix that `muon_dimensions` makes of m, with Nesterov's
    look-ahead. The scale gives an update AdamW's typical size (arXiv 2502.16982), so rates that
    suit AdamW suit it.
    """
    return optax.contrib.muon(
        learning_rate(config),
        beta=config.beta1,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )


def muon_dimensions(params: Any) -> Any:
    """Returns the tree of `params` with Muon's matrix for each projection or expert, else None.

    Its rows are the axes that the decoder contracts and its columns the axes that this makes. Axes
    before them (layers, experts) count matrices. A tree of adapters has no such parameter: all of
    it is AdamW's.
    """

    def dimensions(path: tuple, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        rows = decoder.CONTRACTED.get(getattr(path[-1], "key", None))
        if rows is None:
            return None
        columns = tuple(axis for axis in range(min(rows), 0) if axis not in rows)
        return optax.contrib.MuonDimensionNumbers(rows, columns)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def matrices(params: Any) -> Any:
    """Returns the tree of `params` with False for scales of norms, biases, embedding and head, and
    True for the others: a mask of what decays.

    For example `optimizer=functools.partial(optimizers.adamw, mask=optimizers.matrices)`.
    """

    def is_matrix(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return not any(name in NOT_MATRICES or name.endswith("_bias") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def learning_rate(config: AlgorithmConfig) -> optax.Schedule:
    """Returns the schedule of the optimizers here: a linear rise over the first `lr_warmup_steps`
    updates, then constant; times `schedule`, if the experiment has one.
    """

    def rate(count):
        rate = config.learning_rate * jnp.minimum(1.0, (count + 1) / (config.lr_warmup_steps + 1))
        return rate * config.schedule(count) if config.schedule else rate

    return rate


def map_param_like(tree: Any, like: Any, values: Any, default: Any) -> Any:
    """Returns `tree` with each array replaced by a value, that of the parameter it belongs to.

    If an array has the shape of one of `like`, and its path in the tree ends with the other's path,
    the value is that array's entry of `values`; otherwise it is `default`. The path
    `[0].mu["head"]` in an optimizer's state, for example, ends with the parameter's `["head"]`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(like)
    entries = {
        (path, leaf.shape): value
        for (path, leaf), value in zip(leaves, jax.tree.leaves(values), strict=True)
    }

    def entry(path: tuple, leaf: Any) -> Any:
        ends = [(path[start:], leaf.shape) for start in range(len(path) + 1)]
        return next((entries[end] for end in ends if end in entries), default)

    return jax.tree_util.tree_map_with_path(entry, tree)


def moments_to(memory: jax.memory.Space, opt_state: OptState, params: Any) -> OptState:
    """Moves the arrays of an optimizer's state that are shaped like parameters."""
    is_moment = map_param_like(opt_state, params, jax.tree.map(lambda _: True, params), False)
    return jax.tree.map(
        lambda x, moves: jax.device_put(x, memory) if moves else x, opt_state, is_moment
    )
