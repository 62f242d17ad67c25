"""A step on rows in which completions share their prompt, against a prompt and a row for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcmdp_jax import step, train_state, trainer_scores
from dcmdp_jax.config import Lora, Precision
from dcmdp_jax.losses import centering, kl
from dcmdp_jax.models import lora
from dcmdp_jax.tokens import packing
from support.steps import (
    MOE,
    ONE,
    B,
    G,
    P,
    T,
    assert_close,
    fresh_state,
    make_config,
    make_scored,
)

pytestmark = pytest.mark.full


def apart(batch, scored):
    """The same completions in the same microbatches, with a prompt of its own and a row each."""
    prompts = scored.rollout.prompts
    rows = (*batch.index.shape[:3], P + T)
    tokens = np.zeros(rows, np.int32)
    positions = np.zeros(rows, np.int32)
    ids = np.zeros(rows, np.int32)
    index = np.zeros_like(batch.index)
    replayed = None
    if batch.replayed is not None:
        replayed = np.full((*rows, *batch.replayed.shape[4:]), -1, np.int16)
    for at in np.ndindex(*rows[:3]):
        asked = prompts.lengths[batch.group[at]]
        length = batch.length[at]
        whole = asked + length
        tokens[at][:asked] = prompts.tokens[batch.group[at], :asked]
        tokens[at][asked:whole] = batch.completions[at][:length]
        positions[at][:whole] = np.arange(whole)
        ids[at][:whole] = 1
        predicts = asked - 1 + np.arange(length)
        index[at][:length] = at[2] * (P + T) + predicts
        if replayed is not None:
            packed = batch.replayed[at[:2]].reshape(-1, *batch.replayed.shape[4:])
            replayed[at][predicts] = packed[batch.index[at][:length]]
    return batch._replace(
        tokens=tokens,
        positions=positions,
        segment_ids=ids,
        index=index,
        prefix_ids=None,
        replayed=replayed,
    )


def steps(config, scored, row_length):
    """Log-probs and entropies, and the state and the metrics of a step by an update that is the
    gradient: on shared prompts, and on the same batch apart.
    """
    model = config.model.architecture
    algorithm = dataclasses.replace(config.algorithm, optimizer=lambda algorithm: optax.sgd(1.0))
    config = dataclasses.replace(config, algorithm=algorithm)
    batch = packing.pack(
        scored,
        minibatches=algorithm.minibatches,
        microbatches=algorithm.microbatches,
        row_length=row_length,
        seed=1,
        share_prompts=True,
    )
    state = fresh_state(config, model, ONE)
    if config.model.lora.rank:
        shapes = lora.abstract(config.model.lora, model)
        state = state._replace(params=jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes))
    # weights other than those that are trained, so that the reference penalty is not 0
    state = state._replace(reference=jax.tree.map(lambda w: 1.1 * w, state.reference))

    @jax.jit
    def form(state, batch):
        policy = train_state.policy_params(state, config)
        scores = trainer_scores.score(policy, batch, config, model)
        return scores, *step.constrained_step(state, batch, config=config, model=model)

    results = []
    for each in (batch, apart(batch, scored)):
        results.append(jax.device_get(form(state, each)))
    return batch, results


def with_lengths(asked=None, told=None):
    """The made-up rollout with prompts, completions or both of these lengths."""
    scored = make_scored()
    rollout = scored.rollout
    if asked is not None:
        lengths = np.array(asked, np.int32)
        rollout = rollout._replace(prompts=rollout.prompts._replace(lengths=lengths))
    if told is not None:
        told = np.resize(np.array(told, np.int32), B * G)
        rollout = rollout._replace(lengths=told, text_lengths=told, stopped=told < T)
    return scored._replace(rollout=rollout)


def with_experts():
    """The made-up rollout with two experts of most tokens; the router would choose others."""
    scored = make_scored()
    ids = np.tile(np.arange(4, dtype=np.int32), (B * G, T, MOE.num_layers, 1))
    experts = np.random.default_rng(0).permuted(ids, axis=-1)[..., :2]
    experts[:, ::3] = -1
    return scored._replace(rollout=scored.rollout._replace(experts=experts))


def with_likeliest():
    """The made-up rollout with two likeliest tokens at each place, at made-up log-probs."""
    scored = make_scored()
    rng = np.random.default_rng(0)
    rollout = scored.rollout._replace(
        top_tokens=rng.integers(0, 16, (B * G, T, 2)).astype(np.int32),
        top_logp=rng.normal(-2.5, 0.7, (B * G, T, 2)).astype(np.float32),
    )
    return scored._replace(rollout=rollout)


def of_rollout(config, **options):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **options))


def with_adapters(config):
    source = dataclasses.replace(config.model, lora=Lora(rank=2))
    return dataclasses.replace(config, model=source)


PLAIN = make_config()
LONG = 2 * (P + G * (1 + T))  # two whole groups
CASES = {
    "dense": (PLAIN, make_scored(), LONG),
    "moe": (make_config(MOE), make_scored(), LONG),
    "families cut over rows": (PLAIN, make_scored(), 2 * (P + T)),
    "rows of one longest completion": (PLAIN, make_scored(), P + T),
    "microbatches": (make_config(microbatches=2), make_scored(), LONG),
    "minibatches and epochs": (
        make_config(minibatches=2, microbatches=2, epochs=2),
        make_scored(),
        LONG,
    ),
    "groups cut by microbatches": (make_config(microbatches=8), make_scored(), LONG),
    "prompts of one token": (PLAIN, with_lengths(asked=[1, 5, 1, 3]), LONG),
    "empty completions": (PLAIN, with_lengths(told=[0, 0, 4, 0, 2]), LONG),
    "truncated completions": (PLAIN, with_lengths(told=[T]), LONG),
    "replayed experts": (
        make_config(MOE, replay_routing=True, microbatches=2),
        with_experts(),
        LONG,
    ),
    "likeliest tokens": (
        of_rollout(make_config(surrogate=centering.centred), top_logprobs=2),
        with_likeliest(),
        LONG,
    ),
    "adapters": (with_adapters(make_config(MOE)), make_scored(), LONG),
    "reference": (make_config(reference_penalty=kl.k3, microbatches=2), make_scored(), LONG),
    "entropy bonus": (make_config(entropy_coefficient=0.1), make_scored(), LONG),
    "rounded weights": (
        of_rollout(make_config(MOE, quantize_aware=True), precision=Precision(weights="int8")),
        make_scored(),
        LONG,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_completions_with_a_prompt_each(case):
    """Log-probs and entropies of each token, the loss, the gradient, the dual and the metrics."""
    batch, ((scores, state, metrics), (own_scores, own_state, own_metrics)) = steps(*CASES[case])
    assert batch.prefix_ids.any()
    for found, expected in zip(scores, own_scores):
        assert_close(found[batch.mask], expected[batch.mask], 1e-5)
    assert_close(state, own_state, 1e-5)
    del metrics["gaps"], own_metrics["gaps"]
    assert_close(metrics, own_metrics, 1e-5)
