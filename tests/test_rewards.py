"""Verifiers on published answers, on the many spellings of a number, and on hostile text."""

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
from support import spellings
from support.rollouts import make_rollout

SETS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("no answer", None),
        ("", None),
        ("18", None),
        ("so\n#### 18", "18"),
        ("#### 1\nno:\n####  $1,200 \nbye", "$1,200"),
        ("####", None),
        ("####18", "18"),
        (r"\boxed{18}", "18"),
        (r"\boxed {1} then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"} } \boxed{3} {", "3"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{}", ""),
        (r"\fbox{5}", "5"),
        (r"\\boxed{6}", None),
        ("\\boxed{7}\n#### Summary", "7"),
        ("#### Result\n\\boxed{8}", "8"),
        ("work\nAnswer: $34$", "$34$"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("the Answer: 1", None),
        ("Answer: 1\n#### 2", "2"),
    ],
)
def test_final_answer(text, expected):
    assert rewards.final_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        # emphasis and the marks of Markdown are no part of an answer
        ("#### **31**", "31"),
        ("so\n\n**Answer: 31**", "31"),
        ("**Answer:** 31", "31"),
        ("\u3000Answer: 31", "31"),
        ("__Answer__: 31", "31"),
        ("**Final Answer:** 31", "31"),
        ("The final answer is: **31**", "31"),
        ("* **Answer**: 31", "31"),
        ("> **Answer:** 31", "31"),
        ("3. ANSWER: 31", "31"),
        ("final answer\uff1a31", "31"),
        ("Answer : *31*", "31"),
        ("_Answer: 31_", "31"),
        ("Answer: `31`", "31"),
        ("Answer: **31** metres", "31 metres"),
        ("Answer = 31", "31"),
        (r"\textbf{Answer:} $31$", "$31$"),
        ("#### 31 ####", "31"),
        ("Answer: 2**5", "2**5"),
        ("Answer: He has **31** pens.", "31 pens"),
        ("Answer: The total number of pens is 31.", "31"),
        ("Answer: Either there are 4, or it is 31.", "Either there are 4, or it is 31."),
        ("Answer: It is not 31.", "It is not 31."),
        ("4 and 27. Final Answer: The sum of $a$ and $b$ is 31. I hope it is correct.", "31"),
        ("Is the Answer: 31", None),
        ("Answer $31$", "$31$"),
        ("Answer: Tom makes $31 every day.", "$31 every day"),
        ("Answer: Tom has more than 31 pens.", "Tom has more than 31 pens."),
        ("Answer: Tom has 4 of 31 pens.", "4 of 31 pens"),
        ("Answer: It takes 3/4 hour.", "3/4 hour"),
        ("\u2705 **Answer: 31**", "31"),
        ("Answer\uff1a**31**\u3002", "31"),
        ("The answer is **31**, as required.", "31"),
        ("The answer is 4!", "4!"),
        ("Answer \\[ 31 \\]", "31"),
        ("Answer: -31", "-31"),
        ("#### Answer: **31**", "31"),
        # an answer below its label
        ("Answer:\n31", "31"),
        ("### Final Answer\n\n**31**", "31"),
        ("**Answer**\n\n$x = 31$\nas 3 + 28", "$x = 31$"),
        ("Final Answer:\n$$\n31\n$$", "31"),
        ("Answer:\n\\[\n\\frac{1}{3}\n\\]", r"\frac{1}{3}"),
        ("Answer:\n```\n31\n```", "31"),
        ("Answer:\n- x = 1\n- x = 31\n", "x = 1, x = 31"),
        ("Answer:", None),
        ("answer", None),
        # what is said behind an answer, unless it is a doubt or holds a number
        ("Answer: 31 (as shown above).", "31"),
        ("Answer: 31. This is the sum.", "31"),
        ("#### 31 pens", "31 pens"),
        ("Final Answer: The final answer is $31$. I hope it is correct.", "$31$"),
        ("Answer: 31, which is odd", "31"),
        ("Answer: 4 (mod 9)", "4 (mod 9)"),
        ("Answer: 31 (or so)", "31 (or so)"),
        ("Answer: 31. Or 32.", "31. Or 32."),
        ("Answer: 31. No, wait.", "31. No, wait."),
        # a sentence
        ("So the answer is 31.", "31"),
        ("Hence, the answer is $31$.", "$31$"),
        ("**The answer is 31.**", "31"),
        ("The answer is (B).", "(B)"),
        ("The final answer is 1,031 pens.", "1,031 pens"),
        (r"The correct answer is \(31\)", r"\(31\)"),
        ("I doubt the answer is 31.", None),
        ("if the answer is 31.", None),
        ("The answer is not 31.", None),
        ("The answer is less than 31.", None),
        ("the answer 31", None),
        (r"\boxed{30}. So the answer is correct.", "30"),
        (r"\boxed{30}. No. The answer is 31 as 1 is missing.", "31 as 1 is missing."),
        # boxes of other kinds
        (r"so $\fbox{31}$", "31"),
        (r"\fbox{\frac{1}{3}}", r"\frac{1}{3}"),
        (r"so $\boxed 31$.", "31"),
        (r"\boxed 31, as said", "31"),
        (r"$\boxed\frac{1}{3}$", r"\frac{1}{3}"),
        (r"\boxed -3.5.", "-3.5"),
        (r"$\boxed (3, 1)$", "(3, 1)"),
        (r"\boxed31 is it", "31"),
        (r"\[ \boxed{\frac{\sqrt{3}}{\{1\}}} \]", r"\frac{\sqrt{3}}{\{1\}}"),
        (r"\boxedly{31}", None),
        (r"\boxed{31} in \boxed{}", "31"),
        # boxes that stand together
        (r"So \boxed{4}, \boxed{6} and \boxed{9}.", "4, 6, 9"),
        (r"$x=\boxed{4}$ or $x=\boxed{6}$", "4, 6"),
        (r"\boxed{4} \boxed{4}", "4"),
        ("$$\\boxed{4}$$\n\n$$\\boxed{4}$$", "4"),
        (r"$x=\boxed{4}$, $y=\boxed{6}$", "x=4, y=6"),
        (r"\boxed{4}\quad\text{or}\quad\boxed{6}", "4, 6"),
        ("- $\\boxed{4}$\n- $\\boxed{6}$", "4, 6"),
        ("(a) \\boxed{4}\n(b) \\boxed{6}", "4, 6"),
        (r"\fbox{4}; \boxed 6", "4, 6"),
        (r"\boxed{4}, \boxed{4}, \boxed{6}", "4, 4, 6"),
        (r"\boxed{4}, so \boxed{6}", "6"),
        (r"\boxed{4}. \boxed{6}", "6"),
        (r"\boxed{4} = \boxed{6}", "6"),
        # what stands last
        ("Guess: \\boxed{30}. It fails.\n#### 31", "31"),
        ("\\boxed{30}\n\n**Answer:** 31", "31"),
        ("#### 30\nno, \\boxed{31}", "31"),
        ("Answer: 30\nSo the answer is 31.", "31"),
        ("Answer: 30\n#### 31", "31"),
        ("#### 30\nAnswer: $\\boxed{31}$", "31"),
        ("\\boxed{even}\n#### odd", "odd"),
        ("\\boxed{31}\nAnswer:", "31"),
        # a heading is no answer
        ("\\boxed{31}\n#### Step 4: check\nfine", "31"),
        ("\\boxed{31}\n#### 2. Check it\nfine", "31"),
        ("\\boxed{31}\n#### Why this works\n1", "31"),
        ("\\boxed{30}\n#### Final Answer\n31", "31"),
        ("#### no solution", "no solution"),
        ("##### 31", None),
        ("\\boxed{31}\n### 4", "31"),
        # what is thought is not stated
        ("<think>\nmaybe \\boxed{30}\n</think>\nAnswer: 31", "31"),
        ("maybe \\boxed{30}</think>\n\n#### 31", "31"),
        ("<think>\\boxed{31}</think> No.", None),
        ("<think>\nAnswer: 31", None),
        ("\\boxed{31} <think> \\boxed{30}", None),
        ("<think>a</think> 1 <think>b \\boxed{30}</think>\\boxed{31}", "31"),
        ("<think>" + "so " * 10_000 + "\\boxed{31}", None),
    ],
)
def test_what_a_completion_states(text, expected):
    assert rewards.final_answer(text) == expected


