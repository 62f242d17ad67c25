"""The reference policy: where it starts, how it moves, the penalty in the loss or the reward."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import (
    compiled_step,
    objective,
    optimizers,
    reference,
    sharding,
    step_metrics,
    train_state,
    trainer_scores,
)
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.losses import advantages, kl
from dcmdp_jax.models import weights
from dcmdp_jax.models.decoder import init
from dcmdp_jax.records import Batch
from dcmdp_jax.run import inputs, starting
from dcmdp_jax.tokens import packing
from support import adapters
from support.steps import (
    MODEL,
    ONE,
    assert_close,
    fresh_state,
    make_config,
    make_params,
    make_scored,
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


# of logp, old_logp and x = ref_logp - logp, in float64
VALUES = {
    kl.k1: lambda logp, old, x: -x,
    kl.k2: lambda logp, old, x: x**2 / 2,
    kl.k3: lambda logp, old, x: np.exp(x) - 1 - x,
    kl.k3_k2_gradient: lambda logp, old, x: np.exp(x) - 1 - x,
    kl.unbiased: lambda logp, old, x: np.exp(logp - old) * (np.exp(x) - 1 - x),
}
# and the derivatives of the sum over tokens by logp
SLOPES = {
    kl.k1: lambda logp, old, x: np.ones_like(x),
    kl.k2: lambda logp, old, x: -x,
    kl.k3: lambda logp, old, x: 1 - np.exp(x),
    kl.k3_k2_gradient: lambda logp, old, x: -x,
    kl.unbiased: lambda logp, old, x: np.exp(logp - old) * -x,
}
by_name = pytest.mark.parametrize("function", VALUES, ids=lambda function: function.__name__)


def test_no_estimator_is_left_out():
    members = inspect.getmembers(kl, inspect.isfunction)
    estimators = {f for name, f in members if f.__module__ == kl.__name__ and name[0] != "_"}
    assert estimators == set(VALUES) == set(SLOPES)


def made_up():
    """A minibatch [A, n, T] with the log-probs of its policy."""
    shape = (2, 3, 4)
    rng = np.random.default_rng(0)
    logp, old, kept = (np.float32(-rng.exponential(1.0, shape)) for _ in range(3))
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(
        mask=np.arange(4) < rng.integers(1, 5, (2, 3, 1)),
        rollout_logp=old,
        reward=rng.normal(size=(2, 3)).astype(np.float32),
    )
    return logp, objective.Minibatch(batch, old, kept, np.zeros(shape, np.float32))


def in_float64(of, function):
    """`of[function]` of the made-up minibatch; 0 off the mask."""
    logp, minibatch = made_up()
    logp, old, kept = (np.float64(x) for x in (logp, *minibatch[1:3]))
    return np.where(minibatch.batch.mask, of[function](logp, old, kept - logp), 0)


@by_name
def test_the_loss_has_the_mean_penalty_by_any_estimator(function):
    """Value and gradient; the advantages are 0."""
    logp, minibatch = made_up()
    config = with_reference(function)
    value, slope = jax.value_and_grad(objective.loss_of)(
        jnp.asarray(logp), minibatch, jnp.float32(0.0), config
    )
    weight = 0.5 / minibatch.batch.mask.sum()
    np.testing.assert_allclose(value, weight * in_float64(VALUES, function).sum(), rtol=1e-5)
    expected = weight * in_float64(SLOPES, function)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


@by_name
def test_in_the_reward_it_is_summed_over_each_completion(function):
    """Without a ratio: rewards are of the policy that sampled. The loss has no penalty then."""
    logp, minibatch = made_up()
    config = with_reference(function, reference_in_reward=True)
    charge = objective.reference_charge(minibatch.batch, logp, minibatch.ref_logp, config)
    x = np.float64(minibatch.ref_logp) - np.float64(logp)
    penalty = np.where(minibatch.batch.mask, VALUES[function](logp, logp, x), 0)
    np.testing.assert_allclose(charge, 0.5 * penalty.sum(-1), rtol=1e-5, atol=1e-6)
    plain = objective.loss_of(jnp.asarray(logp), minibatch, jnp.float32(0.0), make_config())
    assert objective.loss_of(jnp.asarray(logp), minibatch, jnp.float32(0.0), config) == plain


def test_it_is_charged_after_the_reward_is_shaped():
    """Shaping reads the verifier's scale: what it counts as right stays right."""

    def fine(reward, length, truncated, group, *, num_groups):
        return jnp.where(reward > 0, 10.0, 0.0)

    _, minibatch = made_up()
    batch = minibatch.batch._replace(
        reward=jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        group=jnp.array([[0, 0, 0], [1, 1, 1]]),
        length=jnp.ones((2, 3), jnp.int32),
        truncated=jnp.zeros((2, 3), bool),
    )
    charge = jnp.array([[3.0, -3.0, 0.0], [0.0, 0.0, 6.0]])
    config = with_reference(reference_in_reward=True, reward_shaping=fine)
    algorithm = dataclasses.replace(config.algorithm, advantage=advantages.dr_grpo)
    config = dataclasses.replace(config, algorithm=algorithm)
    expected = [[7 - 10 / 3, 3 - 10 / 3, 0 - 10 / 3], [10 - 4 / 3, 0 - 4 / 3, -6 - 4 / 3]]
    found = objective.group_advantage(batch, config, charge)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-5)


