"""The sampler's law, support and log-probs, and its independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import sampling

pytestmark = pytest.mark.full

draw = jax.jit(sampling.sample)


def keys(count, seed=0):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), count))


def alike(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return Sampling(
        jnp.full((count,), temperature, jnp.float32),
        jnp.full((count,), top_k, jnp.int32),
        jnp.full((count,), top_p, jnp.float32),
        jnp.full((count,), min_p, jnp.float32),
    )


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities over the support, and the support's mass, by sorting, in float64."""
    p = np.exp(logits.astype(np.float64) / temperature - np.max(logits / temperature))
    p /= p.sum()
    ranked = np.sort(p)[::-1]
    lowest = ranked[top_k - 1] if top_k else 0.0
    inside = ranked[ranked >= lowest]
    if top_p < 1:
        lowest = inside[np.searchsorted(np.cumsum(inside) / inside.sum(), top_p)]
    inside = (p >= lowest) & (p >= min_p * p.max())
    return np.where(inside, p, 0) / p[inside].sum(), p[inside].sum()


SUPPORTS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.6),
    dict(top_k=3),
    dict(top_p=0.8),
    dict(min_p=0.04),
    dict(temperature=0.9, top_k=6, top_p=0.95, min_p=0.01),
]


@functools.cache
def logits_of(size):
    """Eight tokens, or three blocks of them, the last one not full."""
    rng = np.random.default_rng(size)
    return (rng.normal(size=size) * (1.5 if size == 8 else 2.5)).astype(np.float32)


DRAWS = 40_000


@pytest.fixture(scope="module", params=[8, 300])
def size(request):
    return request.param


@pytest.fixture(scope="module", params=SUPPORTS, ids=str)
def drawn(request, size):
    """Many draws, the exact probabilities, and the exact mass of the support."""
    logits = logits_of(size)
    how = request.param
    out = draw(jnp.tile(logits, (DRAWS, 1)), keys(DRAWS), alike(DRAWS, **how))
    return out, *exact(logits, **how)


def test_no_token_outside_the_support_is_drawn(drawn):
    out, p, _ = drawn
    assert not np.bincount(out.token, minlength=len(p))[p == 0].any()


def test_chi_square_against_the_exact_distribution(drawn):
    out, p, _ = drawn
    counts = np.bincount(out.token, minlength=len(p))
    rare = (p > 0) & (p * DRAWS < 5)
    observed = np.append(counts[~rare & (p > 0)], counts[rare].sum())
    expected = DRAWS * np.append(p[~rare & (p > 0)], p[rare].sum())
    used = expected > 0
    freedom = used.sum() - 1
    # 99.9 %, Wilson and Hilferty
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert np.sum((observed - expected)[used] ** 2 / expected[used]) < bound


def test_the_log_prob_of_a_draw_is_the_exact_one(drawn):
    out, p, _ = drawn
    np.testing.assert_allclose(out.rollout_logp, np.log(p[out.token]), atol=2e-6)


def test_the_mass_of_the_support_is_the_exact_one(drawn):
    out, _, mass = drawn
    np.testing.assert_allclose(out.support_mass, mass, rtol=2e-6)


@pytest.mark.parametrize("size", [1, 50, 128, 1000])
def test_the_support_is_the_sorted_one(size):
    """Rows with settings of their own; whole-number logits tie, and a tie with the last kept token
    is kept.
    """
    rng = np.random.default_rng(size)
    rows = 64
    logits = rng.normal(size=(rows, size)).astype(np.float32) * 3
    logits[::2] = np.round(logits[::2])
    settings = [
        dict(
            temperature=float(rng.uniform(0.5, 2)),
            top_k=int(rng.integers(0, size + 3)),
            top_p=float(rng.choice([1.0, 0.97, 0.731, 0.31])),
            min_p=float(rng.choice([0, 0, 0.03, 0.3])),
        )
        for _ in range(rows)
    ]
    how = Sampling(*(jnp.array([one[name] for one in settings]) for name in Sampling._fields))
    out = draw(jnp.asarray(logits), keys(rows), how)
    for i, one in enumerate(settings):
        p, mass = exact(logits[i], **one | {"top_k": min(one["top_k"], size)})
        np.testing.assert_allclose(
            [out.support_mass[i], out.rollout_logp[i]], [mass, np.log(p[out.token[i]])], atol=1e-5
        )


