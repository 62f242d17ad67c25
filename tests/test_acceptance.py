"""An update is kept or undone by the batch that its weights sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import reference, train_state
from dcmdp_jax.losses import kl
from dcmdp_jax.run import inputs
from dcmdp_jax.tokens import packing
from support.steps import MODEL, ONE, B, G, cached_step, fresh_state, make_config, make_scored

TINY = dataclasses.replace(MODEL, num_layers=1)


def states(accept, count, **algorithm):
    """The states before and after each of `count` steps, and what the steps say of acceptance."""
    config = make_config(TINY, accept=accept, **algorithm)
    shardings = train_state.batch_shardings(config, ONE)
    state = fresh_state(config, TINY, ONE)
    seen = [jax.device_get(state)]
    accepted = []
    for number in range(count):
        batch = packing.pack(
            make_scored(reward=np.random.default_rng(number).normal(size=B * G)),
            minibatches=config.algorithm.minibatches,
            microbatches=1,
            row_length=24,
            share_prompts=True,
        )
        batch = jax.device_put(batch, shardings)
        state, metrics = cached_step(config, config.model.architecture, ONE)(state, batch)
        seen.append(jax.device_get(state))
        accepted.append(float(metrics.get("accepted", 1.0)))
    return seen, accepted


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def never(old_logp, rollout_logp, advantage, mask):
    return jnp.bool_(False)


def always(old_logp, rollout_logp, advantage, mask):
    return jnp.bool_(True)


@pytest.mark.full
@pytest.mark.parametrize(
    "parts",
    [
        {"reference_penalty": kl.k3, "reference_update": reference.reset_every(1)},
        {"minibatches": 2},
    ],
    ids=["one pass, a reference that follows", "two updates"],
)
def test_a_refused_update_is_undone_and_the_next_batch_trains(parts):
    seen, accepted = states(never, 3, **parts)
    assert accepted == [1.0, 0.0, 1.0]
    first, updated, undone, again = seen
    assert any(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), first.params, updated.params))
    )
    same(undone.params, first.params)
    same(undone.opt_state, first.opt_state)
    if "reference_update" in parts:
        same(undone.reference, undone.params)
    assert undone.step == 2, "the step counts"
    assert any(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), again.params, first.params))
    )


@pytest.mark.full
def test_accepted_updates_are_those_of_a_run_without_the_test():
    judged, accepted = states(always, 2)
    plain, _ = states(None, 2)
    assert accepted == [1.0, 1.0]
    for one, other in zip(judged, plain, strict=True):
        same(one.params, other.params)
        same(one.opt_state, other.opt_state)


def test_it_needs_the_weights_that_sampled():
    config = make_config(TINY, accept=always)
    stale = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, staleness=1))
    with pytest.raises(ValueError, match="^algorithm.accept judges a step by the next batch"):
        inputs.check(stale, TINY, ONE, ONE, 1)
