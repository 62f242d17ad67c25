"""The sampler's likeliest tokens: reported by the engine, scored by the trainer, and centred on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import optimizers, sharding, train_state
from dcmdp_jax.batches import check_rollout
from dcmdp_jax.config import MeshConfig, Precision, WarmupConfig
from dcmdp_jax.losses import centering, corrections, policy, reduce
from dcmdp_jax.models import decoder, derived, engine_formats, scoring
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.run import inputs, pairs, supervised
from dcmdp_jax.tokens import packing
from support import engines, steps, training
from support.engines import DENSE, MOE

K = 5


def with_top(model, temperature=0.8):
    """What `engines.sample` samples, by an engine that reports the K likeliest tokens."""
    return rollout(
        engines.make_engine(model, top_logprobs=K),
        engines.make_weights(model),
        engines.make_prompts(),
        samples=engines.G,
        key=jax.random.key(1),
        max_tokens=engines.T,
        sampling=Sampling(temperature),
    )


@pytest.mark.full
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_the_engine_reports_the_likeliest_tokens_of_the_forward_pass(model):
    out = with_top(model)
    np.testing.assert_array_equal(out.tokens, engines.sample(model).tokens)
    for i, (exact, _, _) in enumerate(engines.scored(model, out, 0.8)):
        n = out.lengths[i]
        reported = np.take_along_axis(exact, out.top_tokens[i, :n], axis=-1)
        np.testing.assert_allclose(out.top_logp[i, :n], reported, atol=1e-5)
        np.testing.assert_allclose(reported, np.sort(exact, axis=-1)[:, : -K - 1 : -1], atol=1e-5)
        assert np.isneginf(out.top_logp[i, n:]).all()


def test_an_engine_that_is_not_asked_reports_none():
    out = engines.sample(DENSE)
    assert out.top_tokens is None and out.top_logp is None


TINY = dataclasses.replace(steps.MODEL, num_layers=1)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 6)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
SEGMENTS = np.ones((2, 6), np.int32)
INDEX = np.int32([[1, 2, 3, 4], [7, 8, 9, 10]])
CANDIDATES = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 4, 3)).astype(np.int32)


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gathered", [1 << 26, 70])
def test_candidates_are_scored_as_by_the_whole_softmax(tied, gathered):
    """Values, and the gradient of a sum of them, whether rows are gathered at once or in parts."""
    model = dataclasses.replace(TINY, tie_word_embeddings=tied)
    params = steps.make_params(model)

    def value(logp, top):
        return jnp.sum(jnp.sin(top)) + jnp.sum(logp), (logp, top)

    def packed(params):
        logp, _, top = scoring.packed_top_logp(
            params,
            TOKENS,
            POSITIONS,
            SEGMENTS,
            INDEX,
            CANDIDATES,
            model,
            0.7,
            gathered=gathered,
        )
        return value(logp, top)

    def plain(params):
        logp = jax.nn.log_softmax(decoder.logits(params, TOKENS, model) / 0.7)[:, 1:5]
        sampled = jnp.take_along_axis(logp, TOKENS[:, 2:, None], axis=-1)[..., 0]
        return value(sampled, jnp.take_along_axis(logp, CANDIDATES, axis=-1))

    grads, values = jax.jit(jax.grad(packed, has_aux=True))(params)
    wanted_grads, wanted = jax.jit(jax.grad(plain, has_aux=True))(params)
    steps.assert_close(values, wanted, 1e-5)
    steps.assert_close(grads, wanted_grads)


def test_candidates_are_scored_by_a_tied_head_that_is_rounded_by_itself():
    model = dataclasses.replace(TINY, tie_word_embeddings=True)
    params = steps.make_params(model)
    params = engine_formats.straight_through(params, model, Precision(head="int4"))
    logp, _, top = scoring.packed_top_logp(
        params, TOKENS, POSITIONS, SEGMENTS, INDEX, CANDIDATES, model, 0.7
    )
    plain = jax.nn.log_softmax(decoder.logits(derived.arrays(params), TOKENS, model) / 0.7)
    wanted = jnp.take_along_axis(plain[:, 1:5], CANDIDATES, axis=-1)
    np.testing.assert_allclose(top, wanted, atol=1e-5)


def config_with_top(k, weight=centering.unweighted, **algorithm):
    surrogate = functools.partial(centering.centred, weight=weight)
    config = steps.make_config(
        TINY, surrogate, optimizer=optimizers.sgd, beta1=0.0, grad_clip=0.0, **algorithm
    )
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, top_logprobs=k),
        constraint=dataclasses.replace(config.constraint, shaping=None),
    )


def with_whole_vocabulary(scored):
    """Reports a made-up distribution over all tokens, in an order of its own at each place."""
    rng = np.random.default_rng(3)
    size = (*scored.rollout.tokens.shape, TINY.vocab_size)
    order = rng.permuted(np.broadcast_to(np.arange(TINY.vocab_size), size), axis=-1)
    q = rng.dirichlet(np.ones(TINY.vocab_size), size[:-1])
    logp = np.float32(np.log(np.take_along_axis(q, order, axis=-1)))
    reported = scored.rollout._replace(top_tokens=np.int32(order), top_logp=logp)
    return scored._replace(rollout=reported), q


@pytest.mark.full
def test_a_step_on_the_whole_vocabulary_is_the_closed_form():
    """With every token in the head, L = -A (z_y - sum_v q_v z_v) / temperature: the normaliser
    cancels, and the loss is linear in the logits.
    """
    scored, q = with_whole_vocabulary(steps.make_scored())
    config = config_with_top(TINY.vocab_size, microbatches=2)
    before = steps.make_params(TINY)
    state = steps.fresh_state(config, TINY, steps.ONE)
    batch = packing.pack(
        scored, minibatches=1, microbatches=2, row_length=24, seed=1, share_prompts=True
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, steps.ONE))
    state, _ = steps.cached_step(config, TINY, steps.ONE)(state, batch)
    out = scored.rollout
    reward = scored.reward.reshape(steps.B, steps.G)
    spread = reward.std(1, keepdims=True, ddof=1) + 1e-6
    advantage = ((reward - reward.mean(1, keepdims=True)) / spread).reshape(-1, 1)
    mask = np.arange(steps.T) < out.lengths[:, None]
    rows = np.zeros((steps.B * steps.G, steps.P + steps.T), np.int32)
    starts = np.repeat(out.prompts.lengths, steps.G)
    for i, n in enumerate(starts):
        rows[i, :n] = out.prompts.tokens[i // steps.G, :n]
        rows[i, n : n + steps.T] = out.tokens[i]
    places = np.arange(len(rows))[:, None], starts[:, None] - 1 + np.arange(steps.T)

    def loss(params):
        z = decoder.logits(params, rows, TINY)[places] / 0.9
        own = jnp.take_along_axis(z, out.tokens[..., None], axis=-1)[..., 0]
        return reduce.token_mean(-advantage * (own - jnp.sum(q * z, axis=-1)), mask)

    grads = jax.jit(jax.grad(loss))(before)
    wanted = jax.tree.map(lambda w, g: w - 1e-2 * g, before, grads)
    steps.assert_close(state.params, wanted, 1e-6)


def test_the_surrogate_and_the_sampler_go_together():
    config = config_with_top(K)
    needs_none = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, top_logprobs=0)
    )
    clipped = dataclasses.replace(config.algorithm, surrogate=corrections.decoupled(policy.clipped))
    for wrong in (needs_none, dataclasses.replace(config, algorithm=clipped)):
        with pytest.raises(ValueError, match="^rollout.top_logprobs is for a surrogate that takes"):
            inputs.check(wrong, TINY, steps.ONE, steps.ONE, 1)


def test_more_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(ValueError, match="^rollout.top_logprobs=17 tokens are more than the model"):
        inputs.check(config_with_top(17), TINY, steps.ONE, steps.ONE, 1)


def test_a_supervised_stage_comes_before_a_run_that_centres():
    """Its batches have no likeliest tokens: the step is traced with one."""
    config = dataclasses.replace(
        config_with_top(K), warmup=WarmupConfig(path="x", steps=1, batch_size=2)
    )
    learnt = [pairs.Pair([1, 2], [3]), pairs.Pair([4], [5, 6])]
    batch = pairs.pack(learnt, microbatches=1, row_length=12, width=2)
    state = supervised.abstract(config, TINY, steps.ONE)
    supervised.compile_step(config, TINY, steps.ONE).lower(state, batch)


def test_a_cut_support_has_no_likeliest_tokens_to_centre_on():
    config = config_with_top(K)
    cut = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, top_p=0.9))
    with pytest.raises(ValueError, match="^rollout.top_logprobs=5 are compared over the full"):
        inputs.check(cut, TINY, steps.ONE, steps.ONE, 1)


def test_a_sampler_must_report_what_is_asked_for():
    config = config_with_top(TINY.vocab_size)
    scored, _ = with_whole_vocabulary(steps.make_scored())
    check_rollout(scored.rollout, config)
    with pytest.raises(ValueError, match="^rollout.top_logprobs=16 asks for Rollout.top_tokens"):
        check_rollout(scored.rollout._replace(top_tokens=None), config)


@pytest.mark.full
def test_a_run_centres_with_the_engine_s_own_report(tmp_path):
    config = training.tiny(
        **{"steps": 2, "rollout.top_logprobs": K, "rollout.precision.weights": "int4"}
    )
    surrogate = functools.partial(centering.centred, weight=centering.truncated)
    algorithm = dataclasses.replace(config.algorithm, surrogate=surrogate)
    training.train(dataclasses.replace(config, algorithm=algorithm), tmp_path)
    rows = training.rows(tmp_path)
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.full
def test_devices_change_nothing():
    """Rows of a tied head that is divided over two axes of the mesh."""
    model = dataclasses.replace(TINY, tie_word_embeddings=True)
    scored, _ = with_whole_vocabulary(steps.make_scored())
    config = config_with_top(TINY.vocab_size, microbatches=2)
    source = dataclasses.replace(config.model, architecture=model)
    config = dataclasses.replace(config, model=source)
    _, one, _ = steps.run(config, scored)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    before, split, _ = steps.run(config, scored, mesh)
    steps.assert_close(split.params, one.params, 1e-6)
    assert np.abs(split.params["embed"] - before["embed"]).max() > 1e-4
