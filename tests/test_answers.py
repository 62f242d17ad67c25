"""Answers compared, against a table of labelled pairs; hostile ones cost nothing; the judge ends
what takes too long.
"""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcmdp_jax import data, worker
from dcmdp_jax.answers import compare, computed, judge, names, read, tokens, units, values, work
from support import answers_table

SETS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiadbench")


def is_curve(text):
    """True of `m + n = 5`, which names its value 5, but is no gold for it."""
    try:
        node = read.read(text)
    except work.Unreadable:
        return False
    return node[0] == "rel" and names.is_curve(node, work.Work())


@pytest.mark.parametrize(
    "gold, equation",
    [("5", "p+q=5"), ("25", "x^2+y^2=25"), ("7", "3x - 2y = 7"), ("0", "p - q = 0")],
)
def test_a_curve_that_is_asked_for_is_not_its_right_side(gold, equation):
    assert compare.compare(gold, equation) is compare.Verdict.EQUAL
    assert compare.compare(equation, gold) is compare.Verdict.DIFFERENT


@pytest.mark.parametrize(
    "gold, answer, label",
    [
        ("(3,8),(8,3)", "(x,y)=(3,8),(8,3)", True),
        ("(3,8),(8,3)", "(x,y)=(3,8),(8,4)", False),
        ("(3,8),(8,3)", r"(x,y)=(3,8) \text{ and } (8,3)", True),
        ("(3,8),(8,3)", "(x,y)=(3,8),(x,y)=(8,3)", True),
        ("(a,b)=(3,8),(8,2)", "(a,b)=(8,3),(8,2)", False),
    ],
)
def test_a_name_before_the_first_tuple_is_for_all(gold, answer, label):
    assert compare.equal(gold, answer) is label


@pytest.mark.parametrize(
    "gold, answer, label", answers_table.by_hand(), ids=lambda value: str(value)[:40]
)
def test_pairs_labelled_by_hand(gold, answer, label):
    assert compare.equal(gold, answer) is label
    assert compare.equal(answer, gold) is (label and ("=" in gold or not is_curve(answer)))
    assert compare.equal(gold, gold) and compare.equal(answer, answer)


NOT_READ = ["1/0", "1.5.5", "1e9999", "1e9998", "1 2", "5 squared", "\u0663"]


def test_pairs_labelled_by_hand_are_read_but_for_a_few():
    pairs = [pair for pair in answers_table.by_hand() if not set(pair[:2]) & set(NOT_READ)]
    for gold, answer, label in pairs:
        expected = compare.Verdict.EQUAL if label else compare.Verdict.DIFFERENT
        assert compare.compare(gold, answer) is expected, (gold, answer)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("1/0", "0"),
        ("1.5.5", "1.5"),
        (r"\int_0^1 x\,dx", r"\frac{1}{2}"),
        (r"\begin{cases} 1 \\ 2 \end{cases}", "1, 2"),
        (r"\tan 90^\circ", "0"),
        (r"\begin{pmatrix} 5 & 2 \end{pmatrix}^T", r"\begin{pmatrix} 5 \\ 2 \end{pmatrix}"),
        (
            r"\begin{pmatrix} 5 \end{pmatrix}\begin{pmatrix} 2 \end{pmatrix}",
            r"\begin{pmatrix} 10 \end{pmatrix}",
        ),
    ],
)
def test_what_is_not_read_or_cannot_be_decided_is_said_so(gold, answer):
    for one, other in ((gold, answer), (answer, gold)):
        assert compare.compare(one, other) is compare.Verdict.UNREADABLE
        assert compare.compare(one, f" {one}.") is compare.Verdict.EQUAL


def test_pairs_made_from_numbers():
    pairs = answers_table.numbers()
    assert len(pairs) > 500
    assert not [pair for pair in pairs if compare.equal(*pair[:2]) is not pair[2]]


