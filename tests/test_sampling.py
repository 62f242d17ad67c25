"""The sampler's law, its log-probs, and its independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.rollout import sampling


def keys(count, seed=0):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), count))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_chi_square_against_the_exact_distribution(temperature):
    logits = jnp.array([2.0, -1.0, 0.3, 0.0, 1.1, -3.0, 0.31, -0.5])
    draws = 40_000
    token, logp = jax.jit(sampling.sample)(jnp.tile(logits, (draws, 1)), keys(draws), jnp.full((draws,), temperature))
    exact = np.asarray(jax.nn.log_softmax(logits / temperature))
    counts = np.bincount(token, minlength=8)
    chi2 = np.sum((counts - draws * np.exp(exact)) ** 2 / (draws * np.exp(exact)))
    assert chi2 < 24.3  # 99.9 % quantile with 7 degrees of freedom
    np.testing.assert_allclose(logp, exact[token], atol=1e-6)


def test_chi_square_over_a_large_vocabulary():
    """Uniform over 151,936 ids, binned: the counter-based hash must not favour any stretch of the vocabulary."""
    size, draws, bins = 151_936, 512, 32
    token, _ = jax.jit(sampling.sample)(jnp.zeros((draws, size)), keys(draws, 3), jnp.ones((draws,)))
    counts = np.bincount(np.asarray(token) * bins // size, minlength=bins)
    assert np.sum((counts - draws / bins) ** 2 / (draws / bins)) < 61.1  # 99.9 % quantile, 31 degrees of freedom


def test_exponentials_have_their_moments_and_do_not_correlate_between_keys():
    e = np.asarray(sampling.exponential(keys(64), 4096), np.float64)
    assert e.min() > 0 and np.isfinite(e).all()
    assert abs(e.mean() - 1) < 4 / np.sqrt(e.size) and abs(e.var() - 1) < 4 * np.sqrt(8 / e.size)
    correlation = np.corrcoef(e)[~np.eye(64, dtype=bool)]
    assert abs(correlation).max() < 6 / np.sqrt(4096)


def test_a_row_does_not_see_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (16, 40))
    key, temperature = keys(16), jnp.linspace(0.5, 2, 16)
    whole = sampling.sample(logits, key, temperature)
    order = jnp.array([5, 3, 11])
    part = sampling.sample(logits[order], key[order], temperature[order])
    np.testing.assert_array_equal(whole[0][order], part[0])
    np.testing.assert_array_equal(whole[1][order], part[1])


def test_temperature_zero_is_greedy_with_the_plain_log_prob():
    logits = jax.random.normal(jax.random.key(2), (8, 40))
    token, logp = sampling.sample(logits, keys(8), jnp.zeros((8,)))
    np.testing.assert_array_equal(token, jnp.argmax(logits, -1))
    np.testing.assert_allclose(logp, jnp.max(jax.nn.log_softmax(logits), -1), atol=1e-6)
