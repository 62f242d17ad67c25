"""The cost of reading and comparing answers, hostile ones included, is bounded."""

import contextlib
import os
import sys
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcmdp_jax.answers import compare, computed, read, tokens, values, work
from support import answers_table

LONG = "1" * (tokens.LONGEST + 1)


def test_an_answer_of_more_than_1000_characters_equals_itself():
    assert compare.compare(LONG, LONG) is compare.Verdict.EQUAL


def test_an_answer_of_more_than_1000_characters_is_not_read():
    assert compare.compare(LONG, "1") is compare.compare("1", LONG) is compare.Verdict.UNREADABLE


@pytest.mark.parametrize(
    "text",
    [
        r"\frac4.5",
        r"\sqrt.6",
        r"\frac4e33",
        "f(x) = 5 cm",
        r"\frac",
        "x^",
        "_",
        "(1,",
        r"\begin{pmatrix}",
    ],
)
def test_what_is_cut_off_or_mixed_up_equals_itself_alone(text):
    assert (
        compare.equal(text, text)
        and not compare.equal(text, "1")
        and not compare.equal("f(t) = 6 cm", text)
    )


TEXTS = st.text(max_size=60) | st.text("0123456789.,/\\frac{}sqrt()[]^_$ %+-!|xe=<>", max_size=60)


@given(TEXTS)
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(tokens.Unreadable):
        read.read(text)
    compare.equal(text, "1")
    computed.is_computed(text)


@given(TEXTS)
def test_any_text_but_an_empty_one_equals_itself(text):
    assert compare.equal(text, text) is bool(tokens.plain(text))


WRITTEN = sorted({text for gold, answer, _ in answers_table.by_hand() for text in (gold, answer)})


spoilt_in_one_place = given(
    st.sampled_from(WRITTEN), st.integers(0, 60), st.integers(0, 3), st.sampled_from(WRITTEN)
)


@spoilt_in_one_place
def test_an_answer_spoilt_in_one_place_is_read_or_refused(text, at, length, other):
    spoilt = text[:at] + other[:length] + text[at + length :]
    for one, another in ((spoilt, text), (text, spoilt), (spoilt, other)):
        assert compare.compare(one, another) in compare.Verdict
    computed.is_computed(spoilt)


@spoilt_in_one_place
def test_an_answer_spoilt_in_one_place_equals_itself_unless_it_is_empty(text, at, length, other):
    spoilt = text[:at] + other[:length] + text[at + length :]
    assert compare.equal(spoilt, spoilt) is bool(tokens.plain(spoilt))


HOSTILE = [
    "__import__('os').system('touch HACKED')",
    "9^9^9^9",
    "9**9**9**9",
    "1e999999999",
    r"1 \times 10^{999999999}",
    r"\sin" * 240 + "1",
    "(" * 900,
    "-" * 900 + "1",
    "9^" * 400 + "9",
    "1+" * 490 + "1",
    "1/" * 490 + "1",
    "x'" * 400,
    "9!" * 300,
    "9" + "!" * 300,
    r"\sqrt" * 190 + "2",
    "e^" * 400 + "2",
    r"\pm1" * 300,
    r"\pm1," * 230,
    "99999999^99*" * 80 + "1",
    r"\binom{1400}{700}" * 50,
    "x^{x^{" * 15 + "x" + "}}" * 15,
    "|" * 990,
    "1 1/" * 240,
    r"\frac12" * 140,
    r"\frac" * 190 + "1",
    r"\sin x+" * 140 + "1",
    r"\{" * 400,
    r"\begin{pmatrix}" + "1&" * 400 + r"1\end{pmatrix}",
    "1,2" * 300,
    r"\text{a}" * 140,
    r"\sqrt{2+\sqrt{2+\sqrt{2+\sqrt{2+\sqrt{2}}}}}",
    r"\sqrt[3]{x^{999}\sqrt[3]{x^{999}}}",
    r"\sqrt[9]{x^{999}\sqrt[9]{x^{999}\sqrt[9]{x^{999}}}}",
    r"\sqrt[9]{x^{1999}}\sqrt[9]{x^{1998}}\sqrt[9]{x^{1997}}",
    r"\sqrt[9]{3^{12000}}+\sqrt[7]{3^{12000}}",
    r"\sqrt{\sqrt{\sqrt{2^{19999}}}}",
    r"(2^{19999})^{1/9}",
    r"\sqrt[7]{1000!}",
    r"1500!/1499!",
    r"\binom{1500}{750}^{1/7}",
    "x^{x^{x^{x^{x^x}}}}",
    "1.0000001^{2000}",
    "(1/3)^{6000}+(1/7)^{6000}",
    r"\frac{1}{1+" * 20 + "x" + "}" * 20,
    "+".join(f"1/{p}^{{200}}" for p in range(2, 60)),
    ",".join(rf"\sin {i}" for i in range(100)),
    ",".join(map(str, range(250))),
    ",".join(rf"\sqrt{{{i}}}" for i in range(2, 90)),
    "1,000" * 180,
    r"\mathbf{" * 100 + "1" + "}" * 100,
    "{" * 500,
    "\ufdfa" * 990,
    "\u00bd" * 300,
    "\u00b2" * 900,
    "|x|" * 200,
    r"\log_" * 190 + "2",
    "0.(3)" * 150,
    "1:" * 400 + "1",
    "x<" * 400 + "1",
    "1 or " * 190 + "1",
    r"x\ne 1 and " * 80 + "x>0",
    r"\cup".join(f"({i},{i + 1})" for i in range(100)),
    r"\{x|" * 100,
    "all real numbers except " + ",".join(map(str, range(200))),
    "5 ft " * 190,
    "cm^9" * 200,
    r"\pm" * 200 + "1",
    r"\begin{vmatrix}" + r"x&y&z&w\\" * 3 + r"x&y&z&w\end{vmatrix}",
    r"\arcsin(\arcsin(\arcsin(\arcsin(x))))",
    r"2\cdot" * 150 + r"\begin{pmatrix}" + "1&" * 30 + r"1\end{pmatrix}",
    "f(x)=" * 190 + "1",
    "(a,b)=(1,2)," * 80 + "1",
    "((x+1)^{9}+1)^{9}+((y+1)^{9}+1)^{9}",
    r"\frac{\pi}{" * 30 + "3" + "}" * 30,
    "x_{" * 300,
    "x" + "'" * 900,
    r"\sqrt{x}" * 90,
    r"\ln(x)\ln(y)\ln(z)" * 50,
    "i^i" * 300,
    r"\sqrt{999983}" * 70,
]
EVENTS = 1_000_000  # calls and returns of functions; some 0.05 s


