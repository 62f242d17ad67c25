"""Verifiers on published answers, on the many spellings of a number, and on hostile text."""

import pathlib
import re
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcmdp_jax import data, rewards
from dcmdp_jax.losses import advantages
from dcmdp_jax.records import Example, Prompts
from rollouts import make_rollout

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
SETS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench")


@pytest.mark.parametrize("text, expected", [
    ("no answer", None), ("", None), ("18", None), ("so\n#### 18", "18"), ("#### 1\nno:\n####  $1,200 \nbye", "$1,200"),
    ("####", None), ("####18", "18"), (r"\boxed{18}", "18"), (r"\boxed {1} then \boxed{ 2 }.", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} \boxed{2", "1"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."), (r"} } \boxed{3} {", "3"), (r"\boxed{\boxed{4}}", "4"),
    (r"\boxed{}", ""), (r"\fbox{5}", None), (r"\\boxed{6}", None), ("\\boxed{7}\n#### Summary", "7"),
    ("#### Result\n\\boxed{8}", "8"), ("work\nAnswer: $34$", "$34$"), ("Answer: 1\nAnswer: 2", "2"),
    ("the Answer: 1", None), ("Answer: 1\n#### 2", "2"),
])
def test_final_answer(text, expected):
    assert rewards.final_answer(text) == expected


@pytest.mark.parametrize("spellings", [
    ("18", "18.", "18.0", "18.00", "+18", " 18 ", "$18", r"\$18", "$18$", "18%", r"18\%", "018", "18 dollars", "x = 18",
     "x=18", r"18 \text{ cm}", r"18\text{ dollars}", r"18~\mathrm{m}", r"18\,\mathrm{cm}^2", "18 cm^2", "18 km/h",
     "18 miles per hour", r"18^\circ", r"18^{\circ}", "18°", "36/2", r"\frac{36}{2}", r"\dfrac{36}{2}", "1.8e1",
     r"1.8 \times 10^{1}", r"1.8\times10^1"),
    ("1200", "1,200", "1,200.00", r"1,\!200", r"1{,}200", "$1,200", "1200 apples", "1.2e3", r"1.2 \cdot 10^{3}",
     "1.2 × 10^3"),
    ("-1/2", "-0.5", "-.5", r"-\frac{1}{2}", r"-\frac12", r"-\frac 1 2", r"- \tfrac{1}{2}", "- 1 / 2", "−0.5", "-50e-2",
     "-2/4"),
    ("9/5", "1.8", r"1\frac{4}{5}", r"1 \frac{4}{5}", "18/10 cups"),
    ("(1,1/2)", "(1, 0.5)", r"\left( 1, \frac{1}{2} \right)", r"(1,\,\frac12)", "$(1.0, .5)$"),
    ("1,-2,3", "1, -2, 3", "$1$, $-2$, $3$", "1.0,-2,3"),
    (r"\frac{\pi}{2}", r"\dfrac{\pi}{2}", r"$\frac{ \pi }{ 2 }$", r"y = \frac{\pi}{2}"),
    ("even", r"\text{even}", r"\textbf{ even }", "even."),
    (r"2\sqrt{3}", r"2\sqrt3", r"2 \sqrt 3"),
    (r"[0,\infty)", r"\left[ 0, \infty \right)"),
])
def test_spellings_are_equal(spellings):
    for gold in (spellings[0], spellings[-1]):
        assert not [answer for answer in spellings if not rewards.math_answer(Example("", gold), rf"\boxed{{{answer}}}")]


@pytest.mark.parametrize("answer, gold", [
    ("18", "180"), ("18", "-18"), ("1/3", "0.333"), ("2 n", "2"), ("2n", "2"), ("3 m", "3"), ("1 million", "1"),
    ("5 dozens", "5"), (r"288 \pi", "288"), ("2 pi", "2"), ("52_8", "52"), ("2^{10}", "1024"), ("2+2", "4"),
    ("1/0", "0"), ("3 or more", "3"), ("1.5.5", "1.5"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,200)", "1200"),
    ("12,00", "1200"), ("1e5", "1e6"), ("1e9999", "1e9998"), ("1 2", "12"), (r"\sqrt{3}", "3"), ("a", "A"),
    ("5 squared", "5"), ("x^2=4", "4"), ("0", ""), (r"\frac{1}{2}", r"\frac{1}{2}x"), ("٣", "3"),
])
def test_different_answers_differ(answer, gold):
    assert rewards.math_answer(Example("", gold), rf"\boxed{{{answer}}}") == 0.0


