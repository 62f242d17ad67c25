"""Spellings of one value, published answers and their neighbours, and hostile text."""

import contextlib
import doctest
import functools
import gc
import os
import pathlib
import tempfile
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcmdp_jax import data, rewards
from dcmdp_jax.records import Example
from support import spellings

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "answers.md"
SETS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench")


@pytest.mark.parametrize(
    "forms",
    [
        (
            "18",
            "18.",
            "18.0",
            "18.00",
            "+18",
            " 18 ",
            "$18",
            r"\$18",
            "$18$",
            "18%",
            r"18\%",
            "018",
            "18 dollars",
            "x = 18",
            "x=18",
            r"18 \text{ cm}",
            r"18\text{ dollars}",
            r"18~\mathrm{m}",
            r"18\,\mathrm{cm}^2",
            "18 cm^2",
            "18 km/h",
            "18 miles per hour",
            r"18^\circ",
            r"18^{\circ}",
            "18°",
            "36/2",
            r"\frac{36}{2}",
            r"\dfrac{36}{2}",
            "1.8e1",
            r"1.8 \times 10^{1}",
            r"1.8\times10^1",
        ),
        (
            "1200",
            "1,200",
            "1,200.00",
            r"1,\!200",
            r"1{,}200",
            "$1,200",
            "1200 apples",
            "1.2e3",
            r"1.2 \cdot 10^{3}",
            "1.2 × 10^3",
        ),
        (
            "-1/2",
            "-0.5",
            "-.5",
            r"-\frac{1}{2}",
            r"-\frac12",
            r"-\frac 1 2",
            r"- \tfrac{1}{2}",
            "- 1 / 2",
            "−0.5",
            "-50e-2",
            "-2/4",
        ),
        ("9/5", "1.8", r"1\frac{4}{5}", r"1 \frac{4}{5}", "18/10 cups"),
        ("(1,1/2)", "(1, 0.5)", r"\left( 1, \frac{1}{2} \right)", r"(1,\,\frac12)", "$(1.0, .5)$"),
        ("1,-2,3", "1, -2, 3", "$1$, $-2$, $3$", "1.0,-2,3"),
        (r"\frac{\pi}{2}", r"\dfrac{\pi}{2}", r"$\frac{ \pi }{ 2 }$", r"y = \frac{\pi}{2}"),
        ("even", r"\text{even}", r"\textbf{ even }", "even."),
        (r"2\sqrt{3}", r"2\sqrt3", r"2 \sqrt 3"),
        (r"[0,\infty)", r"\left[ 0, \infty \right)"),
    ],
)
def test_spellings_are_equal(forms):
    for gold in (forms[0], forms[-1]):
        example = Example("", gold)
        stated = [rf"\boxed{{{form}}}" for form in forms]
        assert not [text for text in stated if not rewards.math_answer(example, text)]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("18", "180"),
        ("18", "-18"),
        ("1/3", "0.333"),
        ("2 n", "2"),
        ("2n", "2"),
        ("3 m", "3"),
        ("1 million", "1"),
        ("5 dozens", "5"),
        (r"288 \pi", "288"),
        ("2 pi", "2"),
        ("52_8", "52"),
        ("2^{10}", "1024"),
        ("2+2", "4"),
        ("1/0", "0"),
        ("3 or more", "3"),
        ("1.5.5", "1.5"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,200)", "1200"),
        ("12,00", "1200"),
        ("1e5", "1e6"),
        ("1e9999", "1e9998"),
        ("1 2", "12"),
        (r"\sqrt{3}", "3"),
        ("a", "A"),
        ("5 squared", "5"),
        ("x^2=4", "4"),
        ("0", ""),
        (r"\frac{1}{2}", r"\frac{1}{2}x"),
        ("٣", "3"),
    ],
)
def test_different_answers_differ(answer, gold):
    assert rewards.math_answer(Example("", gold), rf"\boxed{{{answer}}}") == 0.0


@given(st.fractions(max_denominator=10**6), st.integers(0, 8))
def test_numbers_are_exact(value, places):
    n = value.numerator
    d = value.denominator
    decimal = Fraction(n, 10**places)
    digits = str(abs(n)).zfill(places + 1)
    text = "-" * (n < 0) + digits[: len(digits) - places] + "." + digits[len(digits) - places :]
    for gold, answer in (
        (value, f"{n}/{d}"),
        (value, rf"{'-' * (n < 0)}\frac{{{abs(n)}}}{{{d}}}"),
        (decimal, text),
        (n, f"{n:,}"),
    ):
        assert rewards.math_answer(Example("", str(gold)), f"#### {answer}") == 1.0
        assert rewards.math_answer(Example("", str(gold + 1)), f"#### {answer}") == 0.0


