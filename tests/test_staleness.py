"""Rollouts from old weights, on devices of their own."""

import dataclasses

import jax
import numpy as np
import pytest

from dcmdp_jax import compiled_step, train_state
from dcmdp_jax import train as loop
from dcmdp_jax.batches import Batches
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.run import starting
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream
from support.training import assert_same_run, rows, saved, tiny, train

pytestmark = pytest.mark.full

DEVICES = jax.devices()[:3]  # one trains, two sample
STALE = {
    "rollout.precision.weights": "float32",
    "rollout.staleness": 2,
    "rollout.devices": 2,
    "algorithm.learning_rate": 0.03,
    "rollout.slots": 8,
    "mesh.fsdp": 0,
    "checkpoint.every": 0,
}


def even(example, text):
    """A reward that random weights earn now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


def run_of(steps):
    run = tiny(steps=steps, **STALE)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=even))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps, its rollouts, and the order of rollouts and rows."""
    workdir = tmp_path_factory.mktemp("four")
    rollouts = []
    order = []
    sample = JetStreamSampler.sample
    write = metrics.Log.write

    def recorded(*args, **options):
        order.append("sample")
        rollouts.append(sample(*args, **options))
        return rollouts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JetStreamSampler, "sample", recorded)
        patch.setattr(
            metrics.Log, "write", lambda log, *row: order.append("row") or write(log, *row)
        )
        train(run_of(4), workdir, DEVICES)
    return workdir, rollouts, order


def test_a_rollout_is_sampled_from_weights_two_steps_old(four_steps):
    versions = [
        set(out.version[np.arange(out.tokens.shape[1]) < out.lengths[:, None]].tolist())
        for out in four_steps[1]
    ]
    assert versions == [{0}, {0}, {0}, {1}]


def test_an_exact_engine_has_no_discrepancy_however_old_its_weights(four_steps):
    for row in rows(four_steps[0]):
        assert row["delta_mean"] < 1e-5 and row["gap_numerics"] < 1e-4


def test_what_age_adds_to_the_gap_has_a_metric_of_its_own(four_steps):
    first, *later = (row["gap_staleness"] for row in rows(four_steps[0]))
    assert first == 0 and min(later) > 1e-3


def test_a_run_with_stale_rollouts_resumes_bit_for_bit(four_steps, tmp_path):
    train(run_of(2), tmp_path, DEVICES)
    train(run_of(4), tmp_path, DEVICES)
    assert_same_run(four_steps[0], tmp_path, run_of(4), DEVICES)


def test_the_next_batch_is_sampled_before_the_update_is_read(four_steps):
    expected = ["sample", "sample", "row", "sample", "row", "sample", "row", "row"]
    assert four_steps[2] == expected


def test_a_loop_that_waits_for_each_update_gets_the_same(four_steps, tmp_path):
    run = run_of(4)
    inputs = read_inputs(run, DEVICES)
    state = starting.first_state(run, inputs, tmp_path, lambda: False)
    update = compiled_step.compile_step(run, inputs.model_config, inputs.mesh)
    batches = Batches(run, inputs, state, lambda: False)
    for row in rows(four_steps[0]):
        params, version = train_state.sampled_from(state, run)
        batches.sampler.update_weights(params, int(version))
        batch = batches.collect(Stream.ROLLOUT, int(state.step))
        state, values = jax.block_until_ready(update(state, batch.packed))
        numbers = {name: x.item() for name, x in values.items() if name in row}
        assert row == {"step": int(state.step)} | batch.metrics | numbers


def test_training_and_sampling_share_no_device():
    inputs = read_inputs(run_of(1), DEVICES)
    assert not set(inputs.mesh.devices.flat) & set(inputs.decode_mesh.devices.flat)


def test_the_state_holds_the_last_parameters_oldest_first(four_steps):
    state, _ = saved(four_steps[0], run_of(4), DEVICES)
    params, version = train_state.sampled_from(state, run_of(4))
    assert len(state.stale) == 2 and int(version) == 2 and params is state.stale[0]
    distance = [
        sum(
            float(abs(a - b).sum())
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(state.params))
        )
        for old in state.stale
    ]
    assert distance[0] > distance[1] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.devices": 4}, "rollout.devices=4 are more than the 3 there are"),
        ({"rollout.mesh.tensor": 4}, "rollout.mesh.data=1"),
        ({"rollout.staleness": -1}, "rollout.staleness=-1 must not be negative"),
        (
            {"rollout.precision.weights": "int3"},
            "rollout.precision.weights='int3' is not one of float32",
        ),
        ({"rollout.precision.cache": "int4"}, "the cache cannot hold 'int4'"),
        (
            {"rollout.precision.experts_per_token": 3},
            "rollout.precision.experts_per_token=3 must lie in 1..0",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loop.prepare(tiny(steps=1, **(STALE | changes)), tmp_path / "run", DEVICES)
    assert not (tmp_path / "run").exists()