@pytest.mark.parametrize(
    "gold, completion, reward",
    [
        # a number is a number whatever its type face or unit
        ("31", r"\boxed{\textbf{31}}", 1),
        ("31", r"\boxed{\mathbf{31}}", 1),
        ("31", r"\boxed{\text{31 pens}}", 1),
        ("31", r"\boxed{\boldsymbol{31}}", 1),
        ("2/3", r"\boxed{\text{2/3}}", 1),
        ("36", r"\boxed{3\text{ dozen}}", 1),
        ("4500000", r"\boxed{4.5\text{ million}}", 1),
        ("31", r"\boxed{g(x)=31}", 1),
        ("31", r"\boxed{31 = n}", 1),
        ("31", r"\boxed{\{31\}}", 1),
        ("31", r"\boxed{\text{\$31}}", 1),
        ("31", r"\boxed{\textbf{13}}", 0),
        ("31", r"\boxed{\text{13 pens}}", 0),
        ("36", r"\boxed{2\text{ dozen}}", 0),
        ("3", r"\boxed{\sqrt{9}}", 0),
        ("31", r"\boxed{30+1}", 0),
        ("31", r"\boxed{31 = 30}", 0),
        # the value of a named quantity
        ("31", r"\boxed{p+q = 14+17 = 31}", 1),
        ("31", r"\boxed{CD = 31}", 1),
        ("31", r"\boxed{p+q = 14+17 = 30}", 0),
        ("31", r"\boxed{p+q = 14+17}", 0),
        # choices, with what they say or without
        ("B", "Answer: (B) 31", 1),
        ("(B)", r"\boxed{\text{(B) } 31}", 1),
        (r"\text{(B)}", r"\boxed{B. 31}", 1),
        ("B", "Answer: B) the last", 1),
        ("B", "Answer: (C) 31", 0),
        ("B", r"\boxed{31}", 0),
        ("B", "Answer: Ben", 0),
        ("yes", "**Answer:** Yes.", 1),
        ("yes", "**Answer:** No.", 0),
        ("no", r"\boxed{\text{No}}", 1),
        # lists
        ("4,6,9", r"So \boxed{4}, \boxed{6} and \boxed{9}.", 1),
        ("4,6,9", r"So \boxed{4}, \boxed{6}.", 0),
        ("9", r"So \boxed{4}, \boxed{6}, \boxed{9}.", 0),
        ("x=4, y=6", r"$y=\boxed{6}$ and $x=\boxed{4}$", 1),
        ("x=4, y=6", r"$y=\boxed{4}$ and $x=\boxed{6}$", 0),
        # marks that are no ASCII
        ("(4,1)", "\\boxed{\uff08\uff14\uff0c\uff11\uff09}", 1),
        ("(4,1)", "\\boxed{\uff08\uff11\uff0c\uff14\uff09}", 0),
        ("31", "Answer\uff1a\uff13\uff11", 1),
        ("1/4", "#### \u00bc", 1),
        ("1/4", "#### \u00be", 0),
        ("3\\sqrt{2}", "\\boxed{3\u221a2}", 1),
        ("3\\sqrt{2}", "\\boxed{2\u221a3}", 0),
    ],
)
def test_a_completion_earns_what_its_answer_is_worth(gold, completion, reward):
    assert rewards.math_answer(Example("How many are there?", gold), completion) == reward


