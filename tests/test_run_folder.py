"""A work folder belongs to one run and one process."""

import json
import shutil
import subprocess

import pytest

from dcmdp_jax.run import checkpoint
from dcmdp_jax.run import folder as run_folder
from support.training import (
    CHILD,
    await_rows,
    child_environment,
    command,
    dcmdp,
    tiny,
    train,
)


def claim(workdir, run):
    run_folder.claim(workdir, run).close()


@pytest.fixture
def workdir(tmp_path):
    """A folder with a checkpoint and the record of the tiny run."""
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    run_folder.write_config(tmp_path, tiny())
    return tmp_path


def test_a_folder_without_a_checkpoint_is_free(tmp_path):
    claim(tmp_path, tiny(**{"constraint.tolerance": 0.7}))
    claim(tmp_path, tiny())


def test_another_experiment_cannot_take_over_a_run(workdir):
    with pytest.raises(ValueError, match=r"constraint\.tolerance=0\.004, not 0\.5"):
        claim(workdir, tiny(**{"constraint.tolerance": 0.5}))


def test_another_experiment_cannot_take_over_a_supervised_stage(tmp_path):
    """It has a checkpoint, and the run none yet."""
    (tmp_path / checkpoint.WARMUP / "checkpoints" / "10").mkdir(parents=True)
    run_folder.write_config(tmp_path, tiny())
    with pytest.raises(ValueError, match="seed=0, not 2"):
        claim(tmp_path, tiny(seed=2))


def test_a_refused_claim_leaves_the_folder_unlocked(workdir):
    with pytest.raises(ValueError, match="choose another --workdir"):
        claim(workdir, tiny(seed=1))
    claim(workdir, tiny())


def test_a_run_can_be_made_longer(workdir):
    claim(workdir, tiny(steps=99))
    assert json.loads((workdir / "config.json").read_text())["steps"] == 99


@pytest.mark.parametrize("name", ["nova", "offload"])
def test_a_record_of_another_version_is_refused(workdir, name):
    """It has a setting that this version does not know, or lacks one."""
    record = json.loads((workdir / "config.json").read_text())
    if name in record["algorithm"]:
        del record["algorithm"][name]
    else:
        record["algorithm"][name] = 3
    (workdir / "config.json").write_text(json.dumps(record))
    said = f"a run of another version or experiment: only one .* has algorithm.{name}; go on with"
    with pytest.raises(ValueError, match=said):
        claim(workdir, tiny())


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"name": "quick', '{"a": ' * 9**5, None],
    ids=["empty", "list", "cut", "deep", "gone"],
)
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, capsys, content):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert dcmdp(command(tmp_path)) == 2
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert err.startswith(f"dcmdp: {tmp_path / 'config.json'} ") and "put a copy back" in err
    assert err.count("\n") == 1


@pytest.mark.full
def test_rows_of_a_run_without_its_checkpoints_are_kept(tmp_path):
    train(tiny(steps=2, **{"eval.every": 1}), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "gaps.jsonl")}
    shutil.rmtree(tmp_path / "checkpoints")
    claim(tmp_path, tiny(steps=2))
    assert {name: (tmp_path / f"{name}.1").read_bytes() for name in before} == before


@pytest.mark.full
@pytest.mark.slow
def test_two_runs_cannot_share_a_folder(tmp_path):
    environment = child_environment()
    words = [*CHILD, *command(tmp_path / "run", steps=10_000)]
    process = subprocess.Popen(words, env=environment)
    try:
        await_rows(tmp_path / "run", 1, process)
        words = [*CHILD, *command(tmp_path / "run", steps=2, seed=1)]
        other = subprocess.run(words, env=environment, capture_output=True, text=True)
    finally:
        process.kill()
        process.wait()
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert f"run is in use by process {process.pid} on " in other.stderr
