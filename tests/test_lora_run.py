"""Runs that train adapters: sampled, saved, resumed and exported."""

import shutil

import jax
import numpy as np
import pytest

from dcmdp_jax import train_state
from dcmdp_jax.models import weights
from dcmdp_jax.run import checkpoint, starting
from dcmdp_jax.run.export import export, export_adapters
from dcmdp_jax.run.inputs import read_inputs, read_tokenizer
from dcmdp_jax.tokens import tokenizer as tokenizers
from support import mismatch
from support.random_params import random_params
from support.training import ONE_DEVICE, assert_same_run, rows, saved, tiny, train

pytestmark = pytest.mark.full

RANK = {"model.lora.rank": 2}
NF4 = {"model.lora.base": "nf4", "model.lora.base_group": 4}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run with frozen weights in four bits, and the same one in two parts."""
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("whole", "parts"))
    train(tiny(steps=4, **RANK, **NF4), whole)
    train(tiny(steps=2, **RANK, **NF4), parts)
    train(tiny(steps=4, **RANK, **NF4), parts)
    return whole, parts


def test_resumed_equals_uninterrupted(four_steps):
    assert_same_run(*four_steps, tiny(steps=4, **RANK, **NF4))


def test_a_checkpoint_holds_the_adapters_alone(four_steps):
    """In Orbax's own list of the arrays of a checkpoint."""
    workdir, _ = four_steps
    assert checkpoint.steps(workdir) == [0, 4]
    stored = (workdir / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "q_proj" in stored and "embed" not in stored
    frozen = (workdir / "frozen" / "state" / "_METADATA").read_text()
    assert "embed" in frozen and "down" not in frozen.replace("down_proj", "")


def test_damaged_frozen_weights_are_refused(four_steps, tmp_path):
    workdir = shutil.copytree(four_steps[0], tmp_path / "damaged")
    for path in (workdir / "frozen" / "state").rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(checkpoint.NoReadableCheckpoint, match="the frozen weights of the run"):
        saved(workdir, tiny(steps=4, **RANK, **NF4))


def test_an_exact_engine_samples_the_sum(tmp_path):
    """An engine that sampled from the frozen weights alone would show a gap."""
    train(tiny(steps=3, **RANK, **{"rollout.precision.weights": "float32"}), tmp_path)
    assert all(row["delta_mean"] < 1e-5 for row in rows(tmp_path))


def test_the_export_is_the_sum(four_steps, tmp_path):
    workdir, _ = four_steps
    run = tiny(steps=4, **RANK, **NF4)
    state, _ = saved(workdir, run)
    export(run, workdir, str(tmp_path / "model"))
    _, exported = weights.load(str(tmp_path / "model"))
    policy = train_state.policy_params(state, run)["stacks"][0]["mlp"]["up_proj"]
    base = np.asarray(policy.base.dequantize(), np.float64)
    expected = base + policy.scale * np.float64(policy.down) @ np.float64(policy.up)
    got = exported["stacks"][0]["mlp"]["up_proj"]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - base).max() > 1e-4


def test_adapters_are_converted_and_started_from(tmp_path):
    """A folder of adapters on a folder's weights: what one run ends with, another begins with."""
    plain = tiny(**{"warmup.steps": 0})
    params = random_params(plain.model.architecture, 0.1)
    weights.save(tmp_path / "base", plain.model.architecture, params)
    tokenizers.save(read_tokenizer(plain), tmp_path / "base")
    on_base = {"model.folder": tmp_path / "base", "warmup.steps": 0, **RANK}
    mismatch.make_run(tmp_path / "run", tiny(**on_base), [3])
    export_adapters(tiny(**on_base), tmp_path / "run", str(tmp_path / "adapter"))
    run = tiny(**on_base, **{"model.lora.folder": tmp_path / "adapter"})
    inputs = read_inputs(run, ONE_DEVICE)
    state = starting.first_state(run, inputs, tmp_path, lambda: False)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.full_like(x, 3)), state.params)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, params)


def test_adapters_of_weights_that_are_in_no_folder_are_not_converted(four_steps, tmp_path):
    with pytest.raises(ValueError, match="weights that are in no folder"):
        export_adapters(tiny(steps=4, **RANK, **NF4), four_steps[0], str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="no adapter to write"):
        export_adapters(tiny(), four_steps[0], str(tmp_path / "adapter"))
