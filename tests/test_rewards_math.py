"""The reward of a completion for its answer: right ones, wrong ones, and copies of the problem."""

import pytest

from dcmdp_jax import rewards
from dcmdp_jax.records import Example


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


copied = pytest.mark.parametrize(
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


@copied
def test_an_expression_of_the_problem_is_copied_in_whatever_spelling(problem, gold, copies, others):
    example = Example(problem, gold)
    assert not [copy for copy in copies if rewards.math_answer(example, rf"\boxed{{{copy}}}")]


@copied
def test_an_answer_in_another_spelling_is_no_copy_of_the_problem(problem, gold, copies, others):
    example = Example(problem, gold)
    assert all(rewards.math_answer(example, rf"\boxed{{{other}}}") for other in others)


prompts = pytest.mark.parametrize(
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


@prompts
def test_a_prompt_may_be_a_string_a_chat_or_parts(prompt):
    assert rewards.math_answer(Example(prompt, "(p+1)^2"), r"\boxed{p^2+2p+1}") == 1.0


@prompts
def test_a_wrong_answer_to_a_string_a_chat_or_parts_earns_nothing(prompt):
    assert rewards.math_answer(Example(prompt, "(p+1)^2"), r"\boxed{p^2+2p}") == 0.0


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


EXPAND = Example(r"Expand $\left(a+5\right)(b+2)$. It is a product.", "ab+2a+5b+10")


@pytest.mark.parametrize("answer", ["ab+2a+5b+10", "10+5b+ab+2a"])
def test_the_terms_of_an_answer_may_stand_in_any_order(answer):
    assert rewards.math_answer(EXPAND, rf"\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("copy", ["(a+5)(b+2)", r"\left(a+5\right)(b+2)."])
def test_copying_the_problem_earns_nothing(copy):
    assert rewards.math_answer(EXPAND, rf"\boxed{{{copy}}}") == 0.0


def test_copying_the_problem_of_a_chat_earns_nothing():
    chat = EXPAND._replace(prompt=[{"role": "user", "content": EXPAND.prompt}])
    assert rewards.math_answer(chat, r"\boxed{(a+5)(b+2)}") == 0.0


def test_a_number_of_the_problem_may_be_its_answer():
    number = Example("Which is larger, 0.5 or 0.25?", r"\frac{1}{2}")
    assert rewards.math_answer(number, r"\boxed{0.5}") == 1.0