SAID_OF_31 = [
    "It cannot be 31.",
    "It isn't 31.",
    "The total won\u2019t be **31**.",
    "It is never 31.",
    "He has neither 30 nor 31.",
    "The change is negative 31.",
    "The double of 31.",
    "half of $31$",
    "The third power of 31",
    "all but 31",
    "None of the 31 pens are red.",
    "See line 31.",
    "It has at most 31.",
    "There are about 31.",
    "minus **31**",
    "The loss is 31 million dollars.",
    "She has 31 dozen eggs.",
    "The total is $31$ thousand.",
    "He has **31** score.",
    "31 (thousand)",
    "31 (in millions)",
    "31 (cubed)",
    "31 (negative)",
    "31. This is in millions.",
    "31, which is half of it",
    "31, since it is in thousands",
    "Nobody has 31.",
    "The first is 30, the second is 31.",
    "Tom has 30; Ida has 31.",
    "It is 31 out of 40.",
    "It is 31, not 30.",
]


@pytest.mark.parametrize("label", ["Answer: ", "#### ", "**Answer:** ", "\u7b54\u6848\uff1a"])
@pytest.mark.parametrize("said", SAID_OF_31)
def test_a_sentence_that_says_something_else_of_a_number_earns_nothing(label, said):
    assert rewards.math_answer(Example("How many?", "31"), label + said) == 0.0