@given(st.fractions(max_denominator=10**6), st.integers(0, 8))
def test_numbers_are_exact(value, places):
    n, d = value.numerator, value.denominator
    decimal = Fraction(n, 10**places)
    digits = str(abs(n)).zfill(places + 1)
    text = "-" * (n < 0) + digits[:len(digits) - places] + "." + digits[len(digits) - places:]
    for gold, answer in ((value, f"{n}/{d}"), (value, rf"{'-' * (n < 0)}\frac{{{abs(n)}}}{{{d}}}"), (decimal, text), (n, f"{n:,}")):
        assert rewards.math_answer(Example("", str(gold)), f"#### {answer}") == 1.0
        assert rewards.math_answer(Example("", str(gold + 1)), f"#### {answer}") == 0.0


@given(st.text(max_size=200) | st.text("0123456789.,/\\frac{}boxed()^$ %+-e#\n", max_size=200))
def test_any_text_is_read_without_error(text):
    assert rewards.math_answer(Example("", "impossible"), text) == 0.0
    assert rewards.math_answer(Example("", "1"), text + r" \boxed{1}") == 1.0


@needs_shared
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_gsm8k_solutions_earn_the_reward(split, count):
    examples = data.read(SHARED / "gsm8k" / f"{split}.jsonl")
    assert len(examples) == count
    for example in examples:
        value = Fraction(example.answer.replace(",", ""))  # every gold answer is a number
        assert rewards.math_answer(example, f"so\n#### {example.answer}") == 1.0
        assert rewards.math_answer(example, rf"so \boxed{{\${float(value):,.2f}}}.") == 1.0
        assert rewards.math_answer(example, f"so\n#### {value + 1}") == 0.0
        assert rewards.math_answer(example, f"so {example.answer}") == 0.0


@needs_shared
@pytest.mark.parametrize("name", SETS)
def test_evaluation_sets_accept_their_own_answers(name):
    for example in data.read(SHARED / "math_eval" / f"{name}.jsonl"):
        gold = example.answer
        for spelling in (gold, f"${gold}$", f" {gold} ", f"{gold}.", gold.replace(r"\frac", r"\dfrac")):
            assert rewards.math_answer(example, rf"Thus \boxed{{{spelling}}}") == 1.0, spelling
        assert rewards.math_answer(example, rf"Thus \boxed{{{gold} + 1}}") == 0.0
        assert rewards.math_answer(example, r"Thus \boxed{}") == 0.0


@needs_shared
def test_distinct_gold_answers_stay_distinct():
    examples = data.read(SHARED / "math_eval" / "aime24.jsonl")
    for example in examples:
        others = [other.answer for other in examples if int(other.answer) != int(example.answer)]
        assert not any(rewards.math_answer(example, rf"\boxed{{{other}}}") for other in others)


def test_an_empty_answer_is_never_right():
    assert rewards.math_answer(Example("", "$"), r"\boxed{}") == 0.0
    assert rewards.math_answer(Example("", r"\!"), "#### $") == 0.0