TEXTS = st.text(max_size=200) | st.text("0123456789.,/\\frac{}boxed()^$ %+-e#\n", max_size=200)


@given(TEXTS)
def test_any_text_without_the_answer_earns_nothing(text):
    assert rewards.math_answer(Example("", "impossible"), text) == 0.0


@given(TEXTS)
def test_a_boxed_answer_is_found_after_any_text(text):
    assert rewards.math_answer(Example("", "1"), text + r" \boxed{1}") == 1.0


@pytest.fixture(scope="module", params=["train", "test"])
def gsm8k(request, data_root):
    """Problems of a split, and their answers, which are numbers all."""
    every = 5 if request.param == "train" else 1
    examples = data.read(data_root / "gsm8k" / f"{request.param}.jsonl")[::every]
    return [(example, Fraction(example.answer.replace(",", ""))) for example in examples]


@pytest.mark.full
def test_gsm8k_solutions_earn_the_reward(gsm8k):
    for example, value in gsm8k:
        assert rewards.math_answer(example, f"so\n#### {example.answer}") == 1.0
        assert rewards.math_answer(example, rf"so \boxed{{\${float(value):,.2f}}}.") == 1.0


@pytest.mark.full
def test_gsm8k_solutions_that_are_one_too_many_earn_nothing(gsm8k):
    for example, value in gsm8k:
        assert rewards.math_answer(example, f"so\n#### {value + 1}") == 0.0


@pytest.mark.full
def test_gsm8k_solutions_that_mark_no_answer_earn_nothing(gsm8k):
    for example, _ in gsm8k:
        assert rewards.math_answer(example, f"so {example.answer}") == 0.0


@pytest.fixture(scope="module", params=SETS)
def evaluation_set(request, data_root):
    return data.read(data_root / "math_eval" / f"{request.param}.jsonl")


@pytest.mark.full
def test_evaluation_sets_accept_their_own_answers(evaluation_set):
    for example in evaluation_set:
        gold = example.answer
        for spelling in (
            gold,
            f"${gold}$",
            f" {gold} ",
            f"{gold}.",
            gold.replace(r"\frac", r"\dfrac"),
        ):
            assert rewards.math_answer(example, rf"Thus \boxed{{{spelling}}}") == 1.0, spelling


@pytest.mark.full
def test_evaluation_sets_refuse_their_own_answers_plus_one(evaluation_set):
    for example in evaluation_set:
        assert rewards.math_answer(example, rf"Thus \boxed{{{example.answer} + 1}}") == 0.0


@pytest.mark.full
def test_evaluation_sets_refuse_an_empty_box(evaluation_set):
    for example in evaluation_set:
        assert rewards.math_answer(example, r"Thus \boxed{}") == 0.0


def test_the_example_of_the_page_runs():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted == 6 and result.failed == 0


def test_distinct_gold_answers_stay_distinct(data_root):
    examples = data.read(data_root / "math_eval" / "aime24.jsonl")
    for example in examples:
        others = [other.answer for other in examples if int(other.answer) != int(example.answer)]
        assert not any(rewards.math_answer(example, rf"\boxed{{{other}}}") for other in others)


@pytest.fixture(scope="module", params=["gsm8k/test", *(f"math_eval/{name}" for name in SETS)])
def graded(request, data_root):
    """The table of docs/answers.md, on every seventh problem of a set with many: rows of what is
    right and of what is wrong.
    """
    examples = data.read(data_root / f"{request.param}.jsonl")
    found = list(spellings.graded(examples[:: 7 if len(examples) > 100 else 1]))
    right, wrong = ([row for row in found if row[0] is kind] for kind in (True, False))
    return right, wrong


@pytest.mark.full
def test_golds_as_a_model_writes_them_are_right(graded):
    right, _ = graded
    assert len(right) > 40
    assert sum(not row[-1] for row in right) <= 0.005 * len(right)


