"""What a run prints: quietly, plainly, and where a function of the user's fails."""

import io
import json
import sys

import pytest

from dcmdp_jax.monitoring import phases
from dcmdp_jax.report import final_table
from support.training import QUICKSTART, command, dcmdp, words

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The folder of a run of three steps, with --quiet, and what it prints."""
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        err = io.StringIO()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert dcmdp([*command(workdir, steps=3, **{"eval.every": 2}), "--quiet"]) == 0
    return workdir, out.getvalue(), err.getvalue()


def test_quiet_prints_the_final_table_alone(quiet):
    workdir, out, err = quiet
    assert out == final_table.text(workdir) + "\n" and err == ""


def test_a_run_that_goes_on_quietly_prints_no_line_of_progress(quiet, capsys):
    assert dcmdp(["train", QUICKSTART, "--workdir", str(quiet[0]), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_leaves_the_times_of_its_phases(quiet):
    recorded = json.loads((quiet[0] / phases.FILE).read_text())
    expected = {
        "sampling",
        "evaluating",
        "warming up",
        "saving a checkpoint",
        "updating the policy",
    }
    assert expected <= recorded["phases"].keys()
    assert {"compiling the step", "compiling decode"} <= recorded["phases"].keys()


def test_plain_prints_each_step_and_the_first_evaluation_as_it_comes(tmp_path, capsys):
    assert dcmdp([*command(tmp_path, steps=3, **{"eval.every": 2}), "--plain"]) == 0
    said = capsys.readouterr()
    steps = [line.split("  ")[0] for line in said.err.splitlines() if ": step " in line]
    assert steps == [f"quickstart: step {i}/3" for i in (1, 2, 3)]
    evaluated = [line[:7] for line in said.err.splitlines() if "held-out engine 0." in line[:30]]
    assert evaluated == ["step 1:"]


FAILING = """
import dataclasses
import runpy

CONFIG = runpy.run_path({quickstart!r})["CONFIG"]


def grade(example):
    return example.gold


def reward(example, text):
    return grade(example)


CONFIG = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, verifier=reward))
"""


@pytest.mark.parametrize("whole", [False, True])
def test_a_failing_verifier_shows_its_own_lines_and_with_traceback_all(tmp_path, capsys, whole):
    file = tmp_path / "mine.py"
    file.write_text(FAILING.format(quickstart=QUICKSTART))
    options = [*words(steps=2, **{"warmup.steps": 0}), *(["--traceback"] if whole else [])]
    assert dcmdp(["train", str(file), "--workdir", str(tmp_path / "run"), *options]) == 1
    err = capsys.readouterr().err
    assert f'File "{file}", line 13, in reward' in err and "return example.gold" in err
    assert ("rewards.py" in err) == whole