@pytest.mark.parametrize(
    "gold, completion",
    [
        ("31000000", "Answer: The loss is 31 million dollars."),
        ("372", "Answer: She has 31 dozen eggs."),
        ("31000", "#### The total is $31$ thousand."),
        ("31000", r"\boxed{31} thousand dollars"),
        ("31", "Answer: There are 31 in total."),
        ("31", r"The answer is \$31."),
        ("31", "Thus the answer: 31"),
        ("31", "My final answer is 31."),
        ("31", "(Answer: 31)"),
        ("31", "[Answer: 31]"),
        ("31", "Answer:\n> 31"),
        ("31", "Answer: 31 (because 62/2=31)"),
        ("31", "Answer: 31, since 62/2=31"),
        ("31", "#### **31** \u2705"),
        ("31", "**Answer:** \u2714 31"),
        (r"\frac{2}{5}", r"The answer is \frac{2}{5}."),
        ("(3,4)", "The answer is (3, 4)."),
        ("x^3", "The answer is x^3."),
        (r"\pi", "The answer is \u03c0."),
        ("Friday", "The answer is Friday."),
        ("31", r"The answer is \textbf{31}."),
        ("yes", "**Answer:** Yes, they are."),
        ("31", "\u7b54\u6848\u662f31\u3002"),
        ("31", "**\u7b54\u6848\uff1a** $31$"),
        ("31", "<think>\\boxed{30}</think><answer>31</answer>"),
        ("31", "<answer>\n$31$\n</answer>"),
        ("31", r"\boxed{30} is a guess, final answer is 31"),
        ("31", "#### 30\nOh: Answer: 31"),
        ("31", r"\boxed{30}. Actually Answer: 31"),
        ("1/4", r"\boxed{0.25}, \boxed{1/4}"),
        ("31", r"\textcolor{blue}{\boxed{31}}"),
        ("31", r"$\boxed{31}^{\circ}$"),
        ("31", r"$x = +\boxed{31}$"),
        ("4,6", "Part (a): \\boxed{4}\n\nPart (b): \\boxed{6}"),
        ("4,6", "$\\boxed{4}$\uff0c$\\boxed{6}$"),
        ("4,6", "$\\boxed{4}$\u3001\\boxed{6}"),
        ("4,6", "\\boxed{4}\u548c\\boxed{6}"),
        ("C", r"\boxed{\text{(C)}~31}"),
        ("C", r"\boxed{\mathbf{(C)}\ 31}"),
        ("C", r"\boxed{\text{C}. 31}"),
        ("C", r"\boxed{\text{C}\quad 31}"),
        ("C", "The correct choice is (C)."),
        ("C", "The answer is **C. 31**"),
    ],
)
def test_an_answer_is_found_in_its_other_forms(gold, completion):
    assert rewards.math_answer(Example("How many?", gold), completion) == 1.0


