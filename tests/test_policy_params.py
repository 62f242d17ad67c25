"""What is trained against what is scored: low-rank adapters of one matrix; and the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support.adapters
from dcmdp_jax import compiled_step, constraint, sharding, step, train_state
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.losses import kl
from dcmdp_jax.tokens import packing
from support.steps import (
    MODEL,
    ONE,
    assert_close,
    fresh_state,
    make_config,
    make_params,
    make_scored,
    run,
)

pytestmark = pytest.mark.full


def adapted(**algorithm):
    return support.adapters.adapted(make_config(**algorithm))


def test_only_the_adapters_are_trained():
    before, state, _ = run(adapted(), make_scored())
    assert set(state.params) == {"down", "up"}
    assert np.abs(state.params["up"]).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)


def test_the_decoder_s_parameters_are_the_sum():
    config = adapted()
    before, state, _ = run(config, make_scored())
    policy = train_state.policy_params(state, config)
    expected = before["embed"] + state.params["down"] @ state.params["up"]
    np.testing.assert_allclose(policy["embed"], expected, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, policy | {"embed": 0}, dict(before) | {"embed": 0})


def test_the_gradient_is_the_chain_rule_s():
    """d loss / d up = down^T (d loss / d embed): by the norm of one update of all parameters."""
    config = adapted()
    state = fresh_state(config, MODEL, ONE)
    batch = packing.pack(make_scored(), minibatches=1, microbatches=1, row_length=24)
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
    base = make_params()

    def grads(params, frozen, config):
        advantage = step.group_advantage(batch, config)
        old_logp, _ = step.score(base, batch, config, MODEL)
        minibatch = jax.tree.map(
            lambda x: x[0],
            step.Minibatch(batch, old_logp, None, jnp.broadcast_to(advantage, batch.mask.shape)),
        )
        return step.gradients(params, frozen, minibatch, jnp.float32(0.1), config, MODEL)[1]

    of_adapters = jax.jit(functools.partial(grads, config=config))(state.params, state.frozen)
    of_all = jax.jit(functools.partial(grads, config=make_config()))(base, ())
    np.testing.assert_allclose(
        of_adapters["up"], state.params["down"].T @ of_all["embed"], atol=2e-6
    )
    np.testing.assert_array_equal(of_adapters["down"], 0)


def test_adapters_are_sampled_from_after_the_updates_that_staleness_allows():
    config = adapted()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, staleness=1))
    before, state, metrics = run(config, make_scored())
    params, version = train_state.sampled_from(state, config)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert version == 0 and state.step == 1 and np.isfinite(metrics["loss"])


def test_microbatches_and_devices_change_nothing():
    config = adapted(microbatches=2)
    _, one, _ = run(adapted(), make_scored())
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    _, split, _ = run(config, make_scored(), mesh)
    assert_close(split.params, one.params, 1e-5)


def test_one_of_the_two_functions_is_refused():
    config = make_config()
    with pytest.raises(ValueError, match="set both or neither"):
        dataclasses.replace(
            config, model=dataclasses.replace(config.model, trainable=support.adapters.adapters)
        )


def half_k3(logp, ref_logp, mask):
    return 0.5 * kl.k3(logp, ref_logp, mask)


def with_reference(penalty=half_k3, **algorithm):
    return make_config(reference_penalty=penalty, **algorithm)


def shifted_reference(config, shift=0.3):
    """A fresh state with a reference that differs from its parameters."""
    state = fresh_state(config, MODEL, ONE)
    reference = jax.tree.map(
        lambda w: w + shift * jnp.sin(jnp.arange(w.size)).reshape(w.shape), state.reference
    )
    return state._replace(reference=reference)


def updated(config, state):
    algorithm = config.algorithm
    batch = packing.pack(
        make_scored(),
        minibatches=algorithm.minibatches,
        microbatches=algorithm.microbatches,
        row_length=24,
        seed=1,
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
    return batch, *compiled_step.compile_step(config, MODEL, ONE)(state, batch)


def test_the_reference_is_the_starting_parameters():
    before, state, _ = run(with_reference(), make_scored())
    jax.tree.map(np.testing.assert_array_equal, state.reference, before)


def test_without_a_penalty_no_reference_is_kept():
    _, state, _ = run(make_config(), make_scored())
    assert state.reference == ()


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_loss_has_the_penalty_against_the_reference(microbatches):
    """Closed form: the difference to the loss without it is the mean of the penalty."""
    config = with_reference(microbatches=microbatches)
    state = shifted_reference(config)
    reference = jax.tree.map(jnp.copy, state.reference)
    params = jax.tree.map(jnp.copy, state.params)
    batch, _, metrics = updated(config, state)
    plain = make_config(microbatches=microbatches)
    _, _, without = updated(plain, fresh_state(plain, MODEL, ONE))
    score = jax.jit(lambda params: step.score(params, batch, config, MODEL)[0])
    x = np.asarray(score(reference) - score(params), np.float64)
    penalty = 0.5 * (np.exp(x) - 1 - x)[batch.mask].mean()
    assert penalty > 1e-3
    np.testing.assert_allclose(metrics["loss"] - without["loss"], penalty, rtol=1e-4)


@pytest.mark.parametrize("parts", [{"microbatches": 4}, {"minibatches": 2, "microbatches": 2}])
def test_a_penalty_pulls_towards_the_reference_in_any_number_of_parts(parts):
    """A penalty alone moves the log-probs towards the reference's, and accumulation adds up."""
    config = with_reference(kl.k2, **parts)
    single = with_reference(kl.k2, minibatches=parts.get("minibatches", 1))
    _, one, _ = updated(single, shifted_reference(single))
    _, many, _ = updated(config, shifted_reference(config))
    assert_close(many.params, one.params)


def test_a_penalty_brings_the_policy_nearer_to_the_reference():
    config = with_reference(lambda *arrays: 10 * kl.k2(*arrays))
    state = shifted_reference(config)
    reference = jax.tree.map(jnp.copy, state.reference)
    start = jax.tree.map(jnp.copy, state.params)
    batch, after, _ = updated(config, state)

    def distance(params):
        logp, _ = step.score(params, batch, config, MODEL)
        ref_logp, _ = step.score(reference, batch, config, MODEL)
        return constraint.measure(
            *(x.reshape(-1, x.shape[-1]) for x in (logp, ref_logp, batch.mask))
        )[0]

    assert jax.jit(distance)(after.params) < 0.9 * jax.jit(distance)(start)
