"""What is trained against what is scored: low-rank adapters of one matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support.adapters
from dcmdp_jax import objective, sharding, step, train_state, trainer_scores
from dcmdp_jax.config import MeshConfig
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
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=1, row_length=24, share_prompts=True
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
    base = make_params()

    def grads(params, frozen, config):
        advantage = objective.group_advantage(batch, config)
        old_logp, _ = trainer_scores.score(base, batch, config, MODEL)
        minibatch = jax.tree.map(
            lambda x: x[0],
            objective.Minibatch(
                batch, old_logp, None, jnp.broadcast_to(advantage, batch.mask.shape)
            ),
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
