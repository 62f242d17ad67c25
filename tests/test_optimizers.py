"""Optimizers: the library's against optax's own, and any optax transformation in the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcmdp_jax import optimizers, sharding, step, train_state
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder
from support.steps import MODEL, MOE, assert_close, make_config, make_params, make_scored, run

pytestmark = pytest.mark.full


def rate_of(algorithm):
    return lambda count: (
        algorithm.learning_rate * jnp.minimum(1.0, (count + 1) / (algorithm.lr_warmup_steps + 1))
    )


def optax_adamw(a):
    return optax.adamw(rate_of(a), b1=a.beta1, b2=a.beta2, weight_decay=a.weight_decay)


def optax_sgd(a):
    return optax.chain(
        optax.trace(a.beta1),
        optax.add_decayed_weights(a.weight_decay),
        optax.scale_by_learning_rate(rate_of(a)),
    )


def scheduled_adam(a):
    return optax.adam(optax.cosine_decay_schedule(a.learning_rate, 10))


def adafactor(a):
    # factors matrices as small as those of the test's model
    return optax.adafactor(a.learning_rate, min_dim_size_to_factor=8)


PLAIN = make_config().algorithm
PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([[0.5]])}


def start(algorithm, params=PARAMS):
    return step.Learner(params, optimizers.from_config(algorithm).init(params), jnp.int32(0))


def applied(updated, grads, algorithm, loss=0.0):
    config = dataclasses.replace(make_config(), algorithm=algorithm)
    return step.apply_update(updated, jnp.float32(loss), grads, config)[0]


def random_grads(seed, params=PARAMS):
    return jax.tree.map(lambda w: jax.random.normal(jax.random.key(seed), w.shape), params)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
@pytest.mark.parametrize(
    "optimizer, reference", [(optimizers.adamw, optax_adamw), (optimizers.sgd, optax_sgd)]
)
def test_updates_are_those_of_optax(optimizer, reference, clip):
    """The rate rises over the first three; one update is not finite and is left out."""
    algorithm = dataclasses.replace(
        PLAIN, optimizer=optimizer, grad_clip=clip, lr_warmup_steps=2, weight_decay=0.1
    )
    reference = optax.chain(optax.clip_by_global_norm(clip), reference(algorithm))
    updated = start(algorithm)
    expected = PARAMS
    state = reference.init(expected)
    for seed, finite in enumerate([True, True, False, True, True]):
        poison = 0 if finite else jnp.nan
        grads = jax.tree.map(lambda g, poison=poison: g + poison, random_grads(seed))
        updated = applied(updated, grads, algorithm)
        if finite:
            updates, state = reference.update(grads, state, expected)
            expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updated.params, expected)
    assert updated.skipped == 1


@pytest.mark.parametrize(
    "optimizer", [optimizers.adamw, optimizers.sgd, adafactor, optimizers.muon]
)
@pytest.mark.parametrize("loss, gradient", [(np.nan, 1.0), (0.0, np.inf), (0.0, np.nan)])
def test_an_update_that_is_not_finite_changes_nothing(optimizer, loss, gradient):
    algorithm = dataclasses.replace(PLAIN, optimizer=optimizer)
    params = {"w": jnp.ones((8, 8))}
    before = applied(start(algorithm, params), random_grads(0, params), algorithm)
    grads = random_grads(1, params) | {"w": random_grads(1, params)["w"].at[2, 3].set(gradient)}
    after = applied(before, grads, algorithm, loss)
    jax.tree.map(np.testing.assert_array_equal, after[:2], before[:2])
    assert after.skipped == before.skipped + 1


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_an_update_whose_scale_is_not_finite_changes_nothing(scale):
    before = start(PLAIN)
    after, _ = step.apply_update(
        before, jnp.float32(0.0), random_grads(0), make_config(), jnp.float32(scale)
    )
    jax.tree.map(np.testing.assert_array_equal, after[:2], before[:2])
    assert after.skipped == 1


def test_plain_sgd_is_optax_sgd():
    """Without weight decay and clipping: m <- beta1 m + g, w <- w - rate m."""
    algorithm = dataclasses.replace(PLAIN, optimizer=optimizers.sgd, grad_clip=1e9)
    reference = optax.sgd(algorithm.learning_rate, momentum=algorithm.beta1)
    updated = start(algorithm)
    expected = PARAMS
    state = reference.init(expected)
    for seed in range(3):
        grads = random_grads(seed)
        updated = applied(updated, grads, algorithm)
        updates, state = reference.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(updated.params["a"], expected["a"], rtol=1e-6)


def clipped_update(optimizer, clip):
    """One update from parameters of 0 with a gradient whose norm is 50."""
    algorithm = dataclasses.replace(PLAIN, optimizer=optimizer, grad_clip=clip)
    grads = {"a": jnp.array([30.0, 40.0])}
    return applied(start(algorithm, {"a": jnp.zeros(2)}), grads, algorithm)


def test_the_gradient_is_clipped_by_its_norm():
    """SGD from 0: the step is the rate times the clipped gradient, whose norm was 50."""

    def moved(clip):
        return -clipped_update(optimizers.sgd, clip).params["a"] / PLAIN.learning_rate

    np.testing.assert_allclose(moved(1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(moved(1e9), [30, 40], rtol=1e-6)


@pytest.mark.parametrize("optimizer, moment", [(optimizers.adamw, "mu"), (optimizers.sgd, "trace")])
def test_moments_are_those_of_the_clipped_gradient(optimizer, moment):
    clipped, plain = (
        optax.tree.get(clipped_update(optimizer, clip).opt_state, moment) for clip in (1.0, 1e9)
    )
    np.testing.assert_allclose(plain["a"], 50 * clipped["a"], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.sgd])
def test_a_clip_of_0_is_no_clip(optimizer):
    jax.tree.map(
        np.testing.assert_array_equal,
        clipped_update(optimizer, 0.0),
        clipped_update(optimizer, 1e9),
    )


def test_a_step_of_sgd_follows_the_gradient_s_norm():
    """One update from rest moves the parameters by rate * the gradient's norm."""
    config = make_config(optimizer=optimizers.sgd, grad_clip=1e9)
    before, state, metrics = run(config, make_scored())
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))
    assert metrics["grad_norm"] > 0.01
    np.testing.assert_allclose(
        moved, config.algorithm.learning_rate * metrics["grad_norm"], rtol=1e-4
    )