@pytest.mark.parametrize(
    "gold, completion",
    [
        ("3", "#### 3. Check the sum"),
        ("3", "#### **3. Check the sum**"),
        ("31", r"\boxed{31} is a guess, final answer is 30"),
        ("31", "#### 31\nOh: Answer: 30"),
        ("31", "[THINK]\\boxed{31}[/THINK] No."),
        ("31", "<reasoning>\\boxed{31}"),
        ("4", r"\frac{\boxed{3}}{\boxed{4}}"),
        ("4", r"\sqrt[3]{\boxed{4}}"),
        ("4", r"2^{\boxed{4}}"),
        ("31", r"\boxed{31} million"),
        ("31", r"-\boxed{31}"),
        ("31", r"2\boxed{31}"),
        ("31", r"1/\boxed{31}"),
        ("31", r"\boxed{31}^2"),
        ("31", r"\boxed{31} \cdot 2"),
        ("31", "\u7b54\u6848\u662f31\u4e07"),
        ("6", "$\\boxed{4}$\uff0c$\\boxed{6}$"),
        ("B", r"\boxed{\text{(B) or (C)}}"),
        ("B", "Answer: (B) and (C)"),
        ("B", r"\boxed{B+C}"),
        ("(4,6)", r"\boxed{y=4, x=6}"),
        ("(4,6)", r"\boxed{b=4, a=6}"),
    ],
)
def test_a_guess_a_part_or_a_heading_earns_nothing(gold, completion):
    assert rewards.math_answer(Example("How many?", gold), completion) == 0.0


@pytest.mark.parametrize(
    "problem, gold, copies, others",
    [
        (
            "Factor $y^2+6y+9$.",
            "(y+3)^2",
            ["y^{2}+6y+9", "y\u00b2+6y+9", "9+6y+y^2", "f(y)=y^2+6y+9"],
            ["(3+y)^2", "(y+3)(y+3)"],
        ),
        ("Factor y^2+6y+9 over the integers.", "(y+3)^2", ["y^{2}+6y+9"], ["(3+y)^2"]),
        (
            r"Simplify \(\sqrt{45}\).",
            r"3\sqrt{5}",
            [
                r"\sqrt{45}\text{ cm}",
                r"x=\sqrt{45}",
                r"{\sqrt{45}}",
                "\u221a45",
                r"\textbf{\sqrt{45}}",
                r"\sqrt{45}+0",
                r"1\cdot\sqrt{45}",
            ],
            [r"3\sqrt5", r"\sqrt5\cdot3"],
        ),
        (
            r"Simplify $\frac{y^2-9}{y^2-2y-3}$.",
            r"\frac{y+3}{y+1}",
            [r"\frac{y^2-9}{y^{2}-2y-3}", "(y^2-9)/(y^2-2y-3)"],
            ["(y+3)/(y+1)"],
        ),
        (
            "Expand $(y+4)(y-4)$.",
            "y^2-16",
            ["=(y+4)(y-4)", "((y+4)(y-4))", r"(y-4) \cdot (y+4)", r"\mathbf{(y+4)(y-4)}"],
            ["-16+y^2"],
        ),
        (
            r"Evaluate \[\int_0^2 y\,dy\]",
            "2+0x",
            [r"\int_0^2 y \, dy", r"I = \int_0^2 y\,dy"],
            ["2+0x"],
        ),
    ],
)
def test_an_expression_of_the_problem_is_copied_in_whatever_spelling(problem, gold, copies, others):
    example = Example(problem, gold)
    assert not [copy for copy in copies if rewards.math_answer(example, rf"\boxed{{{copy}}}")]
    assert all(rewards.math_answer(example, rf"\boxed{{{other}}}") for other in others)


@pytest.mark.parametrize(
    "prompt",
    [
        "Find p.",
        [{"role": "user", "content": "Find p."}],
        [{"role": "user", "content": [{"type": "image"}, {"text": "Find p."}]}],
        [{"role": "assistant", "content": None}],
        None,
        [],
    ],
)
def test_a_prompt_may_be_a_string_a_chat_or_parts(prompt):
    example = Example(prompt, "(p+1)^2")
    assert rewards.math_answer(example, r"\boxed{p^2+2p+1}") == 1.0
    assert rewards.math_answer(example, r"\boxed{p^2+2p}") == 0.0


