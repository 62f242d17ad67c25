"""The chain task against an independent evaluation, and its expert's error rates."""

import itertools
import re

import numpy as np
import pytest

from dcmdp_jax.tasks import OPERATORS, Chain

ARITHMETIC = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def evaluate(prompt):
    """Left to right, modulo 10 at the end only: the remainder is a ring homomorphism."""
    tokens = re.findall(r"[0-9]|[-+*]", prompt)
    value = int(tokens[0])
    for operator, operand in zip(tokens[1::2], tokens[2::2]):
        value = ARITHMETIC[operator](value, int(operand))
    return str(value % 10)


CORRECT = [Chain(operations, noise=(0, 0, 0)) for operations in (1, 2, 5, 12)]


@pytest.mark.parametrize("task", CORRECT)
def test_answers_are_right(task):
    for index in range(200):
        example = task.example(index, seed=3)
        assert example.answer == evaluate(example.prompt)


@pytest.mark.parametrize("task", CORRECT)
def test_prompts_have_the_form_of_a_chain(task):
    for index in range(200):
        prompt = task.example(index, seed=3).prompt
        assert re.fullmatch(rf"[0-9]([-+*][0-9]){{{task.operations}}}=", prompt)


@pytest.mark.parametrize("task", CORRECT)
def test_an_expert_without_noise_earns_the_reward(task):
    rng = np.random.default_rng(0)
    for index in range(200):
        example = task.example(index, seed=3)
        solution = task.solution(example, rng)
        assert len(solution) == 6 * task.operations + 2
        assert set(example.prompt + solution) <= set(task.alphabet)
        assert task.reward(example, solution) == 1.0


def test_sizes_of_five_operations():
    task = Chain()
    example = task.example(0, seed=0)
    assert len(example.prompt) == 12
    assert len(task.solution(example, np.random.default_rng(0))) == 32  # the stop token is the 33rd


def test_example_is_random_access():
    task = Chain()
    forward = [task.example(i, seed=1) for i in range(20)]
    assert [task.example(i, seed=1) for i in reversed(range(20))] == forward[::-1]


def test_seeds_give_other_problems():
    task = Chain()
    one, other = ({task.example(i, seed) for i in range(20)} for seed in (1, 2))
    assert len(one) == len(other) == 20 and one != other


def test_held_out_problems_are_never_trained_on():
    task = Chain(2)
    everything = {
        f"{a}{p}{b}{q}{c}="
        for a, b, c in itertools.product("0123456789", repeat=3)
        for p, q in itertools.product(OPERATORS, repeat=2)
    }
    trained = {task.example(i, seed).prompt for seed in range(3) for i in range(25_000)}
    held_out = {example.prompt for example in task.held_out(70)}
    assert len(held_out) == 70
    assert held_out | trained <= everything
    assert not held_out & trained
    assert len(everything - trained) < len(everything) / 40  # all but the held-out share, one in 64


@pytest.fixture(scope="module")
def held_out():
    return Chain().held_out(512)


def test_held_out_problems_are_distinct_and_right(held_out):
    assert len(set(held_out)) == 512
    assert all(example.answer == evaluate(example.prompt) for example in held_out)


def test_fewer_held_out_problems_are_the_first_ones(held_out):
    assert Chain().held_out(100) == held_out[:100]


def test_held_out_problems_are_uniform(held_out):
    digits = np.array([int(d) for example in held_out for d in re.findall("[0-9]", example.prompt)])
    counts = np.bincount(digits, minlength=10)  # 3072 draws: expected 307, standard deviation 17
    assert np.abs(counts - 307.2).max() < 5 * 17


def test_more_held_out_problems_than_there_are_are_refused():
    with pytest.raises(ValueError, match="too few problems"):
        Chain(1).held_out(10)


def test_expert_errs_at_the_stated_rates():
    task = Chain()
    rng = np.random.default_rng(0)
    wrong = dict.fromkeys(OPERATORS, 0)
    seen = dict.fromkeys(OPERATORS, 0)
    for index in range(4000):
        example = task.example(index, seed=0)
        work = task.solution(example, rng)
        *steps, answer = work.split(";")
        value = example.prompt[0]
        operations = re.findall(r"[-+*][0-9]", example.prompt)
        for step, operation in zip(steps, operations, strict=True):
            left, result = step.split("=")
            assert left == value + operation  # goes on from what was written
            seen[operation[0]] += 1
            wrong[operation[0]] += result != evaluate(left)
            value = result
        assert answer == f"#{value}"
    for operator, rate in zip(OPERATORS, task.noise):
        deviation = (rate * (1 - rate) / seen[operator]) ** 0.5
        assert abs(wrong[operator] / seen[operator] - rate) < 5 * deviation


FOUR_PLUS_TWO = Chain(1).example(0, 0)._replace(prompt="4+2=", answer="6")


def test_the_right_digit_after_the_work_is_rewarded():
    assert Chain(1).reward(FOUR_PLUS_TWO, "4+2=6;#6") == 1.0


@pytest.mark.parametrize(
    "text", ["", "#", "6", "#7", "#66", "#6 ", "#6\ufffd", "#6;", "##6", "#6#6", "#6x", "3+5=8;"]
)
def test_anything_else_is_not_rewarded(text):
    assert Chain(1).reward(FOUR_PLUS_TWO, text) == 0.0


@pytest.mark.parametrize(
    "settings, message",
    [({"operations": 0}, "operations=0"), ({"noise": (0.1, 0.2, 1.3)}, "probabilities")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Chain(**settings)