def test_adamw_is_what_an_experiment_gets():
    assert PLAIN.optimizer is None
    adam = start(PLAIN).opt_state[0]
    assert adam._fields == ("count", "mu", "nu")


def test_a_schedule_is_a_factor_of_the_learning_rate():
    schedule = optax.cosine_decay_schedule(1.0, 10, alpha=0.1)
    algorithm = dataclasses.replace(PLAIN, schedule=schedule, lr_warmup_steps=4)
    rate = optimizers.learning_rate(algorithm)
    expected = [0.01 * min(1, (i + 1) / 5) * schedule(i) for i in (0, 3, 7, 20)]
    np.testing.assert_allclose([rate(i) for i in (0, 3, 7, 20)], expected, rtol=1e-6)


def test_an_update_follows_the_schedule():
    """Of plain gradient descent: the second update is at a fifth of the rate."""
    falling = optax.piecewise_constant_schedule(1.0, {1: 0.2})
    algorithm = dataclasses.replace(
        PLAIN, optimizer=optimizers.sgd, schedule=falling, beta1=0.0, grad_clip=0.0
    )
    once = applied(start(algorithm), PARAMS, algorithm)
    twice = applied(once, PARAMS, algorithm)
    np.testing.assert_allclose(once.params["a"], (1 - 0.01) * PARAMS["a"], rtol=1e-6)
    np.testing.assert_allclose(twice.params["a"], once.params["a"] - 0.002 * PARAMS["a"], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.sgd])
def test_only_matrices_decay_under_their_mask(optimizer):
    """By one update without a gradient."""
    algorithm = dataclasses.replace(
        PLAIN, optimizer=functools.partial(optimizer, mask=optimizers.matrices), weight_decay=0.5
    )
    model = dataclasses.replace(MOE, qkv_bias=True, o_bias=True)
    params = jax.tree.map(jnp.ones_like, make_params(model))
    after = applied(start(algorithm, params), jax.tree.map(jnp.zeros_like, params), algorithm)
    decayed = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.params)
        if np.allclose(leaf, 1 - 0.01 * 0.5)
    }
    assert decayed == {*decoder.CONTRACTED, "router"}
    kept = [leaf for leaf in jax.tree.leaves(after.params) if np.all(leaf == 1)]
    # two norms of each layer and two of its heads, four biases; embedding, head and last norm
    assert len(kept) == 4 + 4 + 3


def muon_state(params):
    """Muon's own part of the optimizer's state, without AdamW's."""
    state = optimizers.muon(PLAIN).init(params)
    return state.inner_states["muon"].inner_state[0].mu


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_muon_takes_the_projections_and_experts_alone(model):
    params = make_params(model)
    axes = decoder.contracting_axes(model)
    contracted = jax.tree.map(lambda w, a: a is not None, params, axes)
    moments = jax.tree.map(
        lambda m: not isinstance(m, optax.MaskedNode),
        muon_state(params),
        is_leaf=lambda m: isinstance(m, optax.MaskedNode),
    )
    assert moments == contracted