def test_an_expression_is_copied_from_a_part_of_a_chat_too():
    prompt = [{"role": "user", "content": [{"type": "text", "text": "Expand $(p+1)^2$."}]}]
    assert rewards.math_answer(Example(prompt, "p^2+2p+1"), r"\boxed{(p+1)^2}") == 0.0


@pytest.mark.parametrize(
    "problem, gold, completion",
    [
        ("Which is odd? (A) 2 (B) 4 (C) 5", "(C)", r"\boxed{C}"),
        ("Which is odd? (A) 2 (B) 4 (C) 5", r"\text{C}", r"\boxed{(C)}"),
        ("Is 6 even or odd?", r"\text{even}", r"\boxed{even}"),
        ("Tom and Ida race. Who wins?", r"\text{Ida}", r"\boxed{Ida}"),
        ("Which of 4, 6, 8 and 9 are squares?", "9,4", r"\boxed{4, 9}"),
        ("Choose from 4,6,9,8.", r"\{4,6,9\}", r"\boxed{4,6,9}"),
        (r"Is it $[0, 2)$ or $[0, 3)$?", r"\left[0,2\right)", r"\boxed{[0, 2)}"),
        (r"Is it $\frac{\pi}{3}$?", r"\pi/3", r"\boxed{\frac{\pi}{3}}"),
        (r"Is $(3, 4)$ or $(4, 3)$ nearer?", "(3,4)", r"\boxed{\left(3, 4\right)}"),
        (r"Is $x > 2$ or $x < 2$?", r"(2, \infty)", r"\boxed{x > 2}"),
    ],
)
def test_what_has_nothing_to_compute_may_stand_in_the_problem(problem, gold, completion):
    assert rewards.math_answer(Example(problem, gold), completion) == 1.0


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


@given(st.text(max_size=200) | st.text("0123456789.,/\\frac{}boxed()^$ %+-e#\n", max_size=200))
def test_any_text_is_read_without_error(text):
    assert rewards.math_answer(Example("", "impossible"), text) == 0.0
    assert rewards.math_answer(Example("", "1"), text + r" \boxed{1}") == 1.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_solutions_earn_the_reward(data_root, split):
    every = 5 if split == "train" else 1
    for example in data.read(data_root / "gsm8k" / f"{split}.jsonl")[::every]:
        value = Fraction(example.answer.replace(",", ""))  # every gold answer is a number
        assert rewards.math_answer(example, f"so\n#### {example.answer}") == 1.0
        assert rewards.math_answer(example, rf"so \boxed{{\${float(value):,.2f}}}.") == 1.0
        assert rewards.math_answer(example, f"so\n#### {value + 1}") == 0.0
        assert rewards.math_answer(example, f"so {example.answer}") == 0.0


@pytest.mark.parametrize("name", SETS)
def test_evaluation_sets_accept_their_own_answers(data_root, name):
    for example in data.read(data_root / "math_eval" / f"{name}.jsonl"):
        gold = example.answer
        for spelling in (
            gold,
            f"${gold}$",
            f" {gold} ",
            f"{gold}.",
            gold.replace(r"\frac", r"\dfrac"),
        ):
            assert rewards.math_answer(example, rf"Thus \boxed{{{spelling}}}") == 1.0, spelling
        assert rewards.math_answer(example, rf"Thus \boxed{{{gold} + 1}}") == 0.0
        assert rewards.math_answer(example, r"Thus \boxed{}") == 0.0


def test_distinct_gold_answers_stay_distinct(data_root):
    examples = data.read(data_root / "math_eval" / "aime24.jsonl")
    for example in examples:
        others = [other.answer for other in examples if int(other.answer) != int(example.answer)]
        assert not any(rewards.math_answer(example, rf"\boxed{{{other}}}") for other in others)


