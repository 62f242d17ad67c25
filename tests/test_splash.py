"""The TPU kernel, interpreted, against plain attention: packed rows, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models.kernels import splash
from dcmdp_jax.models.kernels.attention import attention

pytestmark = pytest.mark.full


def plain(q, k, v, segment_ids):
    index = jnp.arange(segment_ids.shape[1])
    mask = (index[:, None] >= index) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return attention(q, k, v, mask[:, None, None])


def weighted_sum(attend, q, k, v, segment_ids):
    out = attend(q, k, v, segment_ids)
    return jnp.sum(jnp.where(segment_ids[:, None, None, :, None] > 0, out, 0) * jnp.cos(q)), out


@pytest.mark.parametrize(
    "axes", [None, MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=["one", "split"]
)
def test_values_and_gradients_equal_plain_attention(axes):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 2, 2, 256, 128))
    k, v = (jax.random.normal(key, (2, 2, 256, 128)) for key in keys[1:])
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [64], axis=1), jnp.int32)

    def grads(attend):
        return jax.value_and_grad(
            functools.partial(weighted_sum, attend), argnums=(0, 1, 2), has_aux=True
        )

    expected = jax.jit(grads(plain))(q, k, v, segment_ids)
    kernel = grads(functools.partial(splash.attention, interpret=True))
    if axes is not None:
        mesh = sharding.make_mesh(axes, jax.devices()[:8])
        kernel = sharding.with_mesh(mesh, kernel)
        q = jax.device_put(q, sharding.replicated(mesh))
    found = jax.jit(kernel)(q, k, v, segment_ids)
    real = np.asarray(segment_ids > 0)[:, None, None, :, None]
    np.testing.assert_allclose(
        np.where(real, found[0][1], 0), np.where(real, expected[0][1], 0), atol=1e-5
    )
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
