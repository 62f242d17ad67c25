"""Both optimizers against optax, over updates one of which is left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcmdp_jax import optimizers, sharding, step
from support.steps import MODEL, make_config, make_scored, run

pytestmark = pytest.mark.full


def rate_of(algorithm):
    return lambda count: (
        algorithm.learning_rate * jnp.minimum(1.0, (count + 1) / (algorithm.lr_warmup_steps + 1))
    )


def optax_adamw(a):
    return optax.adamw(rate_of(a), b1=a.beta1, b2=a.beta2, weight_decay=a.weight_decay)


def optax_sgd(a):
    return optax.chain(
        optax.trace(a.beta1),
        optax.add_decayed_weights(a.weight_decay),
        optax.scale_by_learning_rate(rate_of(a)),
    )


@pytest.mark.parametrize("clip", [1e-3, 1e9])
@pytest.mark.parametrize(
    "optimizer, reference", [(optimizers.adamw, optax_adamw), (optimizers.sgd, optax_sgd)]
)
def test_updates_are_those_of_optax(optimizer, reference, clip):
    """The rate rises over the first three."""
    algorithm = dataclasses.replace(
        make_config().algorithm,
        optimizer=optimizer,
        grad_clip=clip,
        lr_warmup_steps=2,
        weight_decay=0.1,
    )
    reference = optax.chain(optax.clip_by_global_norm(clip), reference(algorithm))
    ours = optimizers.of(algorithm)
    params = expected = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([[0.5]])}
    state = ours.init(params)
    kept = reference.init(params)
    for seed, finite in enumerate([True, True, False, True, True]):
        poison = 0 if finite else jnp.nan
        key = jax.random.key(seed)
        grads = jax.tree.map(
            lambda w, key=key, poison=poison: jax.random.normal(key, w.shape) + poison, params
        )
        params, state = ours.update(
            grads, optax.tree.norm(grads), jnp.asarray(finite), params, state
        )
        if finite:
            updates, kept = reference.update(grads, kept, expected)
            expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)
    assert state.count == 4


def test_plain_sgd_is_optax_sgd():
    """Without weight decay and clipping: m <- beta1 m + g, w <- w - rate m."""
    algorithm = dataclasses.replace(
        make_config().algorithm, optimizer=optimizers.sgd, grad_clip=1e9
    )
    reference = optax.sgd(algorithm.learning_rate, momentum=algorithm.beta1)
    ours = optimizers.of(algorithm)
    params = expected = {"a": jnp.array([1.0, -2.0, 3.0])}
    state = ours.init(params)
    kept = reference.init(params)
    for seed in range(3):
        grads = {"a": jax.random.normal(jax.random.key(seed), (3,))}
        params, state = ours.update(grads, optax.tree.norm(grads), jnp.asarray(True), params, state)
        updates, kept = reference.update(grads, kept, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.sgd])
def test_a_clip_of_0_is_no_clip(optimizer):
    params = {"a": jnp.array([1.0, -2.0])}
    grads = {"a": jnp.array([30.0, 40.0])}

    def moved(clip):
        plain = make_config().algorithm
        algorithm = dataclasses.replace(plain, optimizer=optimizer, grad_clip=clip)
        ours = optimizers.of(algorithm)
        norm = optax.tree.norm(grads)
        return ours.update(grads, norm, jnp.asarray(True), params, ours.init(params))

    jax.tree.map(np.testing.assert_array_equal, moved(0.0), moved(1e9))
    (_, none), (_, clipped) = moved(0.0), moved(1.0)
    np.testing.assert_allclose(none[1]["a"], 50 * clipped[1]["a"], rtol=1e-6)  # the norm is 50


def test_a_step_of_sgd_follows_the_gradient_s_norm():
    """One update from rest moves the parameters by rate * the gradient's norm; the state holds no
    second moment.
    """
    config = make_config(optimizer=optimizers.sgd, grad_clip=1e9)
    before, state, metrics = run(config, make_scored())
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))
    assert metrics["grad_norm"] > 0.01
    np.testing.assert_allclose(
        moved, config.algorithm.learning_rate * metrics["grad_norm"], rtol=1e-4
    )
    place = step.state_shardings(config, MODEL, sharding.single_device_mesh())
    assert state.opt_state._fields == ("count", "m") and jax.tree.structure(
        place
    ) == jax.tree.structure(state)


def test_adamw_is_what_an_experiment_gets():
    assert make_config().algorithm.optimizer is None
    state = optimizers.of(make_config().algorithm).init({"a": jnp.ones(3)})
    assert state._fields == ("count", "mu", "nu")
