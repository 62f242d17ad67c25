"""The entropy bonus: its exact gradient in the step, and the coefficient that follows a target."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import compiled_step, entropy_bonus, optimizers, train_state
from dcmdp_jax.losses import reduce
from dcmdp_jax.models import decoder
from support.steps import (
    MODEL,
    B,
    G,
    P,
    T,
    assert_close,
    make_config,
    make_params,
    make_scored,
    run,
)

# plain gradient descent: what the bonus adds to an update is its gradient times the rate
SGD = {"optimizer": optimizers.sgd, "beta1": 0.0, "grad_clip": 0.0}


def mean_entropy(params, scored):
    """Of all trained tokens, from the logits of one unpacked row a completion."""
    rollout = scored.rollout
    rows = np.zeros((B * G, P + T), np.int32)
    starts = np.repeat(rollout.prompts.lengths, G)
    for i, n in enumerate(starts):
        rows[i, :n] = rollout.prompts.tokens[i // G, :n]
        rows[i, n : n + T] = rollout.tokens[i]
    logp = jax.nn.log_softmax(decoder.logits(params, rows, MODEL) / 0.9)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    position = starts[:, None] - 1 + np.arange(T)
    mask = np.arange(T) < rollout.lengths[:, None]
    return jnp.mean(entropy[np.arange(B * G)[:, None], position], where=mask)


@pytest.fixture(scope="module")
def without():
    """A step without a bonus: (parameters, metrics)."""
    _, state, metrics = run(make_config(**SGD), make_scored())
    return state.params, metrics


@pytest.fixture(scope="module")
def in_parts():
    """The same with a bonus of 0.5, of four microbatches."""
    config = make_config(entropy_coefficient=0.5, microbatches=4, **SGD)
    assert compiled_step.in_one_pass(config)
    return run(config, make_scored())[1:]


@pytest.mark.full
def test_the_gradient_is_that_of_the_whole_distribution_s_entropy(without, in_parts):
    gradient = jax.jit(jax.grad(lambda params: mean_entropy(params, make_scored())))(make_params())
    moved = jax.tree.map(jnp.subtract, in_parts[0].params, without[0])
    assert_close(moved, jax.tree.map(lambda g: 1e-2 * 0.5 * g, gradient), 1e-6)
    assert np.abs(moved["embed"]).max() > 1e-4


@pytest.mark.full
def test_the_loss_is_less_by_the_bonus(without, in_parts):
    bonus = 0.5 * without[1]["entropy"]
    np.testing.assert_allclose(in_parts[1]["loss"], without[1]["loss"] - bonus, rtol=1e-5)
    assert in_parts[1]["entropy_coefficient"] == 0.5


@pytest.mark.full
def test_microbatches_change_nothing(in_parts):
    _, whole, _ = run(make_config(entropy_coefficient=0.5, **SGD), make_scored())
    assert_close(in_parts[0].params, whole.params, 1e-6)


@pytest.mark.full
def test_the_coefficient_follows_the_target():
    """alpha <- alpha + entropy_lr (target - mean entropy), and it is in the state."""
    config = make_config(
        entropy_coefficient=0.05, entropy_target=5.0, entropy_lr=0.01, minibatches=2
    )
    _, state, metrics = run(config, make_scored())
    expected = 0.05 + 0.01 * (5.0 - metrics["entropy"])
    np.testing.assert_allclose(state.entropy_dual.multiplier, expected, rtol=1e-5)
    assert metrics["entropy_coefficient"] == np.float32(0.05)


def algorithm(**options):
    return make_config(**options).algorithm


def test_the_coefficient_stays_within_its_bounds():
    options = {"entropy_target": 1.0, "entropy_lr": 10.0, "entropy_coefficient_max": 0.2}
    update = functools.partial(entropy_bonus.update, algorithm(**options))
    start = entropy_bonus.controller(algorithm(**options)).init()
    mask = jnp.ones((2, 3), bool)
    certain = update(start, jnp.zeros((2, 3)), mask)
    assert certain.multiplier == np.float32(0.2)
    assert update(certain, jnp.full((2, 3), 9.0), mask).multiplier == 0


def test_masked_entropies_take_no_part():
    options = algorithm(entropy_target=2.0, entropy_lr=1.0, entropy_coefficient_max=9.0)
    start = entropy_bonus.controller(options).init()
    mask = jnp.array([[True, False]])
    after = entropy_bonus.update(options, start, jnp.array([[0.5, jnp.nan]]), mask)
    assert after.multiplier == 1.5


def test_the_slope_is_the_weight_of_each_token():
    sums = dataclasses.replace(algorithm(), reduce=reduce.token_mean)
    mask = jnp.array([[[True, True, False], [True, False, False]]])
    slope = entropy_bonus.slope(sums, jnp.float32(0.6), mask)
    np.testing.assert_allclose(slope, np.where(mask, -0.2, 0), rtol=1e-6)


def test_without_a_bonus_there_is_no_state_and_no_slope():
    config = make_config()
    state = jax.eval_shape(lambda: train_state.init(config, decoder.init(jax.random.key(0), MODEL)))
    assert state.entropy_dual == ()
    assert entropy_bonus.coefficient(config.algorithm, ()) is None
    assert entropy_bonus.slope(config.algorithm, None, jnp.ones((1, 2), bool)) is None


def test_a_start_above_the_maximum_is_refused():
    with pytest.raises(ValueError, match="entropy_coefficient=0.5, where the coefficient starts"):
        make_config(entropy_coefficient=0.5, entropy_target=1.0)
