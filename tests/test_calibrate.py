"""A tolerance that the run measures: the floor from its definition, once, before the first step,
with keys of its own.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from dcmdp_jax import calibrate, constraint
from dcmdp_jax.config import Calibrated, with_tolerance
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.run.record import to_json
from dcmdp_jax.seeds import Stream
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tools import parity
from support import training
from support.training import ONE_DEVICE, QUICKSTART, dcmdp, rows, train

pytestmark = pytest.mark.full


def write_experiment(file):
    """Writes the quickstart with a tolerance that it measures."""
    file.write_text(
        "from dcmdp_jax.config import Calibrated, with_tolerance\n"
        "from dcmdp_jax.experiment import load_experiment\n"
        f"RUN = load_experiment({QUICKSTART!r})\n"
        "CONFIG = with_tolerance(RUN, Calibrated(slack=0.5, batches=3))\n"
    )
    return str(file)


@pytest.fixture
def experiment(tmp_path):
    return write_experiment(tmp_path / "experiment.py")


def words(**changes):
    return training.words(**{"steps": 4} | changes)


def tiny(tolerance=Calibrated(slack=0.5, batches=3), **changes):
    return with_tolerance(training.tiny(**{"steps": 4} | changes), tolerance)


def record(workdir):
    return json.loads((workdir / calibrate.FILE).read_text())


def used(workdir):
    return json.loads((workdir / "config.json").read_text())["constraint"]["tolerance"]


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps that measured its tolerance, and its last state."""
    workdir = tmp_path_factory.mktemp("measured")
    return workdir, train(tiny(), workdir)


def test_a_run_measures_what_parity_measures(four_steps):
    """The floor of an int4 engine, by the scoring of `parity`."""
    calibration = record(four_steps[0])
    inputs = read_inputs(tiny(), ONE_DEVICE)
    measured = parity.measure(
        tiny(), inputs, parity.starting(tiny(), inputs), 3, stream=Stream.CALIBRATION, slack=0.5
    )
    assert calibration["floor"] == pytest.approx(measured.gaps["all"].delta, rel=1e-5)
    std_error = float(measured.calibration.std_error)
    assert calibration["floor_std_error"] == pytest.approx(std_error, rel=1e-3)


def test_a_rounded_engine_has_a_floor(four_steps):
    """Far above that of an exact one, which is below 1e-6."""
    assert record(four_steps[0])["floor"] > 2e-5


def test_the_tolerance_is_a_margin_above_the_floor(four_steps):
    calibration = record(four_steps[0])
    floor = calibration["floor"]
    error = calibration["floor_std_error"]
    expected = max(1.5 * floor, floor + 3 * error)
    assert calibration["tolerance"] == pytest.approx(expected, rel=1e-3)


def test_the_run_uses_the_tolerance_that_it_measured(four_steps):
    assert used(four_steps[0]) == record(four_steps[0])["tolerance"]


def test_a_run_that_measured_is_else_the_run_that_was_given_the_number(four_steps, tmp_path):
    """Metrics and state bit for bit: calibration draws from a stream of its own."""
    workdir, state = four_steps
    given = train(tiny(record(workdir)["tolerance"]), tmp_path)
    assert rows(workdir) == rows(tmp_path) and len(rows(workdir)) == 4
    jax.tree.map(np.testing.assert_array_equal, state, given)
    assert not (tmp_path / calibrate.FILE).exists()


