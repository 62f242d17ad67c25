"""Every experiment and notebook that is shipped runs, as far as it can here."""

import ast
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.run_record import differences, to_json

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path for path in ROOT.glob("experiments/**/*.py") if "\nCONFIG = " in path.read_text()
)
STUDIES = sorted(
    path for path in ROOT.glob("experiments/laptop/*.py") if "Command:" in path.read_text()
)
NOTEBOOKS = sorted(ROOT.glob("colab/*.ipynb"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_load_and_say_what_they_cost(path):
    loaded = load_experiment(str(path))
    assert loaded.name == path.stem
    says_what_it_costs(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_say_what_they_cost(path):
    says_what_it_costs(path)


def says_what_it_costs(path):
    words = ast.get_docstring(ast.parse(path.read_text()))
    assert words.splitlines()[0].count("?") == 1, "the first line asks the experiment's question"
    for field in ("Command:", "Hardware:", "Time:", "Result:"):
        assert field in words
    for field in ("Time:", "Result:"):
        stated = words.split(field)[1].strip().splitlines()[0]
        assert stated.startswith("not measured") or any(c.isdigit() for c in stated)


def test_the_papers_rows_differ_in_what_they_say_alone():
    """GRPO and DC-GRPO: the multiplier and its step; the engines: the rollout's precision."""

    def pod(name):
        return to_json(load_experiment(str(ROOT / f"experiments/pods/{name}.py")))

    for size in ("8b", "30b_a3b"):
        for engine in ("bf16", "fp8"):
            found = differences(pod(f"grpo_{size}_{engine}"), pod(f"dcgrpo_{size}_{engine}"))
            assert set(found) == {"name", "constraint.multiplier_init", "constraint.dual_lr"}
        assert set(differences(pod(f"grpo_{size}_bf16"), pod(f"grpo_{size}_fp8"))) == {
            "name",
            "rollout.precision.weights",
            "rollout.precision.activations",
        }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_define_nothing(path):
    source = "\n".join(
        cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
    )
    assert not [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
    ]
    assert len([line for line in source.splitlines() if line.strip()]) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """Two steps of the same run, report inline."""
    for name, value in (
        ("DCMDP_STEPS", "2"),
        ("DCMDP_WARMUP", "4"),
        ("DCMDP_WORKDIR", str(tmp_path / "run")),
        ("XLA_FLAGS", ""),
        ("JAX_PLATFORMS", "cpu"),
    ):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("<svg" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
