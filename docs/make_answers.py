"""Writes docs/answers.md: our answer checker and math-verify on labelled pairs. `python -m docs.make_answers SETS_FOLDER`.

Needs math-verify (`pip install math-verify antlr4-python3-runtime==4.13.2`); SETS_FOLDER holds the six evaluation sets' JSONL
files. The pairs are those of tests/answers_table.py.
"""

from __future__ import annotations

import pathlib
import runpy
import sys

from dcmdp_jax import data
from dcmdp_jax.answers.judge import Judge

PAGE = pathlib.Path(__file__).with_name("answers.md")
TABLE = pathlib.Path(__file__).parents[1] / "tests" / "answers_table.py"
SHOWN = 15  # disagreements of a rule's pairs that are listed, evenly spread
INTRODUCTION = '''# Two answer checkers on labelled pairs

`dcmdp_jax.answers` against math-verify 0.9.0, on pairs of answers whose equality is known: written and labelled by hand,
made by rule from random fractions, and made by rule from the gold answers of the six evaluation sets (the same answer in
other spellings, and others that it is not). The first of a pair is the gold answer. This page is made by
`python -m docs.make_answers SETS_FOLDER`.

"Right" counts verdicts that are the label. The pairs by hand were written while the checker was, and the rules by its
author: they show what it does, not how often a model's answer would be misjudged. Some labels are conventions, which
math-verify chooses otherwise: it rounds to six digits, is freer with order, repetition and case, and drops units unread.

'''


def write(folder: pathlib.Path) -> None:
    table = runpy.run_path(str(TABLE))
    groups = {"by hand": table["by_hand"](), "random fractions": table["numbers"]()}
    for path in sorted(folder.glob("*.jsonl")):
        groups[path.stem] = table["gold_forms"](example.answer for example in data.read(path))
    lines = ["| pairs from | pairs | ours right | math-verify right | agree | ours alone right | math-verify alone right |",
             "|---|" + "---|" * 6]
    shown = []
    with Judge() as ours, Judge(math_verify=True) as theirs:
        for name, pairs in groups.items():
            found = [(*pair, ours.equal(*pair[:2]), theirs.equal(*pair[:2])) for pair in pairs]
            apart = [row for row in found if row[3] != row[4]]
            good = [sum(row[i] == row[2] for row in found) for i in (3, 4)]
            alone = [sum(row[i] == row[2] for row in apart) for i in (3, 4)]
            cells = [name, len(found), *good, len(found) - len(apart), *alone]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            if apart:
                shown += [f"\n## Disagreements: {name}\n", "| gold | answer | equal | who is right |", "|---|---|---|---|"]
                shown += [_line(*row) for row in (apart if name == "by hand" else apart[::-(-len(apart) // SHOWN)])]
            print(lines[-1], flush=True)
        gave_up = (f"\nComparisons given up after {ours.seconds:g} s: {ours.given_up} of ours, {theirs.given_up} of "
                   "math-verify.\n")
    PAGE.write_text(INTRODUCTION + "\n".join([*lines, gave_up, *shown]) + "\n", encoding="utf-8")


def _line(gold: str, answer: str, label: bool, ours: bool, theirs: bool) -> str:
    cells = [f"`{text}`".replace("|", "\\|") for text in (gold, answer)]
    return f"| {' | '.join(cells)} | {'yes' if label else 'no'} | {'ours' if ours == label else 'math-verify'} |"


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