@pytest.mark.parametrize("name", SETS)
def test_pairs_made_from_the_sets_own_answers(data_root, name):
    examples = data.read(data_root / "math_eval" / f"{name}.jsonl")
    pairs = answers_table.gold_forms(example.answer for example in examples)
    assert {label for *_, label in pairs} == {True, False}
    assert not [pair for pair in pairs if compare.equal(*pair[:2]) is not pair[2]]


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("e^{100}", "e^{100}+1"),
        (r"\pi^{90}", r"\pi^{90}+1"),
        ("e^{200}", "e^{200}-x+x+1"),
        ("1", "1+e^{-110}"),
        (r"\sqrt{2}", r"\sqrt{2}+10^{-45}"),
        (r"\pi", "3.14159265358979323846264338327950288419716939937510"),
    ],
)
def test_values_that_differ_in_their_last_digits_are_not_equal(gold, answer):
    assert not compare.equal(gold, answer) and not compare.equal(answer, gold)


@pytest.mark.parametrize(
    "gold, answer", [("1", ""), ("", "1"), ("", ""), ("$", r"\!"), (r"\text{}", "")]
)
def test_an_empty_answer_equals_nothing(gold, answer):
    assert compare.compare(gold, answer) is compare.Verdict.DIFFERENT


COMPUTED = [
    "18",
    "-1.5",
    r"\frac{1}{2}",
    "1/2",
    r"1\frac{1}{2}",
    r"1.5 \times 10^{3}",
    "10^6",
    "x = 3",
    "3 = x",
    "7 = a + b",
    "18 cm",
    "-18 cm",
    "50%",
    "1,200",
    "2.5 million",
    r"3\text{ dozen}",
    r"0.\overline{3}",
    r"\textbf{7}",
    r"\mathbf{7}",
    r"\text{3/4}",
    r"\text{9 apples}",
    r"\text{\$9}",
    "**7**",
    "f(x) = 7",
    r"\{7\}",
    "AB = 7",
    r"\text{Area} = 7",
    "a+b = 3+4 = 7",
    "1, 2",
    "(1, 2)",
    r"\{1, 2\}",
    "x",
    "B",
    r"\text{(B)}",
    "Anna",
    "no",
    "noon",
    r"\pi",
    r"\frac{\pi}{3}",
    r"\frac{2}{\pi}",
    r"\pi^2 - 9",
    "1 - i",
    r"1+\sqrt{3}i",
    r"\sqrt{2}",
    r"2\sqrt{3}",
    r"\frac{\sqrt{3}}{2}",
    r"\frac{1+\sqrt{5}}{2}",
    r"1 \pm \sqrt{6}",
    r"[0, \infty)",
    r"(-\infty, 1) \cup (2, 3]",
    "x > 2",
    r"x \ne 1",
    r"\mathbb{R} \setminus \{0\}",
    "3:2",
    "12:30",
    "6 ft 2 in",
    r"30^\circ",
    "52_8",
    r"\emptyset",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
]
NOT_COMPUTED = [
    "2+2",
    "2^{10}",
    r"\sqrt{4}",
    r"\sqrt{12}",
    r"\sqrt[3]{16}",
    r"\frac{1}{\sqrt{2}}",
    r"\sqrt{2}\sqrt{3}",
    r"\sqrt{2}+\sqrt{2}",
    "4!",
    "(1)(2)",
    "3*4",
    r"3 \cdot 4",
    "10 - 3",
    "6/2*5",
    r"\frac12+\frac13",
    r"\frac12\cdot\frac34",
    r"3 \cdot 10^2 + 5",
    "(x+1)(x-1)",
    "x+1",
    "x^2-1",
    "50% + 1",
    r"2\pi + 3\pi",
    r"\sin 30^\circ",
    r"\binom{5}{2}",
    r"\log_2 8",
    r"|{-5}|",
    r"\lfloor 7/2 \rfloor",
    "x = 2+2",
    "(1+1, 2)",
    "2+2 cm",
    r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}",
    r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    "(",
    "",
]


