r"""Writes docs/answers.md: rewards of right and wrong completions, our judge beside math-verify.

    python -m docs.make_answers SETS_FOLDER [GSM8K_FILE] [--reports FOLDER] [--tests FOLDER]

SETS_FOLDER holds the six evaluation sets' JSONL files and GSM8K_FILE more problems. `--reports` are
JSONL files of labelled pairs, one {"gold": ..., "answer": ..., "equal": true} per line; `--tests`
are those of math-verify, the tests/ of a clone of github.com/huggingface/Math-Verify. Needs it
(`pip install 'dcmdp-jax[answers]'`). The other pairs and the spellings are those of
tests/support/answers_table.py and tests/support/spellings.py.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import importlib.metadata
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from dcmdp_jax import data, rewards
from dcmdp_jax.answers import judge
from dcmdp_jax.records import Example

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from support import answers_table, spellings  # noqa: E402

PAGE = pathlib.Path(__file__).with_name("answers.md")
SHOWN = 25  # evenly spaced pairs of a group that are listed where our judge alone is right
INTRODUCTION = r"""# Answers: what earns a reward, and our judge beside math-verify

## What counts as an answer

`rewards.math_answer` reads the last answer that a completion states, in one of four forms: a box
(`\boxed{7}`), a line `#### 7`, a label (`Answer: 7`, `<answer>7</answer>`), or a sentence
(`The answer is 7.`). A number without such a form earns nothing, and neither does a box inside the
model's thinking. The answer may be written in another way than the right one, as a fraction, a
decimal, a percentage or with a unit. It must be worked out:

```python
>>> from dcmdp_jax.records import Example
>>> from dcmdp_jax.rewards import math_answer
>>> half = Example("What is half of one?", "1/2")
>>> texts = [r"So it is \boxed{0.5}.", "#### 50%", "The answer is 1/2."]
>>> texts += ["0.5", r"\boxed{1 - 0.5}"]
>>> for text in texts:
...     print(math_answer(half, text), text)
1.0 So it is \boxed{0.5}.
1.0 #### 50%
1.0 The answer is 1/2.
0.0 0.5
0.0 \boxed{1 - 0.5}

```

The rest of this page measures how well it reads and judges. It is made by `python -m
docs.make_answers SETS_FOLDER GSM8K_FILE --reports FOLDER --tests FOLDER`.

## Right answers as a model writes them

Each right ("gold") answer of GSM8K's test set and of the six evaluation sets is written in twelve
ways, and graded by `rewards.math_answer` with its problem, as in training and in `dcmdp eval`. The
two differ in a completion that the length limit cut off: `dcmdp eval` grades what it states, as is
usual for avg@k; training gives its verifier an empty text. A way is left out where it makes no
sense: a number under 1,000 has no thousands mark. `tests/support/spellings.py` says what each way
is. Counts are of right verdicts, of those tried.

"""
NEIGHBOURS = r"""
The same ways of writing what is not the gold, and a wrong last statement after a right guess
(`last`): another last digit, a tuple or fraction with two parts exchanged, a list without its last
item, another choice or word. Counts are those that were paid, of those tried.

"""
PAIRS = r"""
## Two judges on labelled pairs

`answers.judge` (our reader, and math-verify for what it cannot read) against math-verify {version}
alone, on pairs of answers whose equality is known. The first of a pair is the gold answer, and
"right" counts verdicts that are the label. The pairs by hand were written while the reader was, and
the rules that make pairs from random fractions and from the gold answers of the sets by its author:
they show what it does, not how often a model's answer would be misjudged. The public reports are of
faults that users found in other graders, and our reader was fixed by them. Math-verify's own tests
carry its authors' labels; their answers are what `rewards.final_answer` finds in them.

Some labels are conventions on which the two differ. Math-verify rounds to six digits, is freer with
order, repetition and case, takes a comma for a decimal point and a number out of a sentence, and
drops units unread. Where our judge asks math-verify, it refuses what comes about by these. Of the
pairs that our author did not write, the page lists those in which math-verify alone is right.

