"""The reference policy: where it starts, how it moves, the penalty in the loss or the reward."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import (
    compiled_step,
    constraint,
    optimizers,
    reference,
    sharding,
    step,
    train_state,
)
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.losses import kl
from dcmdp_jax.models import weights
from dcmdp_jax.models.decoder import init
from dcmdp_jax.run import inputs, starting
from dcmdp_jax.tokens import packing
from support import adapters
from support.steps import (
    MODEL,
    ONE,
    assert_close,
    fresh_state,
    make_config,
    make_scored,
    run,
)
from support.training import ONE_DEVICE, tiny


def test_a_moving_average():
    moved = reference.ema(0.75)({"w": jnp.float32(8.0)}, {"w": jnp.float32(4.0)}, jnp.int32(1))
    assert moved["w"] == 0.75 * 8 + 0.25 * 4


def test_a_reset_is_every_nth_step():
    update = reference.reset_every(3)
    before = {"w": jnp.float32(1.0)}
    policies = [{"w": jnp.float32(10.0 + number)} for number in range(1, 7)]
    seen = []
    for number, policy in enumerate(policies, start=1):
        before = update(before, policy, jnp.int32(number))
        seen.append(float(before["w"]))
    assert seen == [1, 1, 13, 13, 13, 16]


@pytest.mark.parametrize("make", [lambda: reference.ema(1.0), lambda: reference.reset_every(0)])
def test_an_update_that_does_nothing_or_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="0 <= decay < 1 and every >= 1"):
        make()


def log_probs(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(-rng.exponential(1.0, (3, 5)), jnp.float32)


def test_a_penalty_that_needs_the_old_log_probs_gets_them():
    logp, old_logp, ref_logp = map(log_probs, range(3))
    mask = jnp.ones(logp.shape, bool)
    algorithm = make_config(reference_penalty=kl.unbiased, reference_coefficient=0.5).algorithm
    found = reference.penalty(algorithm, logp, old_logp, ref_logp, mask)
    np.testing.assert_array_equal(found, 0.5 * kl.unbiased(logp, old_logp, ref_logp, mask))


@pytest.mark.parametrize(
    "options",
    [
        {"reference_coefficient": 0.1},
        {"reference_in_reward": True},
        {"reference_folder": "somewhere"},
        {"reference_update": reference.ema(0.9)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_without_a_penalty_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} needs algorithm.reference_pen"):
        make_config(**options)


def with_reference(penalty=kl.k3, coefficient=0.5, **algorithm):
    return make_config(reference_penalty=penalty, reference_coefficient=coefficient, **algorithm)


def shifted_reference(config, mesh=ONE):
    """A fresh state with a reference that differs from its parameters."""
    state = fresh_state(config, MODEL, mesh)
    shifted = jax.tree.map(
        lambda w: w + 0.3 * jnp.sin(jnp.arange(w.size)).reshape(w.shape), state.reference
    )
    places = train_state.shardings(config, MODEL, mesh).reference
    return state._replace(reference=jax.device_put(shifted, places))


def packed(config, mesh=ONE):
    algorithm = config.algorithm
    batch = packing.pack(
        make_scored(),
        minibatches=algorithm.minibatches,
        microbatches=algorithm.microbatches,
        row_length=24,
        row_divisor=sharding.num_batch_shards(mesh),
        seed=1,
    )
    return jax.device_put(batch, train_state.batch_shardings(config, mesh))


def updated(config, state, mesh=ONE):
    """One step: (state, metrics)."""
    return compiled_step.compile_step(config, MODEL, mesh)(state, packed(config, mesh))


VALUES = {
    kl.k1: lambda x: -x,
    kl.k2: lambda x: x**2 / 2,
    kl.k3: lambda x: np.exp(x) - 1 - x,
    kl.k3_k2_gradient: lambda x: np.exp(x) - 1 - x,
    kl.unbiased: lambda x: np.exp(x) - 1 - x,  # the ratio is 1 before the first update
}


def penalties(function, state, batch):
    """The penalty of each token at the starting weights, re-derived in float64; 0 off the mask."""
    config = make_config()
    score = jax.jit(lambda params: step.score(params, batch, config, MODEL)[0])
    policy, kept = (np.asarray(score(p), np.float64) for p in (state.params, state.reference))
    return np.where(batch.mask, VALUES[function](kept - policy), 0)


@pytest.fixture(scope="module")
def without():
    """A step of four microbatches without a reference: (state, metrics)."""
    config = make_config(microbatches=4)
    return updated(config, fresh_state(config, MODEL, ONE))


@pytest.mark.full
@pytest.mark.parametrize("function", VALUES, ids=lambda function: function.__name__)
def test_the_loss_has_the_penalty_by_any_estimator(function, without):
    """Its value is the mean over tokens, and it changes the update."""
    config = with_reference(function, microbatches=4)
    state = shifted_reference(config)
    expected = penalties(function, state, packed(config)).sum() / packed(config).mask.sum()
    state, metrics = updated(config, state)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(metrics["loss"] - without[1]["loss"], 0.5 * expected, rtol=1e-4)
    assert state.skipped == 0
    assert np.abs(state.params["embed"] - without[0].params["embed"]).max() > 1e-4


def test_no_estimator_is_left_out():
    members = inspect.getmembers(kl, inspect.isfunction)
    estimators = {f for name, f in members if f.__module__ == kl.__name__ and name[0] != "_"}
    assert estimators == set(VALUES)


@pytest.mark.full
@pytest.mark.parametrize("function", [kl.k1, kl.unbiased], ids=["k1", "unbiased"])
def test_in_the_reward_it_is_charged_before_the_advantage(function, without):
    """The step is that of rewards less the penalties' sums; the reported reward stays."""
    config = with_reference(function, 0.2, microbatches=4, reference_in_reward=True)
    assert not compiled_step.in_one_pass(config)
    state = shifted_reference(config)
    batch = packed(config)
    charge = 0.2 * penalties(function, state, batch).sum(-1)
    plain = make_config(microbatches=4)
    charged = batch._replace(reward=jnp.asarray(batch.reward - charge, jnp.float32))
    expected, _ = compiled_step.compile_step(plain, MODEL, ONE)(
        fresh_state(plain, MODEL, ONE), charged
    )
    state, metrics = updated(config, state)
    assert_close(state.params, expected.params)
    assert metrics["reward"] == without[1]["reward"]
    assert np.abs(state.params["embed"] - without[0].params["embed"]).max() > 1e-4


