"""`dcmdp generate`: completions of prompts, and a file of them that goes on where it stopped."""

import json

import jax
import numpy as np
import pytest

from dcmdp_jax import cli
from dcmdp_jax.models import weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.tokens import tokenizer
from dcmdp_jax.tools import complete
from support.engines import DENSE, make_params

pytestmark = pytest.mark.full

TOKENIZER = tokenizer.CharacterTokenizer("".join(chr(ord("A") + i) for i in range(35)))
PROMPTS = ["ABC", "B", "CAB", "DD", "E"]
OPTIONS = {
    "samples": 2,
    "max_tokens": 6,
    "sampling": Sampling(0.9),
    "seed": 3,
    "chunk_size": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "hf"
    weights.save(path, DENSE, make_params(DENSE))
    tokenizer.save(TOKENIZER, path)
    return str(path)


@pytest.fixture(scope="module")
def complete_file(folder, tmp_path_factory):
    """The text of a file of two completions of each prompt."""
    path = tmp_path_factory.mktemp("completions") / "complete.jsonl"
    assert complete.to_file(path, folder, PROMPTS, **OPTIONS) == 10
    return path.read_text()


def test_prompts_are_the_lines_of_a_file_that_are_not_empty(tmp_path):
    (tmp_path / "prompts.txt").write_text("ABC\nB\n\nCAB\nDD\nE\n")
    assert complete.read_prompts(str(tmp_path / "prompts.txt")) == PROMPTS


def test_a_file_holds_the_options_and_then_a_line_for_each_completion(complete_file):
    header, *lines = complete_file.splitlines()
    assert json.loads(header)["options"]["seed"] == 3
    assert [json.loads(line)["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("lines, added", [(5, 6), (9, 2)], ids=["second chunk", "last line"])
def test_a_truncated_file_is_completed_to_the_same_file(
    folder, complete_file, tmp_path, lines, added
):
    """A killed process leaves a part of a line at the end."""
    parts = complete_file.splitlines()
    path = tmp_path / "part.jsonl"
    path.write_text("\n".join(parts[: 1 + lines]) + "\n" + parts[1 + lines][:9])
    assert complete.to_file(path, folder, PROMPTS, **OPTIONS) == added
    assert path.read_text() == complete_file


def test_nothing_is_added_to_a_complete_file(folder, complete_file, tmp_path):
    path = tmp_path / "complete.jsonl"
    path.write_text(complete_file)
    assert complete.to_file(path, folder, PROMPTS, **OPTIONS) == 0
    assert path.read_text() == complete_file


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": PROMPTS[::-1]}, "line 2 of .*part.jsonl is no completion"),
        ({"seed": 4}, "was not written with these options"),
        ({"folder": "another"}, "and this model"),
    ],
    ids=["prompts", "options", "model"],
)
def test_a_file_of_something_else_is_refused(folder, complete_file, tmp_path, changes, message):
    path = tmp_path / "part.jsonl"
    path.write_text(complete_file)
    arguments = {"folder": folder, "prompts": PROMPTS} | OPTIONS | changes
    with pytest.raises(ValueError, match=message):
        complete.to_file(path, **arguments)
    assert path.read_text() == complete_file


def test_a_file_of_notes_is_left_as_it_is(folder, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my own\nnotes\n")
    with pytest.raises(ValueError, match="was not written with these options"):
        complete.to_file(path, folder, PROMPTS, **OPTIONS)
    assert path.read_text() == "my own\nnotes\n"


def test_a_missing_model_folder_is_refused_before_a_file_is_made(tmp_path):
    message = "model folder .*absent does not exist; give a Hugging Face model folder"
    with pytest.raises(ValueError, match=message):
        complete.to_file(tmp_path / "none.jsonl", str(tmp_path / "absent"), PROMPTS, **OPTIONS)
    assert not (tmp_path / "none.jsonl").exists()


def test_an_empty_prompt_is_refused_before_a_file_is_made(folder, tmp_path):
    with pytest.raises(ValueError, match="prompt 2 of 3 is empty"):
        complete.to_file(tmp_path / "none.jsonl", folder, ["A", "", "B"], **OPTIONS)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_missing_output_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="folder .*absent of --output none.jsonl does not exist"):
        complete.to_file(tmp_path / "absent" / "none.jsonl", folder, PROMPTS, **OPTIONS)


def test_a_missing_file_of_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file of prompts .*absent does not exist"):
        complete.read_prompts(str(tmp_path / "absent"))


def test_weights_that_are_not_finite_complete_nothing(folder, tmp_path, monkeypatch):
    load = weights.load

    def damaged_load(*args):
        model, params = load(*args)
        return model, jax.tree.map(lambda w: w * np.nan, params)

    monkeypatch.setattr(complete.weights, "load", damaged_load)
    with pytest.raises(ValueError, match="given weights that hold NaN"):
        complete.to_file(tmp_path / "none.jsonl", folder, ["ABC"])
    assert len((tmp_path / "none.jsonl").read_text().splitlines()) == 1, "the options alone"


@pytest.mark.parametrize("prompt", ["\udcff", "a\ud800b"])
def test_a_prompt_that_is_not_unicode_is_refused_by_number(folder, capsys, prompt):
    assert cli.main(["generate", folder, "abc", prompt]) == 2
    assert "dcmdp: prompt 2 of 2 is not valid Unicode text" in capsys.readouterr().err


def test_another_device_samples_the_same(folder, complete_file, tmp_path):
    path = tmp_path / "complete.jsonl"
    complete.to_file(path, folder, PROMPTS, devices=jax.devices()[1:2], **OPTIONS)
    assert path.read_text() == complete_file