@pytest.mark.parametrize(
    "name, shape, rows, columns",
    [
        ("q_proj", (2, 16, 2, 8), 16, 16),
        ("k_proj", (2, 16, 1, 8), 16, 8),
        ("o_proj", (2, 2, 8, 24), 16, 24),
        ("gate_proj", (2, 16, 32), 16, 32),
        ("down_proj", (2, 4, 32, 16), 32, 16),
    ],
)
def test_muon_orthogonalizes_the_matrix_that_a_projection_multiplies_by(name, shape, rows, columns):
    """Each layer's, each expert's: its singular values become about 1, times the scale."""
    params = {name: jnp.zeros(shape)}
    algorithm = dataclasses.replace(PLAIN, learning_rate=1.0)
    optimizer = optimizers.muon(algorithm)
    updates, _ = optimizer.update(random_grads(0, params), optimizer.init(params), params)
    matrices = updates[name].reshape(-1, rows, columns)
    values = np.linalg.svd(matrices, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
    assert len(matrices) == np.prod(shape) // (rows * columns)
    assert values.min() > 0.4 and values.max() < 1.3


def test_muon_leaves_adapters_to_adamw():
    adapters = {"q_proj": {"down": jnp.zeros((4, 2)), "up": jnp.zeros((2, 4))}}
    assert not jax.tree.leaves(muon_state(adapters))


def placed(optimizer, name):
    """The shardings in an optimizer's state of the tree `name`, those of the parameters, and the
    replicated one.
    """
    config = make_config(optimizer=optimizer)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    state = train_state.abstract(config, MODEL, mesh).opt_state
    tree = jax.tree.map(lambda leaf: leaf.sharding, optax.tree.get(state, name))
    return tree, train_state.params_shardings(MODEL, mesh), sharding.replicated(mesh)


@pytest.mark.parametrize(
    "optimizer, name",
    [(optimizers.adamw, "mu"), (optimizers.adamw, "nu"), (optimizers.sgd, "trace")]
    + [(scheduled_adam, "mu")],
)
def test_moments_lie_as_their_parameters_do(optimizer, name):
    moments, params, _ = placed(optimizer, name)
    assert moments == params


def test_muon_s_moments_lie_as_their_projections_do():
    config = make_config(optimizer=optimizers.muon)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    state = train_state.abstract(config, MODEL, mesh).opt_state
    moments = state.inner_states["muon"].inner_state[0].mu
    layers = zip(
        moments["stacks"], train_state.params_shardings(MODEL, mesh)["stacks"], strict=True
    )
    for of_layer, params in layers:
        places = {name: m.sharding for name, m in projections(of_layer).items()}
        assert places == {name: p for name, p in projections(params).items() if name in places}
        assert len(places) == len(decoder.CONTRACTED)


def projections(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path[-1].key: leaf for path, leaf in leaves if hasattr(path[-1], "key")}


@pytest.mark.parametrize("name", ["v_row", "v_col"])
def test_what_is_not_shaped_like_its_parameter_is_replicated(name):
    """A row of a stacked matrix may have the shape of a stacked norm, but not its path."""
    factors, _, replicated = placed(adafactor, name)
    assert all(place == replicated for place in jax.tree.leaves(factors))


@pytest.mark.parametrize("optimizer", [scheduled_adam, adafactor, optimizers.muon])
def test_sharded_is_unsharded(optimizer):
    config = make_config(optimizer=optimizer, microbatches=2)
    scored = make_scored()
    _, one, metrics = run(config, scored)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    _, split, split_metrics = run(config, scored, mesh)
    assert_close(split.params, one.params, 1e-5)
    assert abs(metrics["loss"] - split_metrics["loss"]) < 1e-6


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.sgd])
def test_moments_on_the_host_change_nothing(optimizer, minibatches):
    config = make_config(minibatches=minibatches, optimizer=optimizer)
    algorithm = dataclasses.replace(config.algorithm, offload=True)
    _, here, metrics = run(config, make_scored())
    _, there, offloaded = run(dataclasses.replace(config, algorithm=algorithm), make_scored())
    large = [leaf for leaf in jax.tree.leaves(there.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in large} == {sharding.HOST}
    assert metrics == offloaded
    jax.tree.map(
        np.testing.assert_array_equal, *map(jax.device_get, (here._asdict(), there._asdict()))
    )


def test_a_leaf_is_matched_by_shape_and_by_the_end_of_its_path():
    params = {"a": {"w": np.zeros((2, 3))}, "b": {"w": np.zeros((2, 3))}}
    state = (
        np.zeros(()),
        {"mu": params, "other": {"w": np.zeros((2, 3))}},
        {"a": {"w": np.zeros(2)}},
    )
    found = optimizers.map_param_like(state, params, {"a": {"w": "A"}, "b": {"w": "B"}}, "none")
    assert found == (
        "none",
        {"mu": {"a": {"w": "A"}, "b": {"w": "B"}}, "other": {"w": "none"}},
        {"a": {"w": "none"}},
    )
