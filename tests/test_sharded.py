"""Every axis of the mesh, alone and with others, against one device: values, gradients, parameters
and multiplier.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import optimizers, sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder, moe, scoring
from dcmdp_jax.models.kernels import dispatch, swiglu
from dcmdp_jax.models.model_config import ModelConfig
from support.random_params import random_params
from support.steps import assert_close, make_config, make_scored, run

pytestmark = pytest.mark.full

DENSE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
)
MOE = dataclasses.replace(
    DENSE, num_experts=8, experts_per_token=3, expert_size=16, tie_word_embeddings=True
)
MESHES = [
    MeshConfig(data=8, fsdp=1),
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=2, sequence=4),
    MeshConfig(fsdp=2, tensor=4),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=2, sequence=2, tensor=2),
]
SPARSE = [
    MeshConfig(expert=8),
    MeshConfig(expert=4, tensor=2),
    MeshConfig(data=2, fsdp=2, expert=2),
    MeshConfig(fsdp=2, expert=2, sequence=2),
]
QUICK = [
    (DENSE, MESHES[2]),
    (DENSE, MESHES[4]),
    (MOE, MESHES[0]),
    (MOE, SPARSE[0]),
    (MOE, SPARSE[1]),
    (MOE, SPARSE[3]),
]
CASES = [(DENSE, mesh) for mesh in MESHES] + [(MOE, mesh) for mesh in MESHES + SPARSE]
MARKED = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def name(case):
    model, mesh = case
    axes = [
        f"{axis}{size}"
        for axis, size in vars(mesh).items()
        if size != 1 and axis != "fsdp" or size > 1
    ]
    return "-".join(["moe" if model.num_experts else "dense", *axes])


def assert_grads_close(found, expected):
    """To 1e-5, or to 1e-5 of a parameter's largest gradient if that is over 1: rounding errors of
    float32 sums grow with their size.
    """
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = 1e-5 * max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=atol, rtol=0)


def packed(rows=8, length=24, vocab=32, seed=0):
    """Returns tokens, positions, segment and prefix ids of rows with three segments and padding,
    and the index of each row's scored tokens. In every second row the last two are branches.
    """
    rng = np.random.default_rng(seed)
    cut = rng.integers(5, 8, (rows, 1))
    middle = rng.integers(9, 12, (rows, 1))
    end = rng.integers(14, length, (rows, 1))
    column = np.arange(length)
    segment = 1 + (column >= cut) + (column >= middle)
    start = np.choose(segment - 1, [0, cut, middle])
    is_branch = (segment > 1) & (np.arange(rows)[:, None] % 2 == 0)
    position = column - start + np.where(is_branch, cut - 1, 0)
    segment = np.where(column < end, segment, 0)
    prefix = np.where(is_branch & (segment > 0), 1, 0)
    index = np.arange(rows)[:, None] * length + np.arange(4, 13)
    return tuple(
        jnp.asarray(x, jnp.int32)
        for x in (rng.integers(0, vocab, (rows, length)), position, segment, prefix, index)
    )


def score(params, tokens, positions, segment_ids, prefix_ids, index, config):
    logp, entropy = scoring.packed_logp(
        params,
        tokens,
        positions,
        segment_ids,
        index,
        config,
        0.9,
        entropy=True,
        entropy_gradient=True,
        prefix_ids=prefix_ids,
    )
    weight = jnp.arange(logp.size).reshape(logp.shape)
    return jnp.sum(logp * jnp.cos(weight) + entropy * jnp.sin(weight)), (logp, entropy)


@functools.cache
def on_one_device(config):
    params = random_params(config, 0.2, norms=1.0)
    return params, jax.jit(
        jax.value_and_grad(functools.partial(score, config=config), has_aux=True)
    )(params, *packed())


@pytest.mark.parametrize("case", MARKED, ids=name)
def test_log_probs_and_gradients_equal_those_of_one_device(case):
    config, axes = case
    params, ((loss, aux), grads) = on_one_device(config)
    mesh = sharding.make_mesh(axes, jax.devices()[:8])
    places = sharding.param_shardings(decoder.logical_axes(config), mesh, sharding.TRAIN, params)
    f = jax.value_and_grad(functools.partial(score, config=config), has_aux=True)
    found = jax.jit(sharding.with_mesh(mesh, f), out_shardings=((None, None), places))(
        jax.device_put(params, places), *packed()
    )
    assert_close(found[0][1], aux, 1e-5)
    assert_close(found[0][0], loss, 1e-5)
    assert_grads_close(found[1], grads)


@pytest.mark.parametrize("case", [(DENSE, MESHES[5]), (MOE, SPARSE[2])], ids=name)
def test_a_step_equals_that_of_one_device(case):
    """The mixture of experts replays two experts of most tokens; its router would choose three.

    Its optimizer is linear in the gradients: AdamW's first step is their sign, which rounding
    decides if one is nearly 0.
    """
    model, axes = case
    moe = model.num_experts > 0
    config = make_config(
        model, microbatches=2, replay_routing=moe, optimizer=optimizers.sgd if moe else None
    )
    scored = make_scored()
    if moe:
        ids = np.tile(
            np.arange(8, dtype=np.int32), (*scored.rollout.tokens.shape, model.num_layers, 1)
        )
        experts = np.random.default_rng(0).permuted(ids, axis=-1)[..., :2]
        experts[:, ::3] = -1
        scored = scored._replace(rollout=scored.rollout._replace(experts=experts))
    _, whole, metrics = run(config, scored)
    _, split, split_metrics = run(config, scored, sharding.make_mesh(axes, jax.devices()[:8]))
    assert_close(split.params, whole.params, 1e-5)
    assert_close(split.opt_state, whole.opt_state, 1e-5)
    assert_close(split.dual, whole.dual, 1e-6)
    assert abs(metrics["loss"] - split_metrics["loss"]) < 1e-6


def test_no_token_is_dropped_if_all_go_to_one_device():
    """A few rows at a time, in many rounds: values and gradients."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (8, 16, 12), (8, 16, 12), (8, 12, 16)
    matrices = (jax.random.normal(k, s) for k, s in zip(keys[:3], shapes, strict=True))
    weights = swiglu.Experts(*matrices)
    x = jax.random.normal(keys[3], (8, 24, 16))
    gates = jax.random.uniform(keys[4], (8, 24, 2))
    experts = jnp.full((8, 24, 2), 3)

    def loss(mixture, x, gates, weights):
        y = mixture(x, gates, experts, weights)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    def unsharded(x, *others):
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, *others[:-1]))
        return moe.mixture(*flat, others[-1]).reshape(x.shape)

    in_rounds = functools.partial(dispatch.mixture, max_rows=64)
    mesh = sharding.make_mesh(MeshConfig(expert=8), jax.devices()[:8])
    got, want = (
        jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2))
        for f in (in_rounds, unsharded)
    )
    replicated = jax.device_put((x, gates, weights), sharding.replicated(mesh))
    got = jax.jit(sharding.with_mesh(mesh, got))(*replicated)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0),
        got,
        jax.jit(want)(x, gates, weights),
    )
