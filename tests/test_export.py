"""A run's weights as a Hugging Face folder."""

import jax
import numpy as np
import pytest

from dcmdp_jax.models import weights
from support.training import QUICKSTART, dcmdp, tiny, train

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a run of one step, and its state."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(tiny(steps=1), workdir)


def convert(workdir, out, *words):
    return dcmdp(["convert", QUICKSTART, str(out), "--workdir", str(workdir), *words])


def test_the_folder_brings_its_characters_along(one_step, tmp_path, capsys):
    assert convert(one_step[0], tmp_path / "out") == 0
    assert dcmdp(["generate", str(tmp_path / "out"), "3+5*2=", "--max-tokens", "4"]) == 0
    assert "3+5*2=\n  -> " in capsys.readouterr().out


def test_a_run_is_converted_where_its_meshes_do_not_fit(one_step, tmp_path):
    """On one device, with eight that train over experts and four that sample by tensor."""
    workdir, state = one_step
    meshes = "--mesh.expert 8 --mesh.fsdp 2 --rollout.devices -1 --rollout.mesh.tensor 4"
    assert convert(workdir, tmp_path / "out", *meshes.split()) == 0
    _, params = weights.load(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_without_a_checkpoint_there_is_nothing_to_convert(tmp_path, capsys):
    assert convert(tmp_path / "none", tmp_path / "out") == 2
    assert "holds no checkpoints; give the run's --workdir" in capsys.readouterr().err