def events(function):
    """How many calls and returns of functions a call makes, which no clock disturbs."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def pairs_of(hostile):
    return [
        ("1", hostile),
        ("x+1", hostile),
        ("1, 2", hostile),
        (hostile, hostile + "+0"),
        (hostile, hostile.replace("1", "2").replace("x", "y") + "/3"),
    ]


hostile_answers = pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: ascii(text[:20]))


@pytest.mark.full
@hostile_answers
def test_hostile_answers_are_not_run(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for gold, answer in pairs_of(hostile):
        compare.compare(gold, answer)
    computed.is_computed(hostile)
    assert not os.listdir()


@pytest.mark.full
@hostile_answers
def test_comparing_hostile_answers_makes_few_calls(hostile):
    pairs = pairs_of(hostile)
    assert max(events(partial(compare.compare, *pair)) for pair in pairs) < EVENTS


@pytest.mark.full
@hostile_answers
def test_asking_whether_a_hostile_answer_is_computed_makes_few_calls(hostile):
    assert events(lambda: computed.is_computed(hostile)) < EVENTS


def grown(parts):
    """Expressions from smaller ones, up to high towers of what is slow to compute."""
    forms = (
        r"\sqrt{%s}",
        r"\sqrt[7]{%s}",
        "(%s)^{%s}",
        r"\frac{%s}{%s}",
        "(%s)(%s)",
        "%s+%s",
        "(%s)!",
        r"\sin(%s)",
        r"\ln(%s)",
        r"\arcsin(%s)",
        r"\binom{%s}{%s}",
        r"|%s|",
        r"\lfloor %s \rfloor",
        r"%s\pm %s",
        "%s,%s",
        "(%s,%s)",
        r"\log_{%s} %s",
        "%s=%s",
        "%s<%s",
        r"%s\cup %s",
    )

    def filled(form):
        return st.tuples(*[parts] * form.count("%s")).map(lambda chosen: form % chosen)

    return st.one_of(*map(filled, forms))


def repeated(chosen):
    expression, sign = chosen
    return (expression + sign) * ((tokens.LONGEST - 20) // len(expression + sign)) + expression


LEAVES = ["2", "99", "0.1", "1e300", "x", "n", r"\pi", "e", "i", "1500", "1/3", r"30^\circ", "5 cm"]
EXPRESSIONS = st.recursive(st.sampled_from(LEAVES), grown, max_leaves=40)
REPEATED = st.tuples(EXPRESSIONS, st.sampled_from([",", "+", "*", "^", " or ", ""])).map(repeated)


@settings(max_examples=40, deadline=None)
@given(EXPRESSIONS | REPEATED, EXPRESSIONS | REPEATED)
def test_no_expression_takes_much_work(gold, answer):
    assert events(lambda: compare.compare(gold, answer)) < EVENTS
    assert events(lambda: compare.compare(gold, gold + "+0")) < EVENTS


def test_work_is_refused_before_it_is_done():
    counted = work.Work(10)
    counted.spend(10)
    with pytest.raises(work.TooMuchWork, match="more than 10 operations"):
        counted.spend(1)


@given(st.integers(1, 10**400), st.integers(2, 9))
def test_a_whole_root_is_the_largest_whose_power_is_no_more(n, degree):
    root = values._whole_root(n, degree)
    assert root**degree <= n < (root + 1) ** degree
