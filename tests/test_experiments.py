"""Experiments load, say what they ask and cost, and differ where they should."""

import ast
import importlib
import pathlib

import pytest

from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.run.record import differences, to_json

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path for path in ROOT.glob("experiments/**/*.py") if "\nCONFIG = " in path.read_text()
)
LAPTOP = sorted(ROOT.glob("experiments/laptop/*.py"))
STUDIES = [path for path in LAPTOP if "Command:" in path.read_text()]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_loads_and_is_named_after_its_file(path):
    assert load_experiment(str(path)).name == path.stem


@pytest.mark.parametrize("path", LAPTOP, ids=lambda path: path.stem)
def test_a_file_of_the_laptop_studies_loads(path, monkeypatch):
    if path.stem in ("plots", "results"):
        pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.import_module(path.stem)


@pytest.mark.parametrize("path", [*EXPERIMENTS, *STUDIES], ids=lambda path: path.stem)
def test_the_first_line_asks_the_question(path):
    assert docstring(path).splitlines()[0].count("?") == 1


@pytest.mark.parametrize("path", [*EXPERIMENTS, *STUDIES], ids=lambda path: path.stem)
def test_command_hardware_time_and_result_are_stated(path):
    text = docstring(path)
    assert all(field in text for field in ("Command:", "Hardware:", "Time:", "Result:"))
    for field in ("Time:", "Result:"):
        line = text.split(field)[1].strip().splitlines()[0]
        assert line.startswith("not measured") or any(c.isdigit() for c in line)


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def pod(name):
    return to_json(load_experiment(str(ROOT / f"experiments/pods/{name}.py")))


@pytest.mark.parametrize("model", ["8b_bf16", "8b_fp8", "30b_a3b_bf16", "30b_a3b_fp8"])
def test_grpo_and_dcgrpo_differ_in_the_multiplier_alone(model):
    changed = differences(pod(f"grpo_{model}"), pod(f"dcgrpo_{model}"))
    assert set(changed) == {"name", "constraint.multiplier_init", "constraint.dual_lr"}


@pytest.mark.parametrize("size", ["8b", "30b_a3b"])
def test_bf16_and_fp8_differ_in_the_engines_precision_alone(size):
    assert set(differences(pod(f"grpo_{size}_bf16"), pod(f"grpo_{size}_fp8"))) == {
        "name",
        "rollout.precision.weights",
        "rollout.precision.activations",
    }
