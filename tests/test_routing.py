"""Routing replay: recorded experts are used, the gate is differentiated, what is missing falls
back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dcmdp_jax.losses import routing


def logits(seed=0, shape=(2, 3, 5, 8)):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def own_ids(x, k):
    return np.int32(np.argsort(-x, axis=-1)[..., :k])


def test_own_ids_are_a_fixed_point():
    x = logits()
    np.testing.assert_array_equal(routing.replay_ids(x, own_ids(x, 2)), own_ids(x, 2))


@pytest.mark.parametrize("normalize", [True, False])
def test_own_ids_have_the_gate_of_ordinary_routing(normalize):
    x = logits()
    ids = own_ids(x, 2)
    p = np.exp(np.float64(x)) / np.exp(np.float64(x)).sum(-1, keepdims=True)
    top = np.take_along_axis(p, ids, -1)
    expected = top / top.sum(-1, keepdims=True) if normalize else top
    found = routing.replay_weights(x, ids, normalize=normalize)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gate_is_normalised_by_default():
    x = logits()
    ids = own_ids(x, 2)
    np.testing.assert_array_equal(
        routing.replay_weights(x, ids), routing.replay_weights(x, ids, normalize=True)
    )


def test_own_ids_in_another_order_are_no_flips():
    x = logits()
    ids = own_ids(x, 2)
    result = routing.flips(x, ids[..., ::-1].copy(), np.ones((3, 5), bool))
    assert not np.any(result.per_layer) and result.any_layer == 0 and result.missing == 0


def test_missing_records_fall_back():
    x = logits(1, (4, 8))
    recorded = np.int32([[0, 1, 2], [-1, 3, 4], [5, 6, 7], [0, 1, 8]])
    expected = recorded.copy()
    expected[[1, 3]] = own_ids(x, 3)[[1, 3]]
    np.testing.assert_array_equal(routing.replay_ids(x, recorded), expected)


GATED = np.int32([[0, 1], [2, 3], [7, 4], [5, 1]])


def weighted(normalize):
    """A function of logits that takes the two weights of a token in unequal parts."""

    def of(x):
        weights = routing.replay_weights(x, GATED, normalize=normalize)
        return (weights * jnp.array([1.0, 3.0])).sum()

    return of


def gate_gradient(normalize):
    """Of the logits of the chosen experts, and of those of the others."""
    x = logits(2, (4, 8))
    gradient = np.asarray(jax.grad(weighted(normalize))(x))
    chosen = np.zeros_like(x, bool)
    np.put_along_axis(chosen, GATED, True, -1)
    return gradient[chosen], gradient[~chosen]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_of_the_gate_is_that_of_finite_differences(normalize):
    x = logits(2, (4, 8))
    check_grads(weighted(normalize), (x,), order=1, modes=("rev",), eps=1e-2, rtol=1e-2)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_logits_of_chosen_experts_have_a_gradient(normalize):
    chosen, _ = gate_gradient(normalize)
    assert np.all(chosen != 0)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_logits_of_other_experts_have_one_unless_the_gate_is_normalised(normalize):
    _, others = gate_gradient(normalize)
    assert np.all((others == 0) == normalize)


@functools.cache
def flipped():
    """Two layers, one row of four tokens: one flips in both, one in layer 1, one is unrecorded, one
    is padding.
    """
    x = logits(3, (2, 1, 4, 6))
    ids = own_ids(x, 2)
    other = own_ids(-x, 2)
    ids[:, 0, 0] = other[:, 0, 0]
    ids[1, 0, 1] = other[1, 0, 1]
    ids[0, 0, 2] = -1
    ids[:, 0, 3] = -7
    x[:, 0, 3] = np.nan
    return x, ids


def flips_of_three():
    return routing.flips(*flipped(), np.array([[1, 1, 1, 0]], bool))


def test_the_flips_of_a_layer_are_a_share_of_its_records():
    np.testing.assert_allclose(flips_of_three().per_layer, [1 / 2, 2 / 3], rtol=1e-6)


def test_a_token_flips_if_it_does_in_any_layer():
    np.testing.assert_allclose(flips_of_three().any_layer, 1.0)


def test_missing_records_are_a_share_of_all():
    np.testing.assert_allclose(flips_of_three().missing, 1 / 6, rtol=1e-6)


def test_no_tokens_have_no_flips():
    nothing = routing.flips(*flipped(), np.zeros((1, 4), bool))
    assert not np.any(nothing.per_layer) and nothing.any_layer == 0 and nothing.missing == 0


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (np.zeros((4, 2), np.int64), TypeError, "int32"),
        (np.zeros((3, 2), np.int32), ValueError, "expert ids have shape"),
        (np.zeros((4, 9), np.int32), ValueError, "k <= E"),
    ],
    ids=["type", "shape", "number"],
)
def test_bad_ids_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        routing.replay_ids(logits(4, (4, 8)), ids)
