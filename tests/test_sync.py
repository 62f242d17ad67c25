"""Weight sync: the same values in the decode layout, no buffer shared, precision as asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import WEIGHT_DTYPES, MeshConfig
from dcmdp_jax.models import qwen3, sizes
from dcmdp_jax.models.quantized import Quantized
from random_params import random_params

MODELS = pytest.mark.parametrize("model", [sizes.TINY, sizes.TINY_MOE], ids=["dense", "moe"])


def is_quantized(x):
    return isinstance(x, Quantized)


@MODELS
def test_float32_changes_nothing_but_the_layout(model):
    params = random_params(model)
    synced = sync.make(model, "float32", sharding.single_device_mesh())(params)
    expected = qwen3.unstack(params, model)
    jax.tree.map(np.testing.assert_array_equal, synced, expected)


@MODELS
@pytest.mark.parametrize("weights", WEIGHT_DTYPES)
def test_the_engine_survives_the_donation_of_the_parameters(model, weights):
    params = random_params(model)
    synced = sync.make(model, weights, sharding.single_device_mesh())(params)
    mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert not mine & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(synced)}
    before = jax.tree.map(np.array, synced)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, before, synced)


@MODELS
@pytest.mark.parametrize("weights, half_step", [("int8", 0.5 / 127), ("int4", 0.5 / 7), ("float8_e4m3fn", 16 / 448)])
def test_projections_alone_are_quantized(model, weights, half_step):
    """Embeddings, norms, router and head keep their values; a projection is off by half a step of its channel's at most."""
    params = random_params(model)
    synced = sync.make(model, weights, sharding.single_device_mesh())(params)
    exact = qwen3.unstack(params, model)
    kinds = {}
    for (path, leaf), (_, original) in zip(jax.tree_util.tree_leaves_with_path(synced, is_leaf=is_quantized),
                                           jax.tree_util.tree_leaves_with_path(exact)):
        name = path[-1].key
        kinds.setdefault(name, set()).add(is_quantized(leaf))
        if not is_quantized(leaf):
            np.testing.assert_array_equal(leaf, original)
            continue
        assert leaf.values.dtype == jnp.dtype(weights)
        error = np.abs(leaf.dequantize() - original) / np.abs(original).max(axis=_contracted(leaf), keepdims=True)
        assert 0 < error.max() <= half_step * (1 + 1e-5)
    assert {name for name, kind in kinds.items() if kind == {True}} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(len(kind) == 1 for kind in kinds.values())


def _contracted(leaf):
    """Axes that share one scale, found from the scale's own shape."""
    return tuple(i for i, size in enumerate(leaf.scale.shape) if size == 1)


@MODELS
def test_placement_is_the_decode_table(model):
    mesh = sharding.make_mesh(MeshConfig(expert=2 if model.num_experts else 1, tensor=2), jax.devices()[:8])
    train = sharding.params(qwen3.logical_axes(model), mesh, sharding.TRAIN, jax.eval_shape(lambda: random_params(model)))
    params = jax.device_put(random_params(model), train)
    synced = sync.make(model, "int8", mesh)(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), synced,
                 sync.make(model, "int8", sharding.single_device_mesh())(random_params(model)))
    q_proj = synced["stacks"][0]["attention"]["q_proj"]
    assert tuple(q_proj.values.sharding.spec) == tuple(q_proj.scale.sharding.spec) == (None, "tensor", None)
    assert tuple(params["stacks"][0]["attention"]["q_proj"].sharding.spec) == (None, "fsdp", "tensor", None)