"""

REPORTS = "public reports"
TESTS = "math-verify's tests"

Group = Sequence[tuple[str, str, bool]]  # gold, answer, whether they are equal


def write(
    sets: pathlib.Path,
    gsm8k: pathlib.Path | None,
    reports: pathlib.Path | None,
    tests: pathlib.Path | None,
) -> None:
    """Grades, compares, and writes the page."""
    files = [*([gsm8k] if gsm8k else []), *sorted(sets.glob("*.jsonl"))]
    problems = {"gsm8k" if file == gsm8k else file.stem: data.read(file) for file in files}
    groups = {"by hand": answers_table.by_hand(), "random fractions": answers_table.numbers()}
    for name, examples in problems.items():
        groups[name] = answers_table.gold_forms(example.answer for example in examples)
    if reports:
        groups[REPORTS] = _reports(reports)
    if tests:
        groups[TESTS] = _tests(tests)
    page = [INTRODUCTION, *_spellings(problems), *_judges(groups)]
    PAGE.write_text("".join(page), encoding="utf-8")


def _reports(folder: pathlib.Path) -> Group:
    """Returns the labelled pairs of a folder of JSONL files."""
    pairs = []
    for path in sorted(folder.rglob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row.keys() >= {"gold", "answer", "equal"}:
                pairs.append((row["gold"], row["answer"], row["equal"]))
    return pairs


def _tests(folder: pathlib.Path) -> Group:
    """Returns the tuples `(gold, completion, 0 or 1)` of test files, which are parsed and not run.

    Completions that state nothing are left out.
    """
    pairs = {}
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.elts[:3] if isinstance(node, ast.Tuple) else []
            row = [part.value for part in parts if isinstance(part, ast.Constant)]
            if list(map(type, row)) == [str, str, int]:
                pairs[_formula(row[0]), _formula(row[1]), row[2] == 1] = None
    return [pair for pair in pairs if max(map(len, pair[:2])) <= 200]


def _formula(text: str) -> str:
    """Returns what a text states, or else the text without the dollar signs around it."""
    stated = rewards.final_answer(text) or text.strip()
    alone = re.fullmatch(r"(\$\$?)([^$]+)\1", stated)
    return alone[2].strip() if alone else stated


def _spellings(problems: dict[str, list[Example]]) -> Iterator[str]:
    """Yields the tables of how the ways of writing an answer are graded."""
    tried = {True: collections.Counter(), False: collections.Counter()}
    failed = {True: collections.Counter(), False: collections.Counter()}
    misses = []
    for name, examples in problems.items():
        for kind, spelling, completion, example, good in spellings.graded(examples):
            tried[kind][spelling, name] += 1
            failed[kind][spelling, name] += not good
            if not good:
                misses.append((name, spelling, example.answer, completion))
        print(f"{name}: graded", flush=True)
    yield _counts(problems, tried[True], tried[True] - failed[True])
    yield NEIGHBOURS
    yield _counts(problems, tried[False], failed[False])
    if misses:
        rows = [
            (*which, _code(gold), _code(completion[-80:])) for *which, gold, completion in misses
        ]
        yield "\nNot as they should be:\n\n" + _table(("set", "way", "gold", "completion"), rows)


def _counts(names: Iterable[str], tried: collections.Counter, counted: collections.Counter) -> str:
    """Returns a table with a row for each way of writing, a column for each set, and totals."""

    def cell(ways: Iterable[str], sets: Iterable[str]) -> str:
        keys = [(way, name) for way in ways for name in sets]
        total = sum(tried[key] for key in keys)
        return f"{sum(counted[key] for key in keys):,} of {total:,}" if total else ""

    ways = list(dict.fromkeys(way for way, _ in tried))
    columns = [*([name] for name in names), names]
    rows = [(way, *(cell([way], sets) for sets in columns)) for way in ways]
    return _table(("way", *names, "all"), [*rows, ("all", *(cell(ways, sets) for sets in columns))])


def _judges(groups: dict[str, Group]) -> Iterator[str]:
    """Yields the comparison of our judge with math-verify, group by group."""
    alone = judge.Pool([*judge.COMMAND, "alone"])
    rows = []
    shown = []
    ours = judge.library()
    for name, pairs in groups.items():
        with concurrent.futures.ThreadPoolExecutor(judge.PROCESSES) as threads:
            theirs = list(threads.map(lambda pair: alone.equal(*pair[:2]), pairs))
        judged = [(*pair, judge.equal(*pair[:2]), their) for pair, their in zip(pairs, theirs)]
        differing = [row for row in judged if row[3] != row[4]]
        good = [sum(row[i] == row[2] for row in judged) for i in (3, 4)]
        only = [sum(row[i] == row[2] for row in differing) for i in (3, 4)]
        rows.append([name, len(judged), *good, len(judged) - len(differing), *only])
        shown += _disagreements(name, differing)
        print(*rows[-1], sep=", ", flush=True)
    yield PAIRS.format(version=importlib.metadata.version("math-verify"))
    yield _table(
        (
            "pairs from",
            "pairs",
            "ours right",
            "math-verify right",
            "agree",
            "ours alone right",
            "math-verify alone right",
        ),
        rows,
    )
    yield (
        f"\nComparisons given up after {alone.seconds:g} s: {ours.given_up} of ours, "
        f"{alone.given_up} of math-verify.\n"
    )
    yield from shown


def _disagreements(name: str, differing: list[tuple[str, str, bool, bool, bool]]) -> Iterator[str]:
    """Yields the pairs on which the judges disagree.

    All those in which math-verify is right; some of the others, and only those of our own.
    """
    theirs = [row for row in differing if row[4] == row[2]]
    ours = [row for row in differing if row[3] == row[2] and name not in (REPORTS, TESTS)]
    listed = [*theirs, *ours[:: -(-len(ours) // SHOWN) or 1]]
    if listed:
        rows = [
            (
                *map(_code, row[:2]),
                "yes" if row[2] else "no",
                "ours" if row[3] == row[2] else "math-verify",
            )
            for row in listed
        ]
        yield f"\n### Disagreements: {name}\n\n"
        yield _table(("gold", "answer", "equal", "who is right"), rows)


def _table(heading: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Returns a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _code(text: str) -> str:
    """Returns a text as code in a cell of a table."""
    return "`" + text.replace("|", "\\|").replace("\n", " ").replace("`", "'") + "`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes docs/answers.md.")
    parser.add_argument("sets", type=pathlib.Path, help="folder of evaluation sets")
    parser.add_argument("gsm8k", type=pathlib.Path, nargs="?", help="GSM8K's test.jsonl")
    parser.add_argument("--reports", type=pathlib.Path, help="folder of labelled pairs")
    parser.add_argument("--tests", type=pathlib.Path, help="folder of math-verify's test files")
    write(**vars(parser.parse_args()))
