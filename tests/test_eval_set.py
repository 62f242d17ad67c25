"""The samples of a set: read back line by line, and right exactly where training pays for them."""

import json

import numpy as np
import pytest

from dcmdp_jax import rewards
from dcmdp_jax.evaluation.eval_set import EvalSet, to_lines
from dcmdp_jax.records import Example, Prompts
from support.rollouts import make_rollout

EXAMPLES = (Example("1+1=?", "2"), Example("2*3=?", "6"), Example("10-3=?", "7"))
COMPLETIONS = {
    "Guess \\boxed{3}, no.\n#### 2": True,
    r"<think>\boxed{2}</think> I do not know.": False,
    "<think>7</think>\n**Answer:** 2": True,
    r"\boxed{\textbf{2}}": True,
    r"\boxed{1+1}": False,
    r"So \boxed{1} and \boxed{2}.": False,
    r"\fbox{2}": True,
    r"\boxed{2\text{ pens}}": True,
    r"\boxed{\sqrt{4}}": False,
    "no answer": False,
}


@pytest.fixture
def eval_set(tmp_path):
    """Three problems with two samples each."""
    prompts = Prompts(np.zeros((3, 1), np.int32), np.ones(3, np.int32), EXAMPLES)
    return EvalSet("aime24", prompts, 2, tmp_path / "aime24.jsonl")


def training_reward(example, text, stopped=True):
    rollout = make_rollout(
        Prompts(np.zeros((1, 1), np.int32), np.ones(1, np.int32), (example,)),
        np.zeros((1, 9), np.int32),
        [9],
        np.zeros((1, 9)),
        [stopped],
    )
    return rewards.score(rollout, lambda ids: text, rewards.math_answer).reward[0]


def test_what_is_written_is_read(eval_set):
    keys = eval_set.keys()
    samples = [eval_set.judge(key, r"\boxed{2}", 9, True) for key in keys]
    eval_set.write(samples)
    assert list(eval_set.read().values()) == samples


def test_a_line_that_was_cut_short_is_left_out(eval_set):
    sample = eval_set.judge((1, 0), r"\boxed{6}", 9, True)
    eval_set.file.write_text(to_lines([sample]) + '{"set": "aime24", "prob')
    assert eval_set.read() == {(1, 0): sample}


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"set": "aime24"}',
        '{"set": "aime24", "problem": 5, "sample": 0}',
        '{"set": "minerva", "problem": 0, "sample": 0}',
        "[]",
        "[" * 10**5,
        '{"set": "aime24", "problem": 1, "sample": 0, "right": true}',
        '{"set": "aime24", "problem": [], "sample": 0}',
    ],
)
def test_a_line_that_is_no_sample_is_named(eval_set, line):
    first = to_lines([eval_set.judge((0, 0), "2", 9, True)])
    eval_set.file.write_text(first + line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*aime24.jsonl is no sample of this evalu"):
        eval_set.read()


def test_a_sample_that_is_there_twice_is_named(eval_set):
    eval_set.file.write_text(2 * to_lines([eval_set.judge((0, 0), "2", 9, True)]))
    with pytest.raises(ValueError, match="line 2 of .*, or one that is there already"):
        eval_set.read()


@pytest.mark.parametrize("text, right", COMPLETIONS.items())
def test_a_completion_is_right_by_the_answer_it_states(eval_set, text, right):
    assert eval_set.judge((0, 0), text, 9, True)["right"] is right


@pytest.mark.parametrize("problem", range(3))
@pytest.mark.parametrize("text", COMPLETIONS)
def test_a_completion_is_right_exactly_where_training_pays_for_it(eval_set, text, problem):
    text = text.replace("2", EXAMPLES[problem].answer)
    sample = eval_set.judge((problem, 0), text, 9, True)
    assert sample["right"] is bool(training_reward(EXAMPLES[problem], text) == 1.0)


@pytest.mark.parametrize("text", COMPLETIONS)
def test_a_sample_holds_the_answer_that_training_reads(eval_set, text):
    assert eval_set.judge((0, 0), text, 9, True)["answer"] == rewards.final_answer(text)


def test_a_completion_that_was_cut_off_is_judged_and_earns_nothing_in_training(eval_set):
    text = r"\boxed{2} and so"
    sample = eval_set.judge((0, 0), text, 9, False)
    assert (sample["right"], sample["stopped"]) == (True, False)
    assert training_reward(EXAMPLES[0], text, stopped=False) == 0


def test_samples_are_lines_of_json():
    assert [json.loads(line) for line in to_lines([{"a": "\n"}, {}]).splitlines()] == [
        {"a": "\n"},
        {},
    ]
