"""`dcmdp train --dry-run`: it says what would run, refuses what train refuses, leaves no trace."""

import json
import pathlib

import jax
import pytest

from dcmdp_jax import sharding, train_state
from dcmdp_jax.monitoring import phases
from dcmdp_jax.run import lock
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.run.record import to_json
from dcmdp_jax.tools import dry_run, plan
from support.training import ONE_DEVICE, command, dcmdp, tiny

ABSENT = pathlib.Path("absent")  # never made


def described(workdir, **changes):
    return {
        name: text for name, text in dry_run.describe(tiny(**changes), workdir, ONE_DEVICE) if name
    }


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return described(tmp_path_factory.mktemp("new") / "run", steps=7)


@pytest.fixture(scope="module")
def new_memory():
    """The parts of the memory, of which the row has no name."""
    (parts,) = [text for name, text in dry_run.describe(tiny(), ABSENT, ONE_DEVICE) if not name]
    return parts


def begun(workdir, config, step):
    """Makes a folder look like that of a run with a checkpoint."""
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_json(config)))


def test_the_parameters_are_counted_from_their_shapes(new):
    shapes = train_state.abstract_params(
        read_inputs(tiny(), ONE_DEVICE).model_config, read_inputs(tiny(), ONE_DEVICE).mesh
    )
    assert new["parameters"] == f"{sum(w.size for w in jax.tree.leaves(shapes)):,}"


def test_the_tokens_of_a_step_are_prompts_times_samples_times_the_limit(new):
    assert new["a step"].startswith("4 prompts x 4 samples, at most 320 tokens sampled")


def test_the_memory_of_the_training_state_is_that_of_its_shapes(new_memory):
    inputs = read_inputs(tiny(), ONE_DEVICE)
    state = train_state.abstract(tiny(), inputs.model_config, inputs.mesh)
    assert f"training state {plan.size(sharding.local_bytes(state))}, " in new_memory


def test_the_memory_adds_up(new, new_memory):
    units = {"KiB": 2**-10, "MiB": 1, "GiB": 2**10}
    sizes = [part.split()[-2:] for part in new_memory.split(", ")]
    total = sum(float(number) * units[unit] for number, unit in sizes)
    number, unit = new["memory"].split()[:2]
    assert abs(total - float(number) * units[unit]) < 0.03  # MiB, each part rounded
    assert all(float(number) for number, _ in sizes)


@pytest.mark.parametrize(
    "number, shown",
    [(0, "0"), (512, "0.50 KiB"), (3 * 2**20, "3.00 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_a_size_is_shown_in_the_unit_that_fits(number, shown):
    assert plan.size(number) == shown


def test_steps_and_folder_of_a_new_run(new):
    assert new["steps"] == "7, after a warm-up of 100 x 32"
    assert new["folder"].endswith("run, new")
    assert new["time"].startswith("not known: no earlier run of quickstart on these devices in /")


def test_a_run_that_goes_on_is_known_by_its_checkpoint(tmp_path):
    begun(tmp_path, tiny(steps=7), 5)
    said = described(tmp_path, steps=7)
    assert said["steps"] == "2 of 7, from checkpoint 5 on"
    assert said["folder"] == f"{tmp_path}, resumed"


def test_a_finished_run_has_no_steps_left(tmp_path):
    begun(tmp_path, tiny(steps=7), 7)
    said = described(tmp_path, steps=7)
    assert said["steps"] == "none left of 7" and said["time"] == "none"


def test_the_time_follows_from_the_run_before(tmp_path):
    config = tiny()
    devices = phases.devices_of(read_inputs(config, ONE_DEVICE).mesh)
    record = phases.Times(config.name, devices, 20.0, 3.0, 100, {})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / phases.FILE).write_text(json.dumps(record._asdict()))
    assert described(tmp_path / "b", steps=7)["time"].startswith("about 38 s,")
    begun(tmp_path / "c", tiny(steps=7), 3)
    assert described(tmp_path / "c", steps=7)["time"].startswith("about 12 s,")


def test_a_time_without_the_warmup_is_said_to_be_so(tmp_path):
    config = tiny()
    devices = phases.devices_of(read_inputs(config, ONE_DEVICE).mesh)
    record = phases.Times(config.name, devices, 20.0, 3.0, 0, {})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / phases.FILE).write_text(json.dumps(record._asdict()))
    assert described(tmp_path / "b", steps=7)["time"].startswith("about 38 s without the warm-up,")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rollout.slots": 0}, "--rollout.slots=0 must be"),
        ({"mesh.tensor": 3}, "mesh"),
        ({"model.folder": "absent"}, "absent"),
    ],
)
def test_what_train_refuses_is_refused(tmp_path, capsys, changes, said):
    assert dcmdp([*command(tmp_path / "run", steps=2, **changes), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_run_s_folder_is_refused(tmp_path):
    begun(tmp_path, tiny(steps=7), 5)
    with pytest.raises(ValueError, match="holds a run with algorithm.learning_rate"):
        described(tmp_path, steps=7, **{"algorithm.learning_rate": 0.02})


def test_a_folder_in_use_is_refused(tmp_path):
    with lock.take(tmp_path), pytest.raises(ValueError, match="is in use by"):
        described(tmp_path)


def test_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dcmdp([*command("run", steps=2), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("nothing was started or written\n")
    assert not list(pathlib.Path().iterdir())


def test_several_processes_are_not_described(tmp_path, capsys):
    assert dcmdp([*command(tmp_path / "run"), "--dry-run", "--distributed"]) == 2
    assert "--dry-run describes a run of one process" in capsys.readouterr().err