def test_an_exact_engine_has_no_floor(tmp_path):
    train(tiny(**{"rollout.precision.weights": "float32", "steps": 1}), tmp_path)
    assert 0 < record(tmp_path)["floor"] < 1e-6


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder of a run of two steps that went on for two more, and must not measure again."""
    workdir = tmp_path_factory.mktemp("resumed")
    train(tiny(steps=2), workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "measure_floor", None)
        train(tiny(), workdir)
    return workdir


def test_a_resumed_run_keeps_the_number(four_steps, resumed):
    assert record(resumed) == record(four_steps[0])
    assert used(resumed) == used(four_steps[0])


def test_a_resumed_run_equals_one_in_one_piece(four_steps, resumed):
    assert rows(resumed) == rows(four_steps[0])


@pytest.mark.parametrize(
    "tolerance, message",
    [
        (
            Calibrated(slack=0.2, batches=3),
            "calibrated with slack=0.5 and batches=3, not 0.2 and 3; choose another",
        ),
        (0.01, r"constraint\.tolerance=.*, not 0\.01"),
    ],
)
def test_a_resumed_run_refuses_another_tolerance(resumed, tolerance, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(tolerance), resumed)


def interrupted(*args, **options):
    raise Interrupted("stopped")


def test_a_run_stopped_while_it_measures_starts_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(JetStreamSampler, "sample", interrupted)
        with pytest.raises(
            Interrupted, match="in the calibration of the tolerance, which is not kept"
        ):
            train(tiny(), tmp_path)
    assert not (tmp_path / calibrate.FILE).exists()
    train(tiny(steps=1), tmp_path)
    assert used(tmp_path) == record(tmp_path)["tolerance"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """An experiment that measures its tolerance, and the folder of its run of one step."""
    folder = tmp_path_factory.mktemp("calibrated")
    experiment = write_experiment(folder / "experiment.py")
    assert dcmdp(["train", experiment, "--workdir", str(folder / "run"), *words(steps=1)]) == 0
    return experiment, folder / "run"


def test_the_command_prints_the_number_that_a_run_then_uses(calibrated, tmp_path, capsys):
    experiment, workdir = calibrated
    assert dcmdp(["calibrate", experiment, "--workdir", str(tmp_path / "new"), *words()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("random weights, after 100 steps of warm-up\nfloor of delta  ")
    advice = f"tolerance={used(workdir):g}, or tolerance=Calibrated(slack=0.5)"
    assert f"in the experiment: {advice}" in out
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_with_its_tolerance_without_its_options(calibrated, tmp_path, capsys):
    experiment, workdir = calibrated
    shutil.copytree(workdir, tmp_path / "run")
    assert dcmdp(["train", experiment, "--workdir", str(tmp_path / "run"), "--steps", "2"]) == 0
    err = capsys.readouterr().err
    assert "goes on with its own" in err and f"constraint.tolerance={used(workdir)}" in err


def test_the_command_measures_at_a_run_s_newest_checkpoint_with_its_slack(calibrated, capsys):
    experiment, workdir = calibrated
    assert dcmdp(["calibrate", experiment, "--workdir", str(workdir), "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"checkpoint 1 of {workdir}\n")
    assert "(2 batches at fixed weights)" in out and "Calibrated(slack=0.5)" in out


def test_a_tolerance_that_is_given_is_not_measured(calibrated, tmp_path):
    given = ["--constraint.tolerance", "0.01", *words(steps=1)]
    assert dcmdp(["train", calibrated[0], "--workdir", str(tmp_path), *given]) == 0
    assert used(tmp_path) == 0.01 and not (tmp_path / calibrate.FILE).exists()


def test_one_batch_is_refused(calibrated, capsys):
    assert dcmdp(["calibrate", calibrated[0], "--batches", "1"]) == 2
    expected = "dcmdp: --batches 1 and --slack 0.5 must be at least 2 and 0\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_measured_tolerance_is_set_by_field(experiment):
    run = override(load_experiment(experiment), {"constraint.tolerance.slack": "0.1"})
    assert run.constraint.tolerance == Calibrated(0.1, 3)


def test_a_number_replaces_a_measured_tolerance(experiment):
    run = override(load_experiment(experiment), {"constraint.tolerance": "0.1"})
    assert run.constraint.tolerance == 0.1


def test_a_number_and_a_field_of_the_measurement_exclude_each_other(experiment):
    both = {"constraint.tolerance.slack": "0.1", "constraint.tolerance": "0.1"}
    with pytest.raises(ValueError, match="--constraint.tolerance.slack exclude each other"):
        override(load_experiment(experiment), both)


@pytest.mark.parametrize("bad", [Calibrated(slack=-0.1), Calibrated(batches=1)])
def test_settings_that_measure_nothing_are_refused(experiment, bad):
    with pytest.raises(ValueError, match="needs slack >= 0 and batches >= 2"):
        with_tolerance(load_experiment(experiment), bad)


def test_the_record_holds_the_settings(experiment):
    record = to_json(load_experiment(experiment))
    assert record["constraint"]["tolerance"] == {"slack": 0.5, "batches": 3}


@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_the_tolerance_s_error_is_its_spread(slack):
    """400 calibrations of 8 batches with normal means: 0.02 ± 0.001 each."""
    means = np.random.default_rng(0).normal(0.02, 0.001, (400, 8))
    found = [constraint.calibrate_tolerance(row, np.ones(8), slack=slack) for row in means]
    spread = np.std([float(one.tolerance) for one in found])
    told = np.mean([calibrate.tolerance_error(one, slack) for one in found])
    assert told == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    "content, fault",
    [
        ("", "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds a list"),
        ("1" * 9999, "is not valid JSON"),
        ('{"slack": 0.2, "batches": 3}', "lacks 'tolerance'"),
        ('{"slack": "0.2", "batches": 3, "tolerance": 1}', "'slack' = '0.2', not a finite number"),
        ('{"slack": 0.2, "batches": 3, "tolerance": NaN}', "'tolerance' = nan"),
    ],
)
def test_a_damaged_calibration_is_named_with_its_remedy(tmp_path, content, fault):
    (tmp_path / calibrate.FILE).write_text(content)
    with pytest.raises(ValueError) as error:
        calibrate.read(tmp_path)
    said = str(error.value)
    assert said.startswith(str(tmp_path / calibrate.FILE)) and fault in said and "\n" not in said
    assert "set --constraint.tolerance to it and move calibration.json away" in said