@pytest.mark.parametrize("text", COMPUTED)
def test_what_has_nothing_left_to_compute(text):
    assert computed.is_computed(text)


@pytest.mark.parametrize("text", NOT_COMPUTED)
def test_what_has_something_left_to_compute(text):
    assert not computed.is_computed(text)


def test_an_answer_of_more_than_1000_characters_equals_itself_alone():
    long = "1" * (tokens.LONGEST + 1)
    assert compare.compare(long, long) is compare.Verdict.EQUAL
    assert compare.compare(long, "1") is compare.compare("1", long) is compare.Verdict.UNREADABLE


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


@given(st.text(max_size=60) | st.text("0123456789.,/\\frac{}sqrt()[]^_$ %+-!|xe=<>", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        read.read(text)
    except tokens.Unreadable:
        pass
    compare.equal(text, "1")
    computed.is_computed(text)
    assert compare.equal(text, text) is bool(tokens.plain(text))


WRITTEN = sorted({text for gold, answer, _ in answers_table.by_hand() for text in (gold, answer)})


@given(st.sampled_from(WRITTEN), st.integers(0, 60), st.integers(0, 3), st.sampled_from(WRITTEN))
def test_an_answer_spoilt_in_one_place_is_read_or_refused(text, at, length, other):
    spoilt = text[:at] + other[:length] + text[at + length :]
    for one, another in ((spoilt, text), (text, spoilt), (spoilt, other)):
        assert compare.compare(one, another) in compare.Verdict
    computed.is_computed(spoilt)
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


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_answers_cost_little(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [
        ("1", hostile),
        ("x+1", hostile),
        ("1, 2", hostile),
        (hostile, hostile + "+0"),
        (hostile, hostile.replace("1", "2").replace("x", "y") + "/3"),
    ]
    started = time.process_time()
    for gold, answer in pairs:
        compare.compare(gold, answer)
    computed.is_computed(hostile)
    assert time.process_time() - started < 0.1 * (len(pairs) + 1)
    assert max(events(lambda: compare.compare(*pair)) for pair in pairs[-2:]) < EVENTS
    assert events(lambda: computed.is_computed(hostile)) < EVENTS
    assert not list(tmp_path.iterdir())


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


def test_units_are_converted():
    assert units.read("cm^2").factor * 10_000 == units.read("square meters").factor == 1
    assert (
        units.read(r"\text{ km}/\text{h}").powers
        == units.read("miles per hour").powers
        == (("m", 1), ("s", -1))
    )
    assert units.read("apples") == units.read("apple") and not units.read("apples").known
    refused = (
        "or more",
        "3",
        "cm^2 + 1",
        "million",
        "negative",
        "degrees below zero",
        "factorial",
        "reciprocal",
        "k",
        "M",
        "times two",
        "point five",
        "lakh",
        "gross",
        "ppm",
        "tenfold",
        "quintillion",
        "squared",
        "doubled",
        "octal",
    )
    assert [units.read(text) for text in refused] == [None] * len(refused)
    assert units.read("mph") == units.read("miles per hour") and units.read("times") is not None


CALCULUS = [
    (r"\int_0^1 3x^2\,dx", "1", True),
    (r"\int_0^1 3x^2\,dx", "2", False),
    (r"\sum_{k=1}^{4} k", "10", True),
    (r"\sum_{k=1}^{4} k", "11", False),
    (r"\int_0^a 2x\,dx", "a^2", True),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", "1", True),
]
HANGS = r"9^{9^{9^9}}", "1"


@pytest.fixture
def pool():
    made = []

    def make(*options, **named):
        made.append(judge.Pool(*options, **named))
        return made[-1]

    yield make
    for processes in made:
        while not processes._idle.empty():
            processes._idle.get().end()


def started(processes):
    """Process ids of those of a pool that have been started."""
    found = [idle._process for idle in processes._idle.queue]
    return [process.pid for process in found if process is not None]


def running(pid):
    """True if a process is there and is no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds):
    """True if a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_what_the_reader_cannot_read_is_judged_by_the_library():
    for gold, answer, label in CALCULUS:
        assert compare.compare(gold, answer) is compare.Verdict.UNREADABLE
        assert judge.equal(gold, answer) is label
    assert judge.library().given_up == 0


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("1/2", "0.5"),
        ("1/2", "1/3"),
        ("", ""),
        ("1", r"\int " * 1000),
        (r"\int x dx", r"\int x dx"),
    ],
)
def test_what_the_reader_can_read_is_judged_without_the_library(gold, answer, monkeypatch):
    monkeypatch.setattr(judge, "library", None)
    assert judge.equal(gold, answer) is compare.equal(gold, answer)


GENEROUS = [
    (r"\int_0^1 x^2 dx", "0.333333"),
    (r"\{1, 1, 2\}", r"\{1, 2\}"),
    ("(1, 2)", r"\{1, 2\}"),
    (r"\begin{matrix}0.333333\end{matrix}", r"\begin{matrix}1/3\end{matrix}"),
    ("x^2+C", "x^2+c"),
    ("52_8", "52"),
    (r"7 \text{ or more}", "7"),
    (r"\pi", "3.14159265358979"),
]


def test_the_library_is_not_as_generous_as_it_comes(pool):
    generous = pool([*judge.COMMAND, "alone"])
    strict = pool()
    assert all(generous.equal(*pair) for pair in GENEROUS)
    assert not [pair for pair in GENEROUS if strict.equal(*pair)]


def test_neighbours_of_what_the_library_judges_are_different():
    matrix = r"\begin{pmatrix} 7 & 2 \\ 3 & x+1 \end{pmatrix}"
    same = [
        matrix.replace("pmatrix", "bmatrix"),
        matrix.replace("x+1", "1+x"),
        matrix.replace("7", "7.0"),
    ]
    others = [
        matrix.replace("7", "8"),
        matrix.replace("7 & 2", "2 & 7"),
        matrix.replace("x", "y"),
        matrix.replace("7", "7.0000001"),
        matrix.replace("pmatrix", "vmatrix"),
        "7, 2, 3, x+1",
        matrix.replace("7 & 2", r"7 \\ 2"),
        "-" + matrix,
        matrix + r" \text{ cm}",
    ]
    assert all(judge.equal(matrix, answer) for answer in same)
    assert not [answer for answer in others if judge.equal(matrix, answer)]


def test_a_pair_is_compared_once(pool, monkeypatch):
    processes = pool(processes=1)
    assert processes.equal(*CALCULUS[0][:2])
    monkeypatch.setattr(worker.Worker, "ask", None)
    assert processes.equal(*CALCULUS[0][:2])


def test_a_comparison_that_takes_too_long_is_ended_and_the_next_is_answered(pool):
    processes = pool(seconds=1.0, processes=1)
    assert processes.equal(*CALCULUS[0][:2])
    before = time.monotonic()
    assert not processes.equal(*HANGS)
    assert time.monotonic() - before < 1.0 + judge.SLACK and processes.given_up == 1
    assert processes.equal(*CALCULUS[2][:2]) and processes.given_up == 1


FAKE = "import os, sys, time; print('ready', flush=True)\nfor line in sys.stdin: {}"


@pytest.mark.parametrize(
    "act, times",
    [
        ("time.sleep(600)", 1),
        ("sys.exit(3)", 2),
        ("print('maybe', flush=True)", 2),
        ("os.abort()", 2),
        ("print('true', flush=True)", 0),
    ],
)
def test_a_process_that_hangs_or_dies_gives_no_verdict(act, times, pool, monkeypatch):
    """One that dies is asked once more: it may have been ended while it was idle."""
    monkeypatch.setattr(judge, "SLACK", 0.0)
    starts = []
    start = worker.Worker._start

    def counted(process):
        starts.append(1)
        start(process)

    monkeypatch.setattr(worker.Worker, "_start", counted)
    processes = pool([sys.executable, "-c", FAKE.format(act)], seconds=0.5, processes=1)
    assert processes.equal("1", "1") is (times == 0)
    assert processes.given_up == (times > 0) and len(starts) == max(times, 1)


def test_a_process_that_is_killed_while_it_is_idle_is_asked_again(pool):
    processes = pool(processes=1)
    for gold, answer, label in CALCULUS[:3]:
        assert processes.equal(gold, answer) is label
        os.kill(started(processes)[0], signal.SIGKILL)
    assert processes.given_up == 0


def test_an_interrupted_question_leaves_no_reply_for_the_next(pool, monkeypatch):
    processes = pool(processes=1)
    assert processes.equal(*CALCULUS[0][:2])
    with monkeypatch.context() as patched:
        patched.setattr(worker.Worker, "_line", lambda *asked: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            processes.equal(*CALCULUS[2][:2])
    assert not processes.equal(*CALCULUS[1][:2])


def test_a_process_has_a_memory_limit_and_a_session_of_its_own(pool):
    processes = pool()
    assert processes.equal(*CALCULUS[0][:2])
    (pid,) = started(processes)  # the other one has not been needed
    limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
    assert f"Max address space         {2 << 30}" in limits
    assert os.getpgid(pid) != os.getpgrp()  # Ctrl-C is not for it


def test_threads_share_the_processes(pool):
    processes = pool()
    pairs = [
        (rf"\sum_{{k=1}}^{{{n}}} k", str(n * (n + 1) // 2 + n % 2), n % 2 == 0)
        for n in range(2, 26)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pair: processes.equal(*pair[:2]), pairs))
    assert found == [label for *_, label in pairs]
    assert len(started(processes)) == judge.PROCESSES and processes.given_up == 0


def test_an_absent_library_is_told_once_and_its_answers_are_different(pool, capfd):
    processes = pool([sys.executable, "-S", *judge.COMMAND[1:]])
    assert not any(processes.equal(gold, answer) for gold, answer, _ in CALCULUS)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No module named 'math_verify'" in said
    assert "pip install 'dcmdp-jax[answers]'" in said
    assert processes.given_up == 0 and not started(processes)


PARENT = """
import threading, time
from dcmdp_jax.answers import judge
pool = judge.Pool(seconds=2.0, processes=1)
process = pool._idle.queue[0]
pool.equal("1", "x")
print(process._process.pid, flush=True)
if {busy}:
    threading.Thread(target=pool.equal, args={hangs}, daemon=True).start()
    time.sleep(0.5)
print("asked", flush=True)
time.sleep({rest})
"""


@pytest.mark.parametrize("busy, rest", [(False, 600), (True, 600), (False, 0), (True, 0)])
def test_a_process_ends_with_its_parent(busy, rest):
    """Killed or come to its end, while the process is idle and while it compares."""
    program = PARENT.format(busy=busy, hangs=HANGS, rest=rest)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "asked\n"
    if rest:
        assert running(pid)
        parent.kill()
    assert gone(pid, 6.0)
    assert parent.wait(10.0) == (-signal.SIGKILL if rest else 0)


def test_the_library_prints_replies_alone():
    process = subprocess.run(
        [*judge.COMMAND, "5"],
        input='["1", "1.0"]\n["1", "2"]\n',
        text=True,
        capture_output=True,
        check=True,
    )
    assert process.stdout == "ready\ntrue\nfalse\n"


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("2xyz", "2"),
        ("2abc", "2xyz"),
        ("60 mph", "60 km/h"),
        ("3 apples", "3 oranges"),
        ("3", "3 fifths"),
        ("2", "2 quarters"),
        ("7", r"7 \text{ minus three}"),
        (r"\lfloor x \rfloor", "x"),
        (r"\lfloor x \rfloor", r"\lceil x \rceil"),
        ("|x-5|", "5-x"),
    ],
)
def test_what_looks_alike_is_not_equal(gold, answer):
    assert not compare.equal(gold, answer) and not compare.equal(answer, gold)
