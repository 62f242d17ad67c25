"""Log-probs in tiles, of wanted positions alone, are log-probs in one piece: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.config import Compute
from dcmdp_jax.models import decoder, sizes
from dcmdp_jax.models.kernels import scoring
from support.random_params import random_params

pytestmark = pytest.mark.full

ROWS = 3
COLUMNS = 7  # 21 positions, no multiple of any tile


def case(config, wanted_share=0.6):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, COLUMNS, config.hidden_size))
    targets = jax.random.randint(keys[1], (ROWS, COLUMNS), 0, config.vocab_size)
    wanted = jax.random.uniform(keys[2], (ROWS, COLUMNS)) < wanted_share
    return hidden, targets, wanted, jax.random.normal(keys[3], (ROWS, COLUMNS))


def run(score, params, config, given):
    """(logp, entropy), gradients of a weighted sum of logp by parameters and hidden states."""
    hidden, targets, wanted, weight = given

    def loss(params, hidden):
        logp, entropy = score(params, hidden, targets, wanted, config, 0.7)
        return jnp.sum(jnp.where(wanted, weight * logp, 0)), (logp, entropy)

    (_, values), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, hidden)
    return values, grads


def plain(params, hidden, targets, wanted, config, temperature):
    """log_softmax of all the logits at once."""
    logp = jax.nn.log_softmax(decoder.head(params, hidden, config) / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    logp = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return jnp.where(wanted, logp, 0), jnp.where(wanted, entropy, 0)


def with_entropy(*args):
    return scoring.token_logp(*args, entropy=True)


def as_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.mark.parametrize("config", [sizes.TINY, sizes.TINY_MOE], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("tokens", "width", "by_row"),
    [
        ((1,), 500, False),
        ((5,), 500, False),
        ((8, 4, 1), 200, False),
        ((512,), 200, False),
        ((2,), 500, True),
    ],
)
def test_tiles_change_nothing(config, tokens, width, by_row, monkeypatch):
    """Whatever the tile, whether rows are scored as one or each by itself; parts of the vocabulary
    may overlap.
    """
    config = dataclasses.replace(config, vocab_size=500)
    params = random_params(config, 0.3, norms=1.0)
    monkeypatch.setattr(scoring, "CPU_TOKENS", tokens)
    monkeypatch.setattr(scoring, "CPU_WIDTH", width)
    if by_row:
        monkeypatch.setattr(scoring, "CHUNK", tokens[0] * ROWS * config.vocab_size)
        as_on_accelerators(monkeypatch)
    given = case(config)
    values, grads = run(with_entropy, params, config, given)
    expected, expected_grads = run(plain, params, config, given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        (values, grads),
        (expected, expected_grads),
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_wanted(share):
    params = random_params(sizes.TINY, 0.3, norms=1.0)
    given = case(sizes.TINY, share)
    values, grads = run(with_entropy, params, sizes.TINY, given)
    expected, expected_grads = run(plain, params, sizes.TINY, given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        (values, grads),
        (expected, expected_grads),
    )


def test_what_is_not_wanted_is_not_computed(monkeypatch):
    """Not-a-number at positions that nobody asks for reaches nothing, beyond the tile that the
    wanted ones fill.
    """
    params = random_params(sizes.TINY, 0.3, norms=1.0)
    hidden, targets, wanted, weight = case(sizes.TINY)
    clean = run(
        with_entropy,
        params,
        sizes.TINY,
        (jnp.where(wanted[..., None], hidden, 0), targets, wanted, weight),
    )
    monkeypatch.setattr(scoring, "CPU_TOKENS", (1,))
    dirty = run(
        with_entropy,
        params,
        sizes.TINY,
        (jnp.where(wanted[..., None], hidden, jnp.nan), targets, wanted, weight),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), dirty, clean)


def test_not_a_number_is_seen():
    params = random_params(sizes.TINY, 0.3, norms=1.0)
    (hidden, targets, wanted, _) = case(sizes.TINY)
    logp, _ = scoring.token_logp(
        params, hidden.at[0].set(jnp.nan), targets, wanted, sizes.TINY, 1.0
    )
    np.testing.assert_array_equal(np.isnan(logp), wanted & (jnp.arange(ROWS) == 0)[:, None])


def test_bfloat16_rounds_operands_only():
    config = dataclasses.replace(sizes.TINY, compute=Compute(bfloat16=True))
    params = random_params(config, 0.3, norms=1.0)
    given = case(config)
    values, grads = run(with_entropy, params, config, given)
    expected, expected_grads = run(plain, params, config, given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), values, expected
    )
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2**-8 * max(np.abs(want).max(), 1e-30))


@pytest.mark.parametrize("by_row", [False, True])
def test_never_more_logits_than_the_chunk(by_row, monkeypatch):
    """The program of a long batch holds no array of all its logits."""
    if by_row:
        as_on_accelerators(monkeypatch)
    config = sizes.QWEN3_0_6B
    params = {"embed": jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((2, 2048, config.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    wanted = jax.ShapeDtypeStruct((2, 2048), bool)
    grad = jax.grad(
        lambda p, h, t, w: jnp.sum(scoring.token_logp(p, h, t, w, config, 1.0)[0]), (0, 1)
    )
    jaxpr = jax.make_jaxpr(grad)(params, hidden, targets, wanted)

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                if variable.aval.shape != params["embed"].shape:
                    yield int(np.prod(variable.aval.shape))
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from largest(inner)

    assert 0 < max(largest(jaxpr.jaxpr)) <= scoring.CHUNK


def test_packed_tokens_score_as_rows_of_their_own():
    """Two segments in a row: each completion's log-probs and the gradient of the tied table, which
    is read twice.
    """
    config = sizes.TINY
    params = random_params(config, 0.3, norms=1.0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (1, 12)).astype(np.int32)
    ids = np.array([[1] * 7 + [2] * 5], np.int32)
    positions = np.array([[*range(7), *range(5)]], np.int32)
    index = np.array([[2, 3, 4, 5], [8, 9, 10, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)

    def packed(params):
        logp, _ = scoring.packed_logp(params, tokens, positions, ids, index, config, 0.7)
        return jnp.sum(jnp.where(mask, logp, 0)), jnp.where(mask, logp, 0)

    def apart(params):
        parts = []
        for begin, end, first in ((0, 7, 2), (7, 12, 1)):
            z = jax.nn.log_softmax(decoder.logits(params, tokens[:, begin:end], config)[0] / 0.7)
            parts.append(z[jnp.arange(first, end - begin - 1), tokens[0, begin + first + 1 : end]])
        logp = jnp.stack([parts[0], jnp.append(parts[1], 0)])
        return jnp.sum(logp), logp

    (_, got), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, want), expected = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    np.testing.assert_allclose(got, want, atol=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected)
