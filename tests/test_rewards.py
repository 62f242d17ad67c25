"""Rewards of a rollout: verifiers that are right, fail, or give no number."""

import functools
import re

import numpy as np
import pytest

from dcmdp_jax import rewards
from dcmdp_jax.losses import advantages
from dcmdp_jax.records import Example, Prompts
from support.rollouts import make_rollout


def rollout(tokens, lengths, stopped, examples):
    tokens = np.array(tokens, np.int32)
    prompts = Prompts(
        np.zeros((len(examples), 1), np.int32), np.ones(len(examples), np.int32), tuple(examples)
    )
    logp = np.zeros(tokens.shape, np.float32)
    return make_rollout(prompts, tokens, lengths, logp, stopped)


@pytest.fixture
def sampled():
    """Two completions of each of two prompts; token 9 is the stop token, the second is cut off."""
    examples = [Example("", "ab"), Example("", "cd")]
    tokens = [[1, 2, 9, 7], [1, 2, 7, 7], [3, 4, 9, 7], [1, 2, 9, 7]]
    return rollout(tokens, [3, 2, 3, 3], [True, False, True, True], examples)


def decode(ids):
    return "".join("_abcd"[i] for i in ids)


def equals_answer(example, text):
    return float(text == example.answer)


def test_score_decodes_without_the_stop_token(sampled):
    texts = []
    rewards.score(sampled, decode, lambda example, text: texts.append(text) or 0.0)
    assert texts == ["ab", "", "cd", "ab"]


def test_score_gives_each_completion_its_own_problem(sampled):
    reward = rewards.score(sampled, decode, equals_answer).reward
    np.testing.assert_array_equal(reward, np.array([1, 0, 1, 0], np.float32))
    assert reward.dtype == np.float32


def test_a_completion_that_is_cut_off_earns_what_an_empty_one_earns(sampled):
    reward = rewards.score(sampled, decode, lambda example, text: 1.0 if text else -1.0).reward
    np.testing.assert_array_equal(reward, [1, -1, 1, 1])


def test_a_completion_that_is_cut_off_earns_nothing_by_math_answer(sampled):
    cut_off = sampled._replace(stopped=np.zeros(4, bool))
    reward = rewards.score(cut_off, lambda ids: "#### ab", rewards.math_answer).reward
    np.testing.assert_array_equal(reward, np.zeros(4))


def test_a_verifier_that_asks_whether_a_completion_stopped_judges_what_was_cut_off_too(sampled):
    asked = []

    def judge(example, text, *, stopped):
        asked.append((text, stopped))
        return 0.0

    rewards.score(sampled, decode, judge)
    assert asked == [("ab", True), ("ab", False), ("cd", True), ("ab", True)]


def test_a_verifier_that_asks_for_the_length_gets_it_with_the_stop_token(sampled):
    def judge(example, text, length=0):
        return length + 10 * len(text)

    reward = rewards.score(sampled, decode, judge).reward
    np.testing.assert_array_equal(reward, [23, 2, 23, 23])


def test_an_option_that_a_partial_sets_is_the_verifiers_own(sampled):
    def judge(example, text, length):
        return float(length)

    reward = rewards.score(sampled, decode, functools.partial(judge, length=7)).reward
    np.testing.assert_array_equal(reward, [7, 7, 7, 7])


def test_a_verifier_without_a_signature_gets_the_text_alone(sampled):
    with pytest.raises(ValueError, match="the verifier max fails on a completion"):
        rewards.score(sampled, decode, max)  # of a problem and a text


def test_seven_wrong_completions_and_one_cut_off_teach_nothing():
    """With a verifier of -1 and +1."""
    sampled = rollout([[1, 9]] * 7 + [[2, 2]], [2] * 8, [True] * 7 + [False], [Example("", "b")])

    def plus_minus(example, text):
        return 1.0 if text == example.answer else -1.0  # right, were it not cut off

    scored = rewards.score(sampled, lambda ids: "_ab"[ids[0]], plus_minus)
    advantage = advantages.grpo(scored.reward, np.zeros(8, np.int32), num_groups=1)
    np.testing.assert_array_equal(advantage, np.zeros(8))


@pytest.mark.parametrize(
    "value",
    [float("nan"), -float("inf"), None, 1e300, [1.0, 0.0], "high", 1j],
    ids=["nan", "-inf", "None", "over float32", "a list", "a word", "complex"],
)
def test_a_reward_that_is_no_finite_number_is_refused_with_prompt_and_verifier(value):
    sampled = rollout([[1], [1]], [1, 1], [True, True], [Example("How many? " * 9, "")])

    def judge(example, text):
        return value

    with pytest.raises(ValueError) as error:
        rewards.score(sampled, str, judge)
    assert re.fullmatch(
        r"the verifier \S*judge gives .* for a completion of the prompt "
        r"'How many\? .{50}\.\.\.'; a reward must be one finite number",
        str(error.value),
    )


def test_a_verifier_that_fails_is_named_with_its_prompt_and_line():
    def judge(example, text):
        return {}["gold"]

    sampled = rollout([[1]], [1], [True], [Example([{"role": "user", "content": "How many?"}], "")])
    with pytest.raises(ValueError) as error:
        rewards.score(sampled, str, judge)
    line = judge.__code__.co_firstlineno + 1
    assert str(error.value).endswith(
        f"judge fails on a completion of the prompt 'How many?': {__file__}, line {line}: "
        "KeyError: 'gold'; fix the verifier"
    )
