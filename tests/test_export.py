"""A run's weights as a Hugging Face folder."""

import subprocess

import jax
import numpy as np
import pytest

from dcmdp_jax.models import weights
from dcmdp_jax.run import starting
from dcmdp_jax.run.checkpoint import Checkpoints
from dcmdp_jax.run.folder import write_config
from dcmdp_jax.run.inputs import read_inputs
from support.training import CHILD, QUICKSTART, child_environment, dcmdp, tiny

pytestmark = pytest.mark.full
POD = {
    "model.architecture.num_experts": 8,
    "model.architecture.experts_per_token": 2,
    "model.architecture.expert_size": 8,
    "mesh.expert": 8,
    "rollout.devices": -1,
    "rollout.mesh.fsdp": 8,
    "rollout.staleness": 1,
    "warmup.steps": 0,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """What a run on eight devices starts from, and the folder that a process with one device makes
    of its checkpoint.
    """
    workdir = tmp_path_factory.mktemp("run")
    run = tiny(**POD)
    inputs = read_inputs(run)
    write_config(workdir, run)
    state = starting.first_state(run, inputs, workdir, lambda: False)
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(state, inputs.prompts.get_state())
    checkpoints.close()
    folder = workdir / "out"
    convert = ["convert", QUICKSTART, str(folder), "--workdir", str(workdir)]
    subprocess.run([*CHILD, *convert], env=child_environment(), check=True)
    return state, folder


def test_a_run_of_eight_devices_is_converted_on_one(converted):
    state, folder = converted
    assert len(state.params["embed"].sharding.device_set) == 8
    _, params = weights.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_the_folder_brings_its_characters_along(converted, capsys):
    _, folder = converted
    assert dcmdp(["generate", str(folder), "3+5*2=", "--max-tokens", "4"]) == 0
    assert "3+5*2=\n  -> " in capsys.readouterr().out


def test_without_a_checkpoint_there_is_nothing_to_convert(tmp_path, capsys):
    command = ["convert", QUICKSTART, str(tmp_path / "out"), "--workdir", str(tmp_path / "none")]
    assert dcmdp(command) == 2
    assert "holds no checkpoints; give the run's --workdir" in capsys.readouterr().err
