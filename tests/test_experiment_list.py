"""`dcmdp experiments`: what files say that they are, without running them."""

import pathlib

import pytest

from dcmdp_jax import cli
from dcmdp_jax.tools import experiment_list

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
FILES = {
    "one.py": '"""Does it work? On two\nlines.\n\nMore of it."""\n\nCONFIG = explode()\n',
    "deep/two.py": "STUDY: object = explode()\n",
    "neither.py": '"""Helpers."""\nfrom one import CONFIG\n',
    "broken.py": "CONFIG = (\n",
    ".venv/three.py": "CONFIG = 1\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_experiments_and_studies_are_found_and_not_run(folder):
    found = [
        (str(x.path.relative_to(folder)), x.kind, x.summary) for x in experiment_list.find(folder)
    ]
    assert found == [
        ("broken.py", "broken", "cannot be read: line 1"),
        ("deep/two.py", "study", ""),
        ("one.py", "experiment", "Does it work? On two lines."),
    ]


def test_all_that_this_repository_has_are_found():
    kinds = {x.path.name: x.kind for x in experiment_list.find(EXPERIMENTS)}
    assert kinds["quickstart.py"] == "experiment" and kinds["main.py"] == "study"
    assert "chain.py" not in kinds


def test_the_command_prints_a_line_for_each(folder, capsys):
    assert cli.main(["experiments", str(folder)]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in lines] == [
        ["broken", "cannot be read: line 1"],
        ["study"],
        ["experiment", "Does it work? On two lines."],
    ]


@pytest.mark.parametrize(
    "name, said", [("absent", "is no folder"), ("", "defines CONFIG or STUDY")]
)
def test_a_folder_without_experiments_is_refused(tmp_path, capsys, name, said):
    assert cli.main(["experiments", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