@pytest.mark.parametrize("hostile", [
    "__import__('os').system('touch HACKED')", "().__class__.__base__.__subclasses__()", "9^9^9^9", "9**9**9**9",
    "1e999999999", "1e-999999999", r"1 \times 10^{999999999}", "9" * 10**6, "1," * 10**5, "(" * 10**5,
    "{" * 10**5 + "}" * 10**5, r"\boxed{" * 10**5, r"\frac{" * 10**5, "a " * 5 * 10**5, "1/" * 10**5, "\\" * 10**6,
    "-" * 10**5, r"\text{" * 10**5, "####" * 10**5, " " * 10**6, "Answer: " * 10**5, "#### " + "9" * 990,
    "#### " + "1 cm " * 190, "#### 1" + " /" * 400, "#### " + r"\text{a}" * 140, "1" + "0" * 4400,
])
def test_hostile_text_costs_nothing(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, started = Example("", "1"), time.perf_counter()
    for text in (hostile, rf"\boxed{{{hostile}}}", f"#### {hostile}", f"Answer: {hostile}"):
        assert rewards.math_answer(example, text) == 0.0
    assert time.perf_counter() - started < 0.5
    assert not list(tmp_path.iterdir())


def rollout(tokens, lengths, stopped, examples):
    tokens = np.array(tokens, np.int32)
    prompts = Prompts(np.zeros((len(examples), 1), np.int32), np.ones(len(examples), np.int32), tuple(examples))
    logp = np.zeros(tokens.shape, np.float32)
    return make_rollout(prompts, tokens, lengths, logp, stopped)


def test_score_decodes_without_the_stop_token():
    examples = [Example("", "ab"), Example("", "cd")]
    tokens = [[1, 2, 9, 7], [1, 2, 7, 7], [3, 4, 9, 7], [1, 2, 9, 7]]
    sampled = rollout(tokens, [3, 2, 3, 3], [True, False, True, True], examples)
    scored = rewards.score(sampled, lambda ids: "".join("_abcd"[i] for i in ids),
                           lambda example, text: float(text == example.answer))
    assert scored.text == ("ab", "ab", "cd", "ab")
    np.testing.assert_array_equal(scored.reward, [1, 0, 1, 0])
    assert scored.reward.dtype == np.float32 and scored.rollout is sampled


def test_a_completion_that_is_cut_off_earns_what_an_empty_one_earns():
    """With a verifier of -1 and +1, eight completions of a prompt, seven wrong and one cut off, teach nothing."""
    def plus_minus(example, text):
        return 1.0 if text == example.answer else -1.0

    sampled = rollout([[1, 9]] * 7 + [[2, 2]], [2] * 8, [True] * 7 + [False], [Example("", "b")])
    scored = rewards.score(sampled, lambda ids: "".join("_ab"[i] for i in ids), plus_minus)
    assert scored.text[7] == "bb"
    np.testing.assert_array_equal(scored.reward, [-1] * 8)
    advantage = advantages.grpo(scored.reward, np.zeros(8, np.int32), num_groups=1)
    np.testing.assert_array_equal(advantage, np.zeros(8))
    zero_one = rewards.score(sampled, str, rewards.math_answer)
    np.testing.assert_array_equal(zero_one.reward, np.zeros(8))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), None, 1e300, [1.0, 0.0], "high", 1j],
                         ids=["nan", "-inf", "None", "over float32", "a list", "a word", "complex"])
def test_a_reward_that_is_no_finite_number_is_refused_with_prompt_and_verifier(value):
    sampled = rollout([[1], [1]], [1, 1], [True, True], [Example("How many? " * 9, "")])

    def judge(example, text):
        return value

    with pytest.raises(ValueError) as error:
        rewards.score(sampled, str, judge)
    assert re.fullmatch(r"the verifier \S*judge gives .* for a completion of the prompt 'How many\? .{50}\.\.\.'; a reward must "
                        "be one finite number", str(error.value))


def test_a_verifier_that_fails_is_named_with_its_prompt_and_line():
    def judge(example, text):
        return {}["gold"]

    sampled = rollout([[1]], [1], [True], [Example([{"role": "user", "content": "How many?"}], "")])
    with pytest.raises(ValueError) as error:
        rewards.score(sampled, str, judge)
    line = judge.__code__.co_firstlineno + 1
    assert str(error.value).endswith(f"judge fails on a completion of the prompt 'How many?': {__file__}, line {line}: "
                                     "KeyError: 'gold'")


def test_copying_the_problem_earns_nothing():
    example = Example(r"Expand $\left(a+5\right)(b+2)$. It is a product.", "ab+2a+5b+10")
    assert rewards.math_answer(example, r"\boxed{ab+2a+5b+10}") == rewards.math_answer(example, r"\boxed{10+5b+ab+2a}") == 1.0
    assert rewards.math_answer(example, r"\boxed{(a+5)(b+2)}") == rewards.math_answer(example, r"\boxed{\left(a+5\right)(b+2).}") == 0.0
    chat = example._replace(prompt=[{"role": "user", "content": example.prompt}])
    assert rewards.math_answer(chat, r"\boxed{(a+5)(b+2)}") == 0.0
    number = Example("Which is larger, 0.5 or 0.25?", r"\frac{1}{2}")
    assert rewards.math_answer(number, r"\boxed{0.5}") == 1.0
