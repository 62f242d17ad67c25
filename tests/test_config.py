"""Configuration: typed overrides, refusals in one sentence, the record beside the run."""

import dataclasses
import json
import pathlib

import pytest

from dcmdp_jax import cli
from dcmdp_jax import config as c

QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    return c.load_experiment(str(QUICKSTART))


def test_overrides_are_typed_and_leave_the_rest(quickstart):
    changed = c.override(quickstart, {"constraint.tolerance": "0.01", "steps": "50", "data.shuffle": "false",
                                      "rollout.precision.weights": "int8", "model.shape.num_layers": "3", "data.task.operations": "4"})
    assert (changed.constraint.tolerance, changed.steps, changed.data.shuffle) == (0.01, 50, False)
    assert (changed.rollout.precision.weights, changed.model.shape.num_layers, changed.data.task.operations) == ("int8", 3, 4)
    back = c.override(changed, {"constraint.tolerance": str(quickstart.constraint.tolerance), "steps": str(quickstart.steps),
                                "data.shuffle": "true", "rollout.precision.weights": "int4", "model.shape.num_layers": "2",
                                "data.task.operations": "5"})
    assert back == quickstart


@pytest.mark.parametrize("name, value, message", [
    ("constraint.tolerence", "0.1", "did you mean --constraint.tolerance"),
    ("stepz", "1", "did you mean --steps"),
    ("steps", "many", "--steps takes a value of type int, not 'many'"),
    ("steps", "1.5", "type int"),
    ("constraint.tolerance", "nan", "type float"),
    ("data.shuffle", "perhaps", "type bool"),
    ("algorithm.advantage", "grpo", "Functions are set in the experiment file"),
    ("steps", "0", "steps=0 must be at least 1"),
    ("rollout.top_p", "0", "rollout.top_p=0.0 must lie in (0, 1]"),
    ("rollout.temperature", "0", "rollout.temperature=0.0 must be positive"),
    ("algorithm.minibatches", "3", "128 completions do not divide into"),
    ("algorithm.row_length", "10", "shorter than one prompt and completion"),
    ("constraint.multiplier_init", "2", "0 <= multiplier_init <= multiplier_max"),
    ("model.shape.num_kv_heads", "3", "num_heads=4 is not a multiple of num_kv_heads=3"),
])
def test_bad_overrides_are_refused_in_one_sentence(quickstart, name, value, message):
    with pytest.raises(ValueError) as error:
        c.override(quickstart, {name: value})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_record_is_json_and_names_functions(quickstart):
    record = json.loads(json.dumps(c.to_json(quickstart)))
    assert record["constraint"]["shape"] == "dcmdp_jax.constraint.shape"
    assert record["data"]["task"] == {"type": "Chain", "operations": 5, "noise": [0.15, 0.2, 0.3]}
    assert "clip_high" in json.dumps(record["algorithm"]["surrogate"])


def test_config_is_frozen_and_hashable(quickstart):
    with pytest.raises(dataclasses.FrozenInstanceError):
        quickstart.steps = 1
    hash(quickstart.model.shape)


def test_experiments_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        c.load_experiment(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="defines no CONFIG"):
        c.load_experiment(str(tmp_path / "empty.py"))


def test_an_experiment_names_the_module_it_lacks(tmp_path):
    file = tmp_path / "lacking.py"
    file.write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match="lacking.py imports 'nothing_of_this_name', which is neither in its folder nor installed"):
        c.load_experiment(str(file))


def test_a_bucket_s_address_is_no_workdir(capsys):
    assert cli.main(["train", "experiments/quickstart.py", "--workdir", "gs://bucket/run"]) == 2
    assert "--workdir gs://bucket/run is no folder; mount the bucket" in capsys.readouterr().err


@pytest.mark.parametrize("source, said", [
    ("x = 1\ny = 1 / 0\n", ", line 2: ZeroDivisionError: division by zero"),
    ("x = 1\nfor\n", ", line 2: SyntaxError: invalid syntax"),
    ("def f():\n    raise KeyError('b')\n\nf()\n", ", line 2: KeyError: 'b'"),
    ("import json\n\njson.loads('{')\n", ", line 3: JSONDecodeError"),
    ("from dcmdp_jax.config import EvalConfig, MeshConfig\nMeshConfig(dat=2)\n", ", line 2: TypeError"),
    ("import sys\nsys.exit('no')\n", ", line 2: SystemExit: no"),
])
def test_an_experiment_that_fails_shows_its_own_line(tmp_path, capsys, source, said):
    file = tmp_path / "mine.py"
    file.write_text(source)
    assert cli.main(["train", str(file), "--workdir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dcmdp: experiment {file} fails at {file}{said}") and err.count("\n") == 1
