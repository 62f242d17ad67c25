"""Score centering against golden logits gradients, the full expectation, and its invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import centering, reduce
from support import golden

WEIGHTS = {"none": centering.unweighted, "tis": centering.truncated, "mis": centering.masked}


def centred(logits, log_q, actions, advantage, mask, k, weight):
    """Loss [1, T] of logits [T, V] with the sampler's k likeliest tokens for a head."""
    logp = jax.nn.log_softmax(logits)
    ids = jax.lax.top_k(log_q, k)[1]
    arrays = []
    for chosen in (actions[:, None], ids):
        arrays += [jnp.take_along_axis(x, chosen, 1)[None] for x in (logp, log_q)]
    own, own_q, head, head_q = arrays
    return centering.score_centering(
        own[..., 0], own_q[..., 0], head, head_q, advantage[None], mask[None], weight=weight
    )


@pytest.mark.full
@golden.every_file
@pytest.mark.parametrize("k", [3, 6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_golden(file, name, k):
    block = file["score_centering"]
    if f"{name}_top{k}" not in block:
        pytest.fail(f"the golden file has no {name}_top{k}")
    log_q = np.log(np.float32(block["q"]))
    actions = np.int32(block["actions"])
    mask = np.float32(block["mask"])

    def loss(logits):
        per_token = centred(
            logits, log_q, actions, np.float32(block["adv"]), mask, k, WEIGHTS[name]
        )
        return reduce.token_mean(per_token, mask[None])

    value, gradient = jax.value_and_grad(loss)(np.float32(block["logits"]))
    np.testing.assert_allclose(value, block[f"{name}_top{k}"]["value"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        gradient, block[f"{name}_top{k}"]["grad_logits"], rtol=1e-5, atol=3e-7
    )


@pytest.mark.full
@pytest.mark.parametrize("name", WEIGHTS)
def test_full_head_has_zero_mean_under_the_sampler(name):
    """With head = vocabulary and constant advantage, the expected gradient over y ~ q is zero: that
    is the method.
    """
    rng = np.random.default_rng(0)
    vocabulary = 7
    logits = np.float32(rng.normal(size=vocabulary))
    log_q = np.float32(jax.nn.log_softmax(logits + 0.5 * rng.normal(size=vocabulary)))

    def expected(logits, k):
        actions = jnp.arange(vocabulary)
        tiled = [jnp.tile(x, (vocabulary, 1)) for x in (logits, log_q)]
        ones = jnp.ones(vocabulary)
        loss = centred(*tiled, actions, 1.3 * ones, ones, k, WEIGHTS[name])
        return jnp.sum(jnp.exp(log_q) * loss[0])

    np.testing.assert_allclose(
        jax.grad(expected)(logits, vocabulary), np.zeros(vocabulary), atol=5e-7
    )
    assert np.abs(jax.grad(expected)(logits, 2)).max() > 1e-3


@pytest.mark.full
def test_head_replaces_the_tail_by_the_trainers():
    """The centre of a short head is the full expectation under q on the head and tail * p outside
    it.
    """
    rng = np.random.default_rng(1)
    logits = rng.normal(size=6)
    k = 3
    log_q = np.log(rng.dirichlet(np.ones(6)))
    p = np.exp(logits - np.log(np.exp(logits).sum()))
    q = np.exp(log_q)
    head = np.argsort(-q)[:k]
    outside = np.setdiff1d(np.arange(6), head)
    mixed = q.copy()
    mixed[outside] = p[outside] * q[outside].sum() / p[outside].sum()
    weights = np.minimum(p / mixed, 2.0)
    action = int(head[0])
    own = np.eye(6)[action] - p
    centre = sum(mixed[v] * weights[v] * (np.eye(6)[v] - p) for v in range(6))
    expected = -0.8 * (np.minimum(p[action] / q[action], 2.0) * own - centre)

    def loss(x):
        arrays = (
            np.float32(log_q)[None],
            np.int32([action]),
            np.float32([0.8]),
            np.ones(1, np.float32),
        )
        return centred(x[None], *arrays, k, centering.truncated).sum()

    np.testing.assert_allclose(jax.grad(loss)(np.float32(logits)), expected, rtol=1e-4, atol=1e-6)


def test_weights_take_their_bounds_by_partial():
    ratio = np.float32([0.1, 0.7, 1.9, 4.0])
    np.testing.assert_allclose(
        functools.partial(centering.truncated, high=1.5)(ratio), [0.1, 0.7, 1.5, 1.5]
    )
    np.testing.assert_allclose(
        functools.partial(centering.masked, low=0.05, high=1.0)(ratio), [0.1, 0.7, 0, 0]
    )
    np.testing.assert_allclose(centering.unweighted(ratio), np.ones(4))


def test_empty_head_entries_are_ignored():
    """A list padded with -inf and garbage is the short list."""
    rng = np.random.default_rng(2)
    logp = np.float32(-rng.random((2, 3)))
    rollout = np.float32(-rng.random((2, 3)))
    head, head_rollout = np.float32(-1 - rng.random((2, 2, 3, 4)))
    advantage = np.float32(rng.normal(size=(2, 1)))
    mask = np.ones((2, 3), bool)
    garbage = np.full((2, 3, 2), np.nan, np.float32)
    padded = (
        np.concatenate([head, garbage], -1),
        np.concatenate([head_rollout, garbage * 0 - np.inf], -1),
    )

    def loss(head, head_rollout):
        return centering.score_centering(logp, rollout, head, head_rollout, advantage, mask).sum()

    short = jax.value_and_grad(loss)(head, head_rollout)
    long = jax.value_and_grad(loss)(*padded)
    np.testing.assert_allclose(long[0], short[0], rtol=1e-6)
    np.testing.assert_array_equal(long[1][..., :4], short[1])
    np.testing.assert_array_equal(long[1][..., 4:], 0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_head_token_that_the_trainer_cannot_make_is_left_out(name):
    rng = np.random.default_rng(0)
    head = np.log(rng.dirichlet(np.ones(4), (1, 3))).astype(np.float32)[..., :3]
    head_q = np.log(rng.dirichlet(np.ones(4), (1, 3))).astype(np.float32)[..., :3]
    impossible, unknown = head.copy(), head_q.copy()
    impossible[..., 1] = -np.inf
    unknown[..., 1] = np.nan
    rest = {"advantage": np.ones((1, 3), np.float32), "mask": np.ones((1, 3), bool)}
    losses = (
        centering.score_centering(p[..., 0], q[..., 0], p, q, **rest, weight=WEIGHTS[name])
        for p, q in ((impossible, head_q), (head, unknown))
    )
    np.testing.assert_array_equal(*losses)


def test_bad_shapes_are_named():
    x = np.zeros((2, 3), np.float32)
    head = np.zeros((2, 4, 5), np.float32)
    with pytest.raises(ValueError, match="head_logp has shape"):
        centering.score_centering(x, x, head, head, x, np.ones((2, 3), bool))
    with pytest.raises(TypeError, match="head_rollout_logp is bfloat16"):
        good = np.zeros((2, 3, 5), np.float32)
        centering.score_centering(x, x, good, jnp.bfloat16(good), x, np.ones((2, 3), bool))
