"""Rollouts from old weights, on devices of their own."""

import dataclasses

import jax
import numpy as np
import pytest

from dcmdp_jax import sharding, starting, step, sync, train
from dcmdp_jax.batches import make_engine
from dcmdp_jax.checkpoint import Checkpoints
from dcmdp_jax.inputs import read_inputs
from support.training import assert_same_run, rows, tiny

pytestmark = pytest.mark.full

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
    """A reward that a policy of noise earns now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


def run_of(steps):
    run = tiny(steps=steps, **STALE)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=even))


@pytest.fixture(autouse=True)
def three_devices(monkeypatch):
    """One trains, two sample."""
    devices = jax.devices()[:3]
    monkeypatch.setattr(sharding.jax, "devices", lambda *args: devices)


def test_stale_rollouts_are_split_from_numerics_and_resume_exactly(tmp_path, monkeypatch):
    """The engine is exact, so delta stays at round-off however old the weights are; what the age
    adds is told apart.
    """
    versions = []
    train_rollout = train.rollout
    monkeypatch.setattr(
        train,
        "rollout",
        lambda *args, **kw: versions.append(out := train_rollout(*args, **kw)) or out,
    )
    train.train(run_of(4), tmp_path / "whole")
    seen = [
        sorted({*out.version[np.arange(out.tokens.shape[1]) < out.lengths[:, None]].tolist()})
        for out in versions
    ]
    assert seen == [[0], [0], [0], [1]]
    logged = rows(tmp_path / "whole")
    assert all(row["delta_mean"] < 1e-5 and row["gap_numerics"] < 1e-4 for row in logged)
    assert logged[0]["gap_staleness"] == 0 and all(
        row["gap_staleness"] > 1e-3 for row in logged[1:]
    )

    train.train(run_of(2), tmp_path / "parts")
    train.train(run_of(4), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run_of(4))


def test_sampling_ahead_changes_nothing_but_the_order(tmp_path, monkeypatch):
    """The next batch is sampled before the update's metrics are read; a loop that waits for each
    update gets the same.
    """
    run = run_of(4)
    order = []
    inner = train.rollout
    write = train.metrics.Log.write
    monkeypatch.setattr(
        train, "rollout", lambda *args, **kw: order.append("sample") or inner(*args, **kw)
    )
    monkeypatch.setattr(
        train.metrics.Log, "write", lambda log, *row: order.append("read") or write(log, *row)
    )
    train.train(run, tmp_path)
    assert order == ["sample", "sample", "read", "sample", "read", "sample", "read", "read"]

    inputs = read_inputs(run)
    state = starting.first_state(run, inputs, tmp_path, lambda: False)
    update = step.compile(run, inputs.model_config, inputs.mesh)
    engine = make_engine(run, inputs)
    to_engine = sync.converter(inputs.model_config, run.rollout.precision, inputs.decode_mesh)
    for row in rows(tmp_path):
        policy = to_engine(*step.sampled_from(state))
        collected = train._collect(run, inputs, engine, lambda: False, policy, int(state.step))
        state, values = jax.block_until_ready(update(state, collected.batch))
        sampled = {"tokens": collected.tokens, "truncated": collected.truncated}
        numbers = {name: x.item() for name, x in values.items() if name in row}
        assert row == {"step": int(state.step)} | sampled | numbers


def test_the_state_holds_the_last_parameters_oldest_first(tmp_path):
    run = run_of(3)
    inputs = read_inputs(run)
    assert not set(inputs.mesh.devices.flat) & set(inputs.decode_mesh.devices.flat)
    train.train(run, tmp_path)
    saved = Checkpoints(tmp_path, 2)
    state = starting.restore(saved, run, inputs)
    saved.close()
    params, version = step.sampled_from(state)
    assert len(state.stale) == 2 and int(version) == 1 and params is state.stale[0]
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
        ({"rollout.precision.weights": "int3"}, "precision.weights='int3' is not one of float32"),
        ({"rollout.precision.cache": "int4"}, "the cache cannot hold 'int4'"),
        (
            {"rollout.precision.experts_per_token": 3},
            "precision.experts_per_token=3 must lie in 1..0",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.prepare(tiny(steps=1, **(STALE | changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
