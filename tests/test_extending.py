"""The snippets of docs/extending.md, as one experiment file, train."""

import pathlib
import re

import pytest

from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.losses._separable import is_separable
from support.training import options, rows, train

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The page's experiment, for a smaller model and two steps."""
    file = tmp_path_factory.mktemp("experiment") / "extended.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    changes = options(steps=2)
    del changes["data.task.operations"]  # of the quickstart's task
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        return override(load_experiment(str(file)), changes)


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """The folder and the last state of a run."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(experiment, workdir)


def test_it_trains(run):
    assert int(run[1].step) == 2 and int(run[1].skipped) == 0


def test_its_controller_moves_the_multiplier(run):
    assert {row["multiplier_next"] for row in rows(run[0])} <= {0, 0.2}


def test_its_surrogate_is_separable(experiment):
    assert is_separable(experiment.algorithm.surrogate)


def test_its_task_holds_other_problems_out(experiment):
    task = experiment.data.task
    trained = {task.example(index, 0).prompt for index in range(1000)}
    assert not trained & {example.prompt for example in task.held_out(1000)}
