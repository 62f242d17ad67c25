"""The model against transformers, module by module; masks, packing, remat, precision and parameter
trees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder, inference, sizes, weights
from dcmdp_jax.models.model_config import Compute

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support import reference_hf  # noqa: E402
from support.modules import LOGITS, TOLERANCE, assert_modules_match  # noqa: E402
from support.tiny_models import TINY, TINY_MOE  # noqa: E402

pytestmark = pytest.mark.full


@functools.cache
def model(case: str):
    return reference_hf.make(case)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """case -> (config, params), through the folder that transformers writes."""

    @functools.cache
    def load(case: str):
        folder = tmp_path_factory.mktemp(case)
        model(case).save_pretrained(folder)
        return weights.load(folder)

    return load


@pytest.mark.parametrize("case", reference_hf.CASES)
def test_every_module_matches_transformers(case, loaded):
    config, params = loaded(case)
    assert_modules_match(params, config, model(case), reference_hf.tokens(case, 2, 40))


@pytest.mark.parametrize("as_segment", [False, True])
@pytest.mark.parametrize("case", ["bias", "yarn", "moe_top3"])
def test_right_padding_changes_nothing(case, as_segment, loaded):
    config, params = loaded(case)
    tokens = reference_hf.tokens(case, 3, 20)
    lengths = np.array([20, 7, 1])
    mask = (np.arange(20) < lengths[:, None]).astype(np.int32)
    want = reference_hf.logits(model(case), tokens, mask)
    got = LOGITS(params, tokens, config, segment_ids=mask if as_segment else None)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["groups_4", "yarn_set", "moe_step2"])
def test_packed_rows_equal_separate_rows(case, loaded):
    config, params = loaded(case)
    tokens = reference_hf.tokens(case, 2, 24)
    segment_ids = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * 1 + [2] * 20 + [3] * 3], np.int32)
    positions = np.zeros_like(segment_ids)
    for row, segment in np.ndindex(2, 4):
        here = segment_ids[row] == segment
        positions[row, here] = np.arange(here.sum())
    got = LOGITS(params, tokens, config, positions=positions, segment_ids=segment_ids)
    assert np.isfinite(got).all()
    for row, segment in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]:
        here = segment_ids[row] == segment
        want = reference_hf.logits(model(case), tokens[row, here][None])[0]
        np.testing.assert_allclose(got[row, here], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("case", "remat", "policy"),
    [
        ("bias", False, None),
        ("moe_mlp_only", True, None),
        ("bias", True, jax.checkpoint_policies.dots_saveable),
    ],
)
def test_gradients_match_transformers(case, remat, policy, loaded):
    config, params = loaded(case)
    config = dataclasses.replace(config, compute=Compute(remat=remat, remat_policy=policy))
    tokens = reference_hf.tokens(case, 2, 12)

    def loss(params):
        logp = jax.nn.log_softmax(decoder.logits(params, tokens, config))
        return jnp.mean(jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1))

    got = jax.jit(jax.grad(loss))(params)
    want = reference_hf.gradients(model(case), tokens)
    for leaf, array in zip(
        jax.tree.leaves(weights.parameter_table(config)), jax.tree.leaves(got), strict=True
    ):
        for place, tensor in leaf.tensors.items():
            ours = tensor.stored(np.asarray(array[place]))
            np.testing.assert_allclose(
                ours,
                want.pop(tensor.name),
                atol=TOLERANCE,
                rtol=0,
                err_msg=f"gradient of {tensor.name}",
            )
    assert not want


def test_bfloat16_is_close_to_float32_and_not_equal(loaded):
    for case in ("dense", "moe_top2"):
        config, params = loaded(case)
        tokens = reference_hf.tokens(case, 2, 16)
        exact = LOGITS(params, tokens, config)
        rounded = LOGITS(
            params, tokens, dataclasses.replace(config, compute=Compute(bfloat16=True))
        )
        assert rounded.dtype == jnp.float32
        error = np.abs(np.asarray(rounded - exact))
        assert 1e-4 < np.median(error) < 0.05 * np.std(exact)


@pytest.mark.parametrize("case", ["moe_mlp_only", "bias"])
def test_sharded_logits_equal_unsharded(case, loaded):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; conftest.py simulates them")
    config, params = loaded(case)
    parts = (
        MeshConfig(fsdp=2, expert=2, tensor=2)
        if config.num_experts
        else MeshConfig(data=2, fsdp=2, tensor=2)
    )
    mesh = sharding.make_mesh(parts)
    places = sharding.param_shardings(decoder.logical_axes(config), mesh, sharding.TRAIN, params)
    tokens = reference_hf.tokens(case, 8, 16)
    got = LOGITS(
        jax.device_put(params, places),
        jax.device_put(tokens, sharding.batch_sharding(mesh, 0)),
        config,
    )
    np.testing.assert_allclose(got, LOGITS(params, tokens, config), atol=TOLERANCE, rtol=0)


def test_a_token_sees_no_later_token(loaded):
    config, params = loaded("moe_top2")
    tokens = jnp.asarray(reference_hf.tokens("moe_top2", 1, 12))
    before = LOGITS(params, tokens, config)
    after = LOGITS(params, tokens.at[0, 7].add(1), config)
    changed = np.abs(np.asarray(before - after)).max(-1)[0] > 0
    assert not changed[:7].any() and changed[7:].all()


TREES = {
    "dense": TINY,
    "moe": TINY_MOE,
    "mixed": dataclasses.replace(TINY_MOE, num_layers=4, decoder_sparse_step=2),
    "no_qk_norm": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True),
}


@pytest.fixture(params=TREES)
def tree(request):
    """A config, and the shapes of its parameters."""
    config = TREES[request.param]
    return config, jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))


def test_every_dimension_has_a_logical_axis(tree):
    config, params = tree
    same = jax.tree.map(lambda x, axes: len(axes) == x.ndim, params, decoder.logical_axes(config))
    assert all(jax.tree.leaves(same))


def test_projections_have_contracting_axes(tree):
    config, params = tree
    contracted = jax.tree.map(lambda x, axes: bool(axes), params, decoder.contracting_axes(config))
    for path, has_axes in jax.tree_util.tree_leaves_with_path(contracted):
        assert has_axes == ("_proj" in jax.tree_util.keystr(path))


def test_unstacked_parameters_are_the_same_numbers(tree):
    config, params = tree
    flat = jax.eval_shape(lambda p: inference.unstack(p, config), params)
    assert len(flat["stacks"]) == config.num_layers
    count = sum(x.size for x in jax.tree.leaves(flat))
    assert count == sum(x.size for x in jax.tree.leaves(params))


def test_every_parameter_has_stored_tensors(tree):
    config, params = tree
    table = weights.parameter_table(config)
    stored = jax.tree.map(lambda leaf: sum(np.prod(t.shape) for t in leaf.tensors.values()), table)
    assert stored == jax.tree.map(lambda x: x.size, params)


def test_initial_values():
    params = jax.jit(decoder.init, static_argnums=(1, 2))(jax.random.key(0), TINY_MOE, jnp.float32)
    gate = params["stacks"][0]["moe"]["gate_proj"]
    assert np.std(gate) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(gate[0], gate[1])
    assert (params["final_norm"] == 1).all()


@pytest.mark.parametrize(
    ("config", "billions"),
    [  # the parameter counts of the published checkpoints, a tied embedding counted once
        (sizes.QWEN3_0_6B, 0.596049920),
        (sizes.QWEN3_1_7B, 1.720574976),
        (sizes.QWEN3_4B, 4.022468096),
        (sizes.QWEN3_8B, 8.190735360),
        (sizes.QWEN3_14B, 14.768307200),
        (sizes.QWEN3_32B, 32.762123264),
        (sizes.QWEN3_30B_A3B, 30.532122624),
        (sizes.QWEN3_235B_A22B, 235.093634560),
        (sizes.QWEN2_5_0_5B, 0.494032768),
        (sizes.LLAMA_3_2_1B, 1.235814400),
        (sizes.SMOLLM2_135M, 0.134515008),
    ],
)
def test_published_parameter_counts(config, billions):
    params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    assert sum(x.size for x in jax.tree.leaves(params)) == round(billions * 1e9)
    assert len(params["stacks"]) == 1


def test_prefill_refuses_stacked_parameters(loaded):
    config, params = loaded("dense")
    with pytest.raises(ValueError, match="unstack"):
        inference.prefill(params, jnp.zeros((1, 4), jnp.int32), config)


def test_hidden_refuses_unstacked_parameters(loaded):
    config, params = loaded("dense")
    with pytest.raises(ValueError, match="stacked"):
        decoder.hidden(inference.unstack(params, config), jnp.zeros((1, 4), jnp.int32), config)