@pytest.mark.full
def test_the_mean_kl_is_in_the_metrics_whatever_the_estimator():
    config = with_reference(kl.k2)
    state = shifted_reference(config)
    batch = packed(config)
    expected = penalties(kl.k3, state, batch).sum() / batch.mask.sum()
    np.testing.assert_allclose(updated(config, state)[1]["ref_kl"], expected, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("in_reward", [False, True], ids=["loss", "reward"])
def test_microbatches_and_devices_change_nothing(in_reward):
    """With an optimizer that is linear in the gradients, and a reference that moves."""
    options = {
        "optimizer": optimizers.sgd,
        "reference_in_reward": in_reward,
        "reference_update": reference.ema(0.5),
    }
    config = with_reference(kl.unbiased, **options)
    one, metrics = updated(config, shifted_reference(config))
    config = with_reference(kl.unbiased, microbatches=2, **options)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    split, split_metrics = updated(config, shifted_reference(config, mesh), mesh)
    assert_close((split.params, split.reference), (one.params, one.reference), 1e-5)
    assert abs(metrics["ref_kl"] - split_metrics["ref_kl"]) < 1e-5


@pytest.mark.full
def test_a_penalty_pulls_in_any_number_of_parts():
    """Of several updates too."""
    one_part = with_reference(kl.k2, 1.0, minibatches=2)
    parts = with_reference(kl.k2, 1.0, minibatches=2, microbatches=2)
    one, _ = updated(one_part, shifted_reference(one_part))
    many, _ = updated(parts, shifted_reference(parts))
    assert_close(many.params, one.params)


@pytest.mark.full
def test_a_penalty_brings_the_policy_nearer_to_the_reference():
    config = with_reference(kl.k2, 10.0)
    state = shifted_reference(config)
    reference_params = jax.tree.map(jnp.copy, state.reference)
    start = jax.tree.map(jnp.copy, state.params)
    batch = packed(config)
    after, _ = updated(config, state)

    def distance(params):
        logp, _ = step.score(params, batch, config, MODEL)
        ref_logp, _ = step.score(reference_params, batch, config, MODEL)
        return constraint.measure(
            *(x.reshape(-1, x.shape[-1]) for x in (logp, ref_logp, batch.mask))
        )[0]

    assert jax.jit(distance)(after.params) < 0.9 * jax.jit(distance)(start)


@pytest.mark.full
def test_the_reference_is_the_starting_parameters_and_stays():
    before, state, _ = run(with_reference(), make_scored())
    jax.tree.map(np.testing.assert_array_equal, state.reference, before)


@pytest.mark.full
def test_adapters_have_adapters_as_their_reference():
    """It follows them, and needs no copy of the frozen parameters."""
    config = adapters.adapted(with_reference(reference_update=reference.ema(0.75)))
    start = fresh_state(config, MODEL, ONE).params
    _, state, metrics = run(config, make_scored())
    expected = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * p, start, state.params)
    assert_close(state.reference, expected, 1e-6)
    assert np.abs(state.reference["up"]).max() > 1e-5
    assert abs(metrics["ref_kl"]) < 1e-6, "both start at the frozen parameters"


def test_without_a_penalty_no_reference_is_kept():
    state = jax.eval_shape(lambda: train_state.init(make_config(), init(jax.random.key(0), MODEL)))
    assert state.reference == ()


def test_a_folder_of_all_parameters_is_no_reference_of_adapters():
    with pytest.raises(ValueError, match="reference_folder holds all parameters"):
        adapters.adapted(with_reference(reference_folder="somewhere"))


def starting_from(folder, tmp_path):
    """The first state of a tiny run whose reference is a folder's model."""
    options = {"warmup.steps": 0, "data.prompts_per_step": 4}
    run = tiny(**options)
    algorithm = dataclasses.replace(
        run.algorithm, reference_penalty=kl.k3, reference_folder=str(folder)
    )
    run = dataclasses.replace(run, algorithm=algorithm)
    return starting.first_state(run, inputs.read_inputs(run, ONE_DEVICE), tmp_path, lambda: False)


@pytest.mark.full
def test_the_reference_is_a_folder_s_model(tmp_path):
    model = dataclasses.replace(tiny().model.architecture, compute=tiny().model.compute)
    params = init(jax.random.key(7), model)
    weights.save(tmp_path / "model", model, params)
    state = starting_from(tmp_path / "model", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.reference, params)
    assert np.abs(state.params["embed"] - params["embed"]).max() > 1e-3


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    model = dataclasses.replace(tiny().model.architecture, num_layers=3)
    weights.save(tmp_path / "model", model, init(jax.random.key(7), model))
    with pytest.raises(ValueError, match=r"another architecture .* differs in num_layers\)"):
        starting_from(tmp_path / "model", tmp_path)
