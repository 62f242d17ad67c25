"""A step on a batch whose tokens come from the weights before the last update and after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import train_state
from dcmdp_jax.losses import advantages
from dcmdp_jax.tokens import packing
from support.steps import (
    MODEL,
    ONE,
    B,
    G,
    T,
    assert_close,
    cached_step,
    fresh_state,
    make_config,
    make_params,
    make_scored,
    row_logp,
    run,
)

pytestmark = pytest.mark.full


def run_in_flight(scored, version, **parts):
    """One step at version 1 of the policy, on tokens of the weights `version` [N, T]: 0 or 1."""
    config = make_config(**parts)
    rollout = dataclasses.replace(
        config.rollout, staleness=1, in_flight=True, server="http://127.0.0.1:1"
    )
    config = dataclasses.replace(config, rollout=rollout)
    scored = scored._replace(rollout=scored.rollout._replace(version=version))
    batch = packing.pack(
        scored,
        minibatches=config.algorithm.minibatches,
        microbatches=config.algorithm.microbatches,
        row_length=config.row_length,
        seed=1,
        draw_groups=config.algorithm.share_prompts,
        share_prompts=config.shares_prompts,
        with_versions=True,
    )
    state = fresh_state(config, MODEL, ONE)
    stale = jax.tree.map(lambda w: 1.2 * w, state.params)
    state = state._replace(step=jnp.int32(1), stale=(stale,))
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
    return cached_step(config, MODEL, ONE)(state, batch)


def test_each_token_is_compared_with_the_weights_that_sampled_it():
    scored = make_scored()
    version = np.random.default_rng(3).integers(0, 2, (B * G, T), np.int32)
    _, metrics = run_in_flight(scored, version)
    params = make_params(MODEL)
    now = row_logp(params, MODEL, scored)
    before = row_logp(jax.tree.map(lambda w: 1.2 * w, params), MODEL, scored)
    old = np.where(version == 1, now, before)
    rollout = scored.rollout
    mask = np.arange(T) < rollout.lengths[:, None]
    delta = np.abs(np.exp(old) - np.exp(rollout.rollout_logp))
    advantage = advantages.grpo(
        scored.reward, np.repeat(np.arange(B, dtype=np.int32), G), num_groups=B
    )
    shaped = np.asarray(advantage)[:, None] - 0.1 * delta
    ratio = np.exp(now - old)
    loss = np.maximum(-ratio * shaped, -np.clip(ratio, 0.8, 1.24) * shaped)
    np.testing.assert_allclose(metrics["loss"], loss[mask].mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["delta_mean"], delta[mask].mean(), atol=1e-6)
    np.testing.assert_allclose(metrics["on_policy_share"], version[mask].mean(), atol=1e-6)
    age = np.abs(np.exp(now) - np.exp(before)) * (version == 0)
    assert age[mask].max() > 0.01 and ratio[mask].max() > 1.05


@pytest.mark.parametrize("parts", [{}, {"microbatches": 4}, {"minibatches": 2, "microbatches": 2}])
def test_tokens_of_the_updated_weights_are_on_policy(parts):
    scored = make_scored()
    state, metrics = run_in_flight(scored, np.ones((B * G, T), np.int32), **parts)
    _, expected, of_one_version = run(make_config(**parts), scored)
    assert_close(state.params, expected.params)
    for name in ("loss", "delta_mean", "entropy"):
        np.testing.assert_allclose(metrics[name], of_one_version[name], atol=1e-6)
