"""The language studies' task: what is right, and what is held out."""

import importlib
import pathlib

import pytest

from dcmdp_jax.records import Example

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "language"
PAIR = Example("", "lamp city")


@pytest.fixture(name="task")
def task_fixture(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("two_words").TwoWords()


@pytest.mark.parametrize(
    "text",
    [
        " The lamp lit the city.",
        "The lamps lit two cities.\n",
        "A lamp, bright and old, stood in the middle of the city's park.",
    ],
)
def test_a_sentence_with_both_words_is_right(task, text):
    assert task.reward(PAIR, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " The lamp lit the town.",  # a word is missing
        " The lamplight lit the city.",  # it stands within another
        " the lamp lit the city.",  # no capital letter
        " The lamp lit the city",  # no full stop
        " The lamp fell. The city slept.",  # two sentences
        " Lamp city.",  # too short
        " The lamp" + " and the lamp" * 4 + " lit the city.",  # too long
        " The lamp lit the city.\nWords: cat",
        " Sentence: the lamp lit the city.",
    ],
)
def test_anything_else_earns_nothing(task, text):
    assert task.reward(PAIR, text) == 0.0


def test_held_out_pairs_are_never_trained_on_in_either_order(task):
    held_out = {frozenset(example.answer.split()) for example in task.held_out(2048)}
    trained = {frozenset(task.example(i, 0).answer.split()) for i in range(2000)}
    assert len(held_out) == 2048
    assert not held_out & trained


def test_a_problem_is_the_same_every_time(task):
    assert task.example(7, 1) == task.example(7, 1)
    assert task.example(7, 1) != task.example(7, 2)