def test_a_penalty_in_the_reward_needs_the_log_probs_first():
    assert compiled_step.in_one_pass(with_reference())
    assert not compiled_step.in_one_pass(with_reference(reference_in_reward=True))


def test_the_mean_kl_in_the_metrics_is_by_k3():
    logp, minibatch = made_up()
    metrics = step_metrics.option_metrics(minibatch.batch, logp, minibatch.ref_logp, None, None)
    expected = in_float64(VALUES, kl.k3).sum() / minibatch.batch.mask.sum()
    np.testing.assert_allclose(metrics["ref_kl"], expected, rtol=1e-5)


def shifted_reference(config, mesh=ONE):
    """A fresh state with a reference that differs from its parameters."""
    state = fresh_state(config, MODEL, mesh)
    shifted = jax.tree.map(
        lambda w: w + 0.3 * jnp.sin(jnp.arange(w.size)).reshape(w.shape), state.reference
    )
    places = train_state.shardings(config, MODEL, mesh).reference
    return state._replace(reference=jax.device_put(shifted, places))


def updated(config, mesh=ONE, alter=lambda batch: batch):
    """The state and the metrics of one step from a shifted reference."""
    algorithm = config.algorithm
    batch = packing.pack(
        make_scored(),
        minibatches=algorithm.minibatches,
        microbatches=algorithm.microbatches,
        row_length=24,
        row_divisor=sharding.num_batch_shards(mesh),
        seed=1,
        share_prompts=True,
    )
    batch = jax.device_put(alter(batch), train_state.batch_shardings(config, mesh))
    state = shifted_reference(config, mesh) if algorithm.reference_penalty else None
    state = fresh_state(config, MODEL, mesh) if state is None else state
    state, metrics = compiled_step.compile_step(config, MODEL, mesh)(state, batch)
    return state, jax.device_get(metrics)


# linear in the gradients, so that round-off stays small
MOVING = {"optimizer": optimizers.sgd, "reference_update": reference.ema(0.5)}


@pytest.fixture(scope="module")
def on_four_devices():
    """A step on a mesh, in two microbatches, near a reference that moves."""
    config = with_reference(kl.unbiased, 5.0, microbatches=2, **MOVING)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    return updated(config, mesh)


@pytest.mark.full
def test_microbatches_and_devices_change_nothing(on_four_devices):
    state, metrics = on_four_devices
    one, expected = updated(with_reference(kl.unbiased, 5.0, **MOVING))
    assert_close((state.params, state.reference), (one.params, one.reference), 1e-5)
    assert abs(metrics["ref_kl"] - expected["ref_kl"]) < 1e-5
    assert abs(metrics["loss"] - expected["loss"]) < 1e-5


@pytest.mark.full
def test_the_reference_is_an_average_of_itself_and_the_policy(on_four_devices):
    state, _ = on_four_devices
    before = shifted_reference(with_reference(**MOVING)).reference
    expected = jax.tree.map(lambda r, p: 0.5 * r + 0.5 * p, before, jax.device_get(state.params))
    assert_close(state.reference, expected, 1e-6)


@pytest.mark.full
def test_in_the_reward_it_is_charged_before_the_advantage():
    """The step is that of a verifier that gave the rewards less the penalties' sums; the metrics
    have its own.
    """
    charge = np.float32(0.3)

    def constant(logp, ref_logp, mask):
        return jnp.where(mask & (logp < -2.5), charge, 0.0)

    config = with_reference(constant, 1.0, reference_in_reward=True, optimizer=optimizers.sgd)
    state, metrics = updated(config)
    plain = make_config(optimizer=optimizers.sgd)

    def charged(batch):
        score = jax.jit(lambda params: trainer_scores.score(params, batch, plain, MODEL)[0])
        count = jnp.sum(batch.mask & (score(make_params()) < -2.5), axis=-1)
        return batch._replace(reward=np.asarray(batch.reward - charge * count))

    expected, of_charged = updated(plain, alter=charged)
    assert_close(state.params, expected.params, 1e-6)
    assert metrics["reward"] == make_scored().reward.mean() != of_charged["reward"]


def test_the_reference_is_a_copy_of_the_starting_parameters():
    """The step donates both."""
    state = train_state.init(with_reference(), make_params())
    jax.tree.map(np.testing.assert_array_equal, state.reference, state.params)
    assert state.reference["embed"] is not state.params["embed"]


def test_without_a_penalty_no_reference_is_kept():
    state = jax.eval_shape(lambda: train_state.init(make_config(), init(jax.random.key(0), MODEL)))
    assert state.reference == ()


def test_adapters_have_adapters_as_their_reference():
    """The frozen parameters need no copy."""
    config = adapters.adapted(with_reference())
    state = jax.eval_shape(lambda: train_state.init(config, init(jax.random.key(0), MODEL)))
    assert state.reference == state.params


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
