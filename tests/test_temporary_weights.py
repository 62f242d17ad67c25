"""The folders of weights that runs without a `rollout.weights_folder` write."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from dcmdp_jax.rollout import temporary_weights

KILLED = """
import os, pathlib
from dcmdp_jax.rollout import temporary_weights
folder = temporary_weights.make_folder()
pathlib.Path(folder.name, "model.safetensors").write_text("large")
print(folder.name, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_what_a_killed_process_left_is_removed():
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    left = pathlib.Path(killed.stdout.strip())
    assert (left / "model.safetensors").exists()
    with temporary_weights.make_folder():
        assert not left.exists()


def test_the_folder_of_a_process_that_runs_stays():
    with temporary_weights.make_folder() as first, temporary_weights.make_folder() as second:
        assert first != second and os.listdir(first) == os.listdir(second) == []


def test_it_is_removed_with_the_sampler_that_it_belongs_to(temporary):
    folder = temporary_weights.make_folder()
    name = folder.name
    assert os.path.isdir(name)
    del folder
    assert not os.path.exists(name)


def test_no_other_user_reads_it(temporary):
    with temporary_weights.make_folder() as folder:
        assert pathlib.Path(folder).parent.stat().st_mode & 0o77 == 0


def test_a_link_of_another_user_is_refused(temporary):
    (temporary / "elsewhere").mkdir()
    (temporary / f"dcmdp-weights-of-user-{os.getuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(ValueError, match="belongs to another user; set --rollout.weights_folder"):
        temporary_weights.make_folder()
