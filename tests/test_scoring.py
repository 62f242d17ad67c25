"""Log-probs in chunks are log-probs in one piece, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models import qwen3, scoring, sizes
from random_params import random_params

POSITIONS = 23  # no multiple of any chunk


@pytest.mark.parametrize("config", [sizes.TINY, sizes.TINY_MOE], ids=["tied", "untied"])
@pytest.mark.parametrize("at_a_time", [1, 5, 22, 23])
def test_chunks_change_nothing(config, at_a_time, monkeypatch):
    """Against log_softmax of all the logits at once; the padding of the last chunk reaches neither values nor gradients."""
    params = random_params(config, 0.3, norms=1.0)
    hidden = jax.random.normal(jax.random.key(0), (POSITIONS, config.hidden_size))
    targets = jax.random.randint(jax.random.key(1), (POSITIONS,), 0, config.vocab_size)
    weight = jax.random.normal(jax.random.key(2), (POSITIONS,))
    monkeypatch.setattr(scoring, "CHUNK", at_a_time * config.vocab_size)

    def chunked(params, hidden):
        logp, entropy = scoring.token_logp(params, hidden, targets, config, 0.7)
        return jnp.sum(weight * logp), (logp, entropy)

    def whole(params, hidden):
        logp = jax.nn.log_softmax(qwen3.head(params, hidden, config) / 0.7)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        logp = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * logp), (logp, entropy)

    (_, values), grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(params, hidden)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), (values, grads), (expected, expected_grads))


def test_never_more_logits_than_the_chunk():
    """The compiled program of a long batch holds no array of all its logits."""
    config = sizes.QWEN3_0_6B
    params = jax.eval_shape(lambda: qwen3.init(jax.random.key(0), config))
    count = 4096
    hidden = jax.ShapeDtypeStruct((count, config.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((count,), jnp.int32)
    grad = jax.grad(lambda p, h, t: jnp.sum(scoring.token_logp(p, h, t, config, 1.0)[0]), (0, 1))
    jaxpr = jax.make_jaxpr(grad)(params, hidden, targets)

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                if variable.aval.shape[-1:] == (config.vocab_size,):
                    yield int(np.prod(variable.aval.shape))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from largest(getattr(inner, "jaxpr", inner))

    assert 0 < max(largest(jaxpr.jaxpr)) <= scoring.CHUNK