@pytest.mark.parametrize("file", ["gsm8k/test", *(f"math_eval/{name}" for name in SETS)])
def test_golds_as_a_model_writes_them_and_their_neighbours(data_root, file):
    """The table of docs/answers.md, on every seventh problem of a set with many."""
    examples = data.read(data_root / f"{file}.jsonl")
    found = list(spellings.graded(examples[:: 7 if len(examples) > 100 else 1]))
    right, wrong = ([row for row in found if row[0] is kind] for kind in (True, False))
    assert len(right) > 40 and len(wrong) > 40
    assert sum(not row[-1] for row in right) <= 0.005 * len(right)
    assert not [row for row in wrong if not row[-1]]


def test_golds_of_every_kind_as_a_model_writes_them_and_their_neighbours():
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
    found = list(spellings.graded([Example("Find it.", gold) for gold in golds]))
    assert not [row for row in found if not row[-1]]
    assert len(found) > 300
    names = {spell.__name__ for spell in spellings.SPELLINGS}
    assert {name for _, name, *_ in found} == {"last", *names}


def test_an_empty_answer_is_never_right():
    assert rewards.math_answer(Example("", "$"), r"\boxed{}") == 0.0
    assert rewards.math_answer(Example("", r"\!"), "#### $") == 0.0


@pytest.mark.parametrize(
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
def test_hostile_text_costs_nothing(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = Example("", "1")
    started = time.process_time()
    for text in (hostile, rf"\boxed{{{hostile}}}", f"#### {hostile}", f"Answer: {hostile}"):
        assert rewards.math_answer(example, text) == 0.0
    assert time.process_time() - started < 0.5
    assert not list(tmp_path.iterdir())


def rollout(tokens, lengths, stopped, examples):
    tokens = np.array(tokens, np.int32)
    prompts = Prompts(
        np.zeros((len(examples), 1), np.int32), np.ones(len(examples), np.int32), tuple(examples)
    )
    logp = np.zeros(tokens.shape, np.float32)
    return make_rollout(prompts, tokens, lengths, logp, stopped)


def test_score_decodes_without_the_stop_token():
    examples = [Example("", "ab"), Example("", "cd")]
    tokens = [[1, 2, 9, 7], [1, 2, 7, 7], [3, 4, 9, 7], [1, 2, 9, 7]]
    sampled = rollout(tokens, [3, 2, 3, 3], [True, False, True, True], examples)
    scored = rewards.score(
        sampled,
        lambda ids: "".join("_abcd"[i] for i in ids),
        lambda example, text: float(text == example.answer),
    )
    assert scored.text == ("ab", "ab", "cd", "ab")
    np.testing.assert_array_equal(scored.reward, [1, 0, 1, 0])
    assert scored.reward.dtype == np.float32 and scored.rollout is sampled


def test_a_completion_that_is_cut_off_earns_what_an_empty_one_earns():
    """With a verifier of -1 and +1, seven wrong completions and one cut off teach nothing."""

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
        "KeyError: 'gold'"
    )


def test_copying_the_problem_earns_nothing():
    example = Example(r"Expand $\left(a+5\right)(b+2)$. It is a product.", "ab+2a+5b+10")
    assert (
        rewards.math_answer(example, r"\boxed{ab+2a+5b+10}")
        == rewards.math_answer(example, r"\boxed{10+5b+ab+2a}")
        == 1.0
    )
    assert (
        rewards.math_answer(example, r"\boxed{(a+5)(b+2)}")
        == rewards.math_answer(example, r"\boxed{\left(a+5\right)(b+2).}")
        == 0.0
    )
    chat = example._replace(prompt=[{"role": "user", "content": example.prompt}])
    assert rewards.math_answer(chat, r"\boxed{(a+5)(b+2)}") == 0.0
    number = Example("Which is larger, 0.5 or 0.25?", r"\frac{1}{2}")
    assert rewards.math_answer(number, r"\boxed{0.5}") == 1.0
