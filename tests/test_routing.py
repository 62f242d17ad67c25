"""Routing replay: recorded experts are used, the gate is differentiated, what is missing falls
back.
"""

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
    """Replaying one's own choice gives the gate of ordinary routing, and no flips."""
    x = logits()
    ids = own_ids(x, 2)
    np.testing.assert_array_equal(routing.replay_ids(x, ids), ids)
    p = np.exp(np.float64(x)) / np.exp(np.float64(x)).sum(-1, keepdims=True)
    top = np.take_along_axis(p, ids, -1)
    np.testing.assert_allclose(
        routing.replay_weights(x, ids), top / top.sum(-1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(routing.replay_weights(x, ids, normalize=False), top, rtol=1e-5)
    result = routing.flips(x, ids[..., ::-1].copy(), np.ones((3, 5), bool))
    assert not np.any(result.per_layer) and result.any_layer == 0 and result.missing == 0


def test_missing_records_fall_back():
    x = logits(1, (4, 8))
    recorded = np.int32([[0, 1, 2], [-1, 3, 4], [5, 6, 7], [0, 1, 8]])
    expected = recorded.copy()
    expected[[1, 3]] = own_ids(x, 3)[[1, 3]]
    np.testing.assert_array_equal(routing.replay_ids(x, recorded), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_runs_through_the_gate(normalize):
    """Finite differences; with normalisation, logits of other experts get no gradient."""
    x = logits(2, (4, 8))
    ids = np.int32([[0, 1], [2, 3], [7, 4], [5, 1]])

    def weighted(x):
        return (routing.replay_weights(x, ids, normalize=normalize) * jnp.array([1.0, 3.0])).sum()

    check_grads(weighted, (x,), order=1, modes=("rev",), eps=1e-2, rtol=1e-2)
    gradient = np.asarray(jax.grad(weighted)(x))
    chosen = np.zeros_like(x, bool)
    np.put_along_axis(chosen, ids, True, -1)
    assert np.all(gradient[chosen] != 0)
    assert np.all((gradient[~chosen] == 0) == normalize)


def test_flips_by_hand():
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
    result = routing.flips(x, ids, np.array([[1, 1, 1, 0]], bool))
    np.testing.assert_allclose(result.per_layer, [1 / 2, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(result.any_layer, 1.0)
    np.testing.assert_allclose(result.missing, 1 / 6, rtol=1e-6)
    nothing = routing.flips(x, ids, np.zeros((1, 4), bool))
    assert not np.any(nothing.per_layer) and nothing.any_layer == 0 and nothing.missing == 0


def test_bad_ids_are_refused():
    x = logits(4, (4, 8))
    with pytest.raises(TypeError, match="int32"):
        routing.replay_ids(x, np.zeros((4, 2), np.int64))
    with pytest.raises(ValueError, match="expert ids have shape"):
        routing.replay_ids(x, np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match="k <= E"):
        routing.replay_ids(x, np.zeros((4, 9), np.int32))