def test_chi_square_over_a_large_vocabulary():
    """Uniform over 151,936 ids, binned: neither race may favour any stretch of the vocabulary."""
    size = 151_936
    draws = 512
    bins = 32
    token = draw(jnp.zeros((draws, size)), keys(draws, 3), alike(draws)).token
    for part in (
        np.asarray(token) * bins // size,
        np.asarray(token) % sampling.BLOCK * bins // sampling.BLOCK,
    ):
        counts = np.bincount(part, minlength=bins)
        # 99.9 % quantile, 31 degrees of freedom
        assert np.sum((counts - draws / bins) ** 2 / (draws / bins)) < 61.1


@functools.cache
def exponentials():
    """Of 64 keys, a row each."""
    return np.asarray(sampling._exponential(keys(64), 4096), np.float64)


def test_exponentials_are_positive_and_finite():
    assert exponentials().min() > 0 and np.isfinite(exponentials()).all()


def test_exponentials_have_their_moments():
    e = exponentials()
    assert abs(e.mean() - 1) < 4 / np.sqrt(e.size) and abs(e.var() - 1) < 4 * np.sqrt(8 / e.size)


def test_exponentials_do_not_correlate_between_keys():
    correlation = np.corrcoef(exponentials())[~np.eye(64, dtype=bool)]
    assert abs(correlation).max() < 6 / np.sqrt(4096)


any_support = pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}], ids=str
)
not_finite = pytest.mark.parametrize("bad", [np.nan, np.inf])
few_or_several_blocks = pytest.mark.parametrize("vocabulary", [18, 300])


def drawn_from_bad_logits(vocabulary, bad, how):
    """One logit of a row is bad, in each row another."""
    logits = np.tile(logits_of(300)[:vocabulary], (32, 1))
    logits[np.arange(32), np.arange(32) % vocabulary] = bad
    return draw(logits, keys(32), alike(32, **how))


@any_support
@not_finite
@few_or_several_blocks
def test_logits_that_are_not_finite_give_no_id_past_the_last(vocabulary, bad, how):
    token = drawn_from_bad_logits(vocabulary, bad, how).token
    assert (token >= 0).all() and (token < vocabulary).all()


@any_support
@not_finite
@few_or_several_blocks
def test_logits_that_are_not_finite_give_no_log_prob(vocabulary, bad, how):
    assert not np.isfinite(drawn_from_bad_logits(vocabulary, bad, how).rollout_logp).any()


@any_support
@few_or_several_blocks
def test_finite_logits_give_a_log_prob(vocabulary, how):
    out = draw(logits_of(300)[None, :vocabulary], keys(1), alike(1, **how))
    assert np.isfinite(out.rollout_logp).all()


def test_a_row_does_not_see_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (16, 40))
    key = keys(16)
    how = alike(16)._replace(temperature=jnp.linspace(0.0, 2, 16), top_k=jnp.arange(16) % 5)
    whole = sampling.sample(logits, key, how)
    order = jnp.array([5, 3, 11])
    part = sampling.sample(logits[order], key[order], jax.tree.map(lambda x: x[order], how))
    for all_rows, some in zip(whole, part):
        np.testing.assert_array_equal(all_rows[order], some)


@functools.cache
def greedy():
    """Logits with ties, and a draw at temperature zero."""
    logits = jnp.round(jax.random.normal(jax.random.key(2), (64, 300)) * 2)
    return logits, sampling.sample(logits, keys(64), alike(64, temperature=0.0, top_k=1))


def test_temperature_zero_is_greedy():
    """The first of tied tokens wins, as in argmax."""
    logits, out = greedy()
    np.testing.assert_array_equal(out.token, jnp.argmax(logits, -1))


def test_temperature_zero_has_the_plain_log_prob():
    logits, out = greedy()
    np.testing.assert_allclose(out.rollout_logp, jnp.max(jax.nn.log_softmax(logits), -1), atol=1e-6)


def test_temperature_zero_cuts_nothing_off():
    _, out = greedy()
    np.testing.assert_array_equal(out.support_mass, 1.0)