@pytest.mark.full
def test_neighbours_of_golds_as_a_model_writes_them_are_wrong(graded):
    _, wrong = graded
    assert len(wrong) > 40
    assert not [row for row in wrong if not row[-1]]


@functools.cache
def graded_of_every_kind():
    """The same of made-up golds."""
    golds = (
        "31",
        "-4",
        "1,250",
        "12500",
        "0.75",
        r"\frac{3}{8}",
        r"-\frac{17}{3}",
        "(4, 9)",
        r"\left( 3, \frac{\pi}{2} \right)",
        "4, 6, 9",
        "3,-1",
        r"\text{Ida}",
        "(C)",
        r"2\sqrt{5}",
        "[2,7)",
        r"x^2-4x+1",
        r"\frac{\pi}{6}",
        "$31$",
        r"1 \pm \sqrt{2}",
    )
    return list(spellings.graded([Example("Find it.", gold) for gold in golds]))


def test_golds_of_every_kind_as_a_model_writes_them_and_their_neighbours():
    found = graded_of_every_kind()
    assert not [row for row in found if not row[-1]]
    assert len(found) > 300


def test_golds_of_every_kind_are_written_in_every_spelling():
    names = {spell.__name__ for spell in spellings.SPELLINGS}
    assert {name for _, name, *_ in graded_of_every_kind()} == {"last", *names}


def test_an_empty_answer_is_never_right():
    assert rewards.math_answer(Example("", "$"), r"\boxed{}") == 0.0
    assert rewards.math_answer(Example("", r"\!"), "#### $") == 0.0


hostile_texts = pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('touch HACKED')",
        "().__class__.__base__.__subclasses__()",
        "9^9^9^9",
        "9**9**9**9",
        "1e999999999",
        "1e-999999999",
        r"1 \times 10^{999999999}",
        "9" * 10**6,
        "1," * 10**5,
        "(" * 10**5,
        "{" * 10**5 + "}" * 10**5,
        r"\boxed{" * 10**5,
        r"\frac{" * 10**5,
        "a " * 5 * 10**5,
        "1/" * 10**5,
        "\\" * 10**6,
        "-" * 10**5,
        r"\text{" * 10**5,
        "####" * 10**5,
        " " * 10**6,
        "Answer: " * 10**5,
        "#### " + "9" * 990,
        "#### " + "1 cm " * 190,
        "#### 1" + " /" * 400,
        "#### " + r"\text{a}" * 140,
        "1" + "0" * 4400,
        r"\boxed a{" * 3000,
        r"\boxed{2}, " * 2000,
        "answer\n" * 3000,
        "Answer:\n- x\n" * 2000,
        "So the answer is $" * 1500,
        "Answer: " + ". A" * 7000 + "1",
        "#### Word\n" * 2000,
        "> " * 10_000 + "answer",
        "Answer: " + "(see " * 4000,
        r"$x=\boxed{2}$ or " * 1200,
        "</think>" * 10**5,
        "Answer:" + "*_" * 9000,
        "; answer is 1 a" * 1400,
        r"\boxed " + "{a{b}" * 4000,
        "the answer is $" + r"\a" * 9000,
        "=. Answer" * 2200,
        ". Answer: x " * 1700,
        "Answer: " + ", since (" * 100,
        "<answer>" * 2500,
        r"\frac{\boxed{3}}" * 1200,
        r"\boxed{3}" + "a_{aaaaaaaa" * 18 + r"\boxed{2}",
    ],
)


@functools.cache
def rewarded(hostile):
    """Rewards of its places in a completion, this thread's CPU seconds, and files that are left."""
    example = Example("", "1")
    texts = (hostile, rf"\boxed{{{hostile}}}", f"#### {hostile}", f"Answer: {hostile}")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        gc.disable()  # what other tests have left is not this one's to collect
        try:
            started = time.thread_time()
            found = [rewards.math_answer(example, text) for text in texts]
            return found, time.thread_time() - started, os.listdir()
        finally:
            gc.enable()


@hostile_texts
def test_hostile_text_earns_nothing(hostile):
    found, _, _ = rewarded(hostile)
    assert found == [0.0] * 4


@hostile_texts
def test_hostile_text_takes_little_time(hostile):
    _, seconds, _ = rewarded(hostile)
    assert seconds < 0.5


@hostile_texts
def test_hostile_text_is_not_run(hostile):
    _, _, files = rewarded(hostile)
    assert not files
