r"""The answer that a completion states.

Four forms state one: a box (`\boxed{7}`, `\fbox{7}`, `\boxed 7`), a line `#### 7`, a label
`Answer: 7` or `<answer>7`, and a sentence `The answer is 7.` Of these the last counts, whatever its
form. The answer is what stands there; of a sentence behind a label it is what stands at its end
behind a verb, `He has 7 pens.`, in full, so that it cannot be read where more than a number and a
unit stands there. The time is linear in the text, which is cut to `TAIL` characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dcmdp_jax.answers import units
from dcmdp_jax.answers.compare import equal

TAIL = 20_000  # characters at the end of a completion in which its answer is looked for
LONGEST = 1_000  # characters of an answer and a remark after it
GAP = 200  # characters between two boxes that may still be one answer

LABELS = 50  # the last ones, of which one has an answer behind it
ALIKE = 3  # boxes of a list that are compared, as they may be one answer in several forms

_THINK = re.compile(r"[<\[](/?)(?:think(?:ing)?|thought|reasoning)[>\]]", re.IGNORECASE)

# Boxes. One without braces goes on to the end of the formula, or else to a punctuation mark, a
# word or another box.
_BOX = r"\\(?:boxed|fbox)(?![A-Za-z])"
_BRACES = re.compile(rf"{_BOX}\s*\{{?|\\.|[{{}}]", re.DOTALL)
_STOP = rf"\$|\\[)\]]|{_BOX}|\s[A-Za-z]{{2}}"
_ITEM = r"(?:\\\$|\{(?:[^{}\n]|\{[^{}\n]*\})*\}|[^{}\n])"
_UNBRACED = re.compile(
    rf"(?:(?!{_STOP}){_ITEM}){{1,200}}(?=\$|\\[)\]])"
    rf"|(?:(?!{_STOP}|[.,;:!?](?:\s|$)){_ITEM}){{1,200}}"
)
_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w{1,9}\}))?"
# a word behind a box, which is of its number
_TIMES = re.compile(
    r"[\s~}$]*(?:\\[,;: ]|\\text\{|\\mathrm\{)?\s*"
    r"((?:hundred|thousand|million|billion|trillion|dozen)s?)\b"
)
_NAMED = re.compile(rf"(?<![A-Za-z\\])({_NAME})\s*=\s*\$?\Z")
# what may stand between boxes that are one list: separators, `and`, a name, or the mark of the
# next item on a line
_BESIDE = re.compile(
    rf"(?:[\s$,;&，、；和或与]|\\[()\[\],;:!\\ ]|\\q?quad|\*\*|(?:and|or)\b"
    rf"|\\text\{{[\s,]*(?:and|or)\s*\}}|{_NAME}\s*="
    r"|(?<=\n)(?:[-+*•]|(?:Part )?\(?(?:[a-z]|\d|[ivx]{1,4})[.):]{1,2})"
    r"(?=\s))*"
)
# before a brace, and before and behind a box that is a part of a larger value
_PART = re.compile(r"(?:\\(?:[dtc]?frac|[dt]?binom|sqrt(?:\[\w{1,9}\])?)|[\^_])\s?\Z")
_OPERATION = r"\\(?:cdot|times|div)(?![A-Za-z])"
_FACTOR = re.compile(rf"(?:[\d/-]|[\w)}}]\s?\+|{_OPERATION}\s?)\Z")
_OPERATED = re.compile(rf"[/+]|\^\s*\{{?\s*[\w(+-]|\s?{_OPERATION}")  # not `^\circ`

# Lines of four hashes, of which some are headings
_HASHES = re.compile(r"(?<!#)####(?!#)[^\S\n]*(.*)")
_TITLE = re.compile(
    r"\W*(?:final|answer|summary|conclusion|solution|explanation|verif\w+|check\w*|notes?|step|case"
    r"|part|results?|approach|reasoning|method|analysis|proof|remarks?|calculat\w+|understand\w*"
    r"|problem|question|alternative|recap|key)\b",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"[*_]*\d+[.)]\s+[*_]*[A-Za-z]{2}")
_PROSE = re.compile(r"[*_]*[A-Za-z]{2,}(?![A-Za-z]|\s*[=({])")

# Labels, with the marks of Markdown before them, and sentences
_MARKS = r"(?:[^\w\n\\$|]|_)*(?:\d{1,2}[.)][ \t]*[*_]*)?(?:\\text(?:bf)?\{)?"
_THE = r"(?:(?:the|my|our)[ \t]+)?"
_FINAL = r"(?:final|correct)[ \t]+"
_SO = r"\b(?:so|thus|hence|therefore|then)\b,?[ \t]+"
_LABEL = re.compile(
    rf"(?:^{_MARKS}|[.!?][ \t]+)(?:{_THE}{_FINAL})?answer(?:[ \t]+is)?[*_ \t]*"
    r"(?:[:：=][ \t]*\}?|(?=\$|\\[(\[])|\r?$)"
    rf"|{_SO}{_THE}(?:{_FINAL})?answer[*_]*:"
    rf"|(?:^{_MARKS}|[。，；！]|所以|因此)(?:最终|正确)?答案[*_]*[是为：:][*_ \t：:]*"
    r"|<answer>",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(
    rf"(?:(?:^{_MARKS}|[.!?:;][ \t]+[*_]*|{_SO}){_THE}(?:{_FINAL})?"
    rf"|[,(][ \t]*{_THE}{_FINAL})(?:answer|(?<=correct[ \t])(?:option|choice))"
    r"[ \t]+is(?:\*\*|__)?[ \t]*([:：]?)",
    re.IGNORECASE | re.MULTILINE,
)
_LATE_LABEL = re.compile(r"(?<!\b[Tt]he )\b(?:Final [Aa]nswer|Answer)[*_ \t]*:")

# What follows a label
_VALUE = re.compile(r"[*_]*[-+]?(?:\d|\$|\\\()")
# one value that ends its sentence
_ONE_VALUE = re.compile(
    r"""
    [ \t]*((?:\*\*)?(?:
      \$(?:[^$\\\n]|\\.){1,300}\$ | \\\([^\n]{1,200}?\\\)           # a formula
    | \*\*[^*\n]{1,200}\*\*                                         # in bold
    | \\[A-Za-z]+[{(\d][^\s.;]{0,200} | \([^()\n]{1,200}\)          # a command, a tuple
    | [a-z]\^\S{1,100}? | [^\x00-\x7f]                              # a power, a sign
    | [-+]?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?:[ \t][A-Za-z]+){0,3}  # a number and its unit
    | \(?[A-J]\)? | (?-i:[A-Z][a-z]+) | yes | no                    # a choice, a word
    )(?:\*\*)?)[.。]?[*_]*[ \t\r]*(?=$|[ \t][A-Z])""",
    re.MULTILINE | re.VERBOSE,
)
_BLANK = re.compile(r"[\s*_]*(?:```\w*[ \t]*\r?\n)?[\s*_`]*(?:(?<=\n)>[ \t]+)?[*_`]*")
_DISPLAY = re.compile(r"\$\$([^$]{1,1000})\$\$|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_BULLETS = re.compile(r"[*_ \t\r]*\n\s*((?:^[ \t]*[-+*•][ \t]+\S.*\n?)+)", re.MULTILINE)
_BULLET = re.compile(r"^[ \t]*[-+*•][ \t]+", re.MULTILINE)
_EMPHASIS = re.compile(
    r"(?<=\S)(?:\*\*|__)(?=[\s.,;:!?)。]|$)"
    r"|(?:(?<=[\s(:])|^)(?:\*\*|__)(?=\S)"
)
_CHECKED = re.compile("[✅☑✔✓🎉\ufe0f]")

# a value behind one of these verbs ends a sentence
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|equals?|has|have|had|makes?|gets?|gives?|takes?|needs?|costs?"
    r"|earns?|pays?|spends?)[ \t]+(?=[*_]*(?:[-+]?\\?[$\d(]|\\[A-Za-z(]))"
)
# what may stand behind an answer
_REMARK = re.compile(
    r"""
    [.!]\s+(?=[A-Z])[^\d\\$]*$                            # another sentence
    | ,\s+(?:which|as|it|they)\b[^\d\\$]*$
    | \s+\((?:as|from)\b[^()\d\\$]*\)[.\s]*$
    | (?:,?\s+|\s+\()(?:since|because|see)\b[^()\n]*(?:\([^()\n]*\)[^()\n]*)*\)?[.\s]*$
    """,
    re.VERBOSE,
)
_DOUBT = re.compile(
    r"\b(?:or|not|no|but|maybe|perhaps|wait|wrong|incorrect|actually|instead|either|cannot|never"
    r"|hardly|barely|nobody|nothing|neither|nor|none|except|unless|if|half|zero|than|least|most|up to|approximately|roughly"
    r"|nearly|almost)\b|n['’]t\b",
    re.IGNORECASE,
)
_ROUGH = re.compile(r"\b(?:about|around|between|under|over|below|above)\b")
_WORD = re.compile(r"[A-Za-z]+")


class Statement(NamedTuple):
    start: int  # where its answer begins
    answer: str


class _Box(NamedTuple):
    start: int
    end: int
    inside: str


def final_answer(text: str) -> str | None:
    r"""The answer that a completion states; None without any.

    What is thought is not stated: only what follows the last `</think>` is read, and nothing where
    a `<think>` has no end. Boxes that stand together are one list. A heading over a section,
    `#### Summary`, is no answer.
    """
    said = _said(text)[-TAIL:]
    forms = (_boxes(said), _hashes(said), _labels(said), _sentences(said), _late_labels(said))
    found = [statement for statement in map(_last, forms) if statement]
    filled = [statement for statement in found if statement.answer] or found
    return max(filled, key=lambda statement: statement.start).answer if filled else None


def _last(statements: Iterable[Statement]) -> Statement | None:
    """The first that says something, of statements from the last to the first; without any an
    empty one, or None."""
    empty = None
    for statement in statements:
        if statement.answer:
            return statement
        empty = empty or statement
    return empty


def _said(text: str) -> str:
    """The text without the thinking before it."""
    last = None
    for last in _THINK.finditer(text):
        pass
    if last is None:
        return text
    return text[last.end() :] if last[1] else ""


def _boxes(text: str) -> Iterator[Statement]:
    """A statement for each group of boxes that stand together, the last group first."""
    group: list[_Box] = []
    for box in reversed(_each_box(text)):
        if group and not _together(text[box.end : group[0].start]):
            yield _list(text, group)
            group = []
        group.insert(0, box)
    if group:
        yield _list(text, group)


def _each_box(text: str) -> list[_Box]:
    r"""The boxes that close, in order; of nested ones the inner, and none that is a part of a
    larger value, as in `\frac{1}{\boxed{2}}` and `-\boxed{2}`. Escaped braces do not count.
    """
    found: list[_Box] = []
    opened: list[tuple[re.Match, bool]] = []  # whether what is inside is a part of a value
    part_ends = -1
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and not token.startswith(r"\{"):
            before = text[max(match.start() - 20, 0) : match.start()]
            part = match.start() == part_ends or _PART.search(before) is not None
            opened.append((match, part and token == "{"))
        elif token == "}" and opened:
            brace, part = opened.pop()
            if part:
                part_ends = match.end()
                while found and found[-1].start > brace.start():
                    found.pop()
            elif brace.group() != "{" and not (found and found[-1].start > brace.start()):
                inside = text[brace.end() : match.start()].strip()
                found.append(_Box(brace.start(), match.end(), inside))
        elif re.match(_BOX, token) and (bare := _UNBRACED.match(text, match.end())):
            found.append(_Box(match.start(), bare.end(), bare.group().strip()))
    return [box for box in found if not _is_part(text, box)]


def _is_part(text: str, box: _Box) -> bool:
    before = text[max(box.start - 8, 0) : box.start]
    return bool(_FACTOR.search(before) or _OPERATED.match(text, box.end))


def _together(between: str) -> bool:
    return len(between) <= GAP and _BESIDE.fullmatch(between) is not None


def _list(text: str, group: list[_Box]) -> Statement:
    """Boxes that stand together, as a list; those of one value are one answer. Names before them
    stay where they differ."""
    inside = [box.inside for box in group if box.inside]
    if times := _TIMES.match(text, group[-1].end):
        inside[-1:] = [f"{value} {times[1]}" for value in inside[-1:]]
    names = [_NAMED.search(text, max(box.start - 30, 0), box.start) for box in group]
    different = {name[1] for name in names if name}
    if len(inside) == len(different) == len(group) > 1:
        inside = [f"{name[1]}={value}" for name, value in zip(names, inside)]
    others = set(inside[1:]) - set(inside[:1])
    if len(others) < ALIKE and all(equal(inside[0], other) for other in others):
        inside = inside[:1]
    return Statement(group[-1].start, ", ".join(inside))


def _hashes(text: str) -> Iterator[Statement]:
    """What follows `####` on its line, the last first, without headings: a usual title, one with a
    number, or words over more text."""
    for match in reversed(list(_HASHES.finditer(text))):
        line = match[1].strip()
        heading = _TITLE.match(line) or _NUMBERED.match(line)
        heading = heading or _PROSE.match(line) and text[match.end() :].strip()
        if line and not heading:
            yield Statement(match.start(1), _trimmed(line.rstrip("# ")))


def _labels(text: str) -> Iterator[Statement]:
    """What follows a label, `Answer:` or `**Final Answer**`, on its line or below it; the last
    first."""
    for match in list(_LABEL.finditer(text))[: -LABELS - 1 : -1]:
        if (statement := _below(text, match.end())).answer:
            yield statement


def _sentences(text: str) -> Iterator[Statement]:
    """What `The answer is: ...` and `The answer is 7.` state, the last first; `The answer is not
    easy.` states nothing."""
    for match in reversed(list(_SENTENCE.finditer(text))):
        value = _ONE_VALUE.match(text, match.end())
        if value and not match[1]:
            yield Statement(value.start(1), _trimmed(value[1]))
        elif match[1] or _VALUE.match(text, match.end()):
            yield _below(text, match.end())


def _late_labels(text: str) -> Iterator[Statement]:
    """What follows `Answer:` further along its line, if it is one value; the last first."""
    for match in reversed(list(_LATE_LABEL.finditer(text))):
        if value := _ONE_VALUE.match(text, match.end()):
            yield Statement(value.start(1), _trimmed(value[1]))


def _below(text: str, start: int) -> Statement:
    """Bullets on the lines after `start`, or else displayed mathematics, or the first line that is
    not empty."""
    if bullets := _BULLETS.match(text, start):
        items = _BULLET.sub("", bullets[1]).splitlines()
        return Statement(bullets.start(1), ", ".join(map(_trimmed, items)))
    start = _BLANK.match(text, start).end()
    if display := _DISPLAY.match(text, start):
        return Statement(start, (display[1] or display[2]).strip())
    line, *_ = text[start : start + LONGEST].split("\n", 1)
    return Statement(start, _trimmed(line))


def _of_sentence(line: str) -> str:
    """What a sentence behind a label ends with, behind its verb; the sentence where it has no such
    end or several, or a doubt in it."""
    values = list(_VERB.finditer(line))
    if len(values) != 1 or _DOUBT.search(line) or _ROUGH.search(line):
        return line
    return line[values[0].end() :].removesuffix(".")


def _trimmed(line: str) -> str:
    """A line without its emphasis, and without a remark after the answer that neither doubts nor
    changes it."""
    line = _CHECKED.sub("", line[:LONGEST]).strip().strip("`").removesuffix("</answer>").rstrip()
    if (remark := _REMARK.search(line)) and not _doubts(remark.group()):
        line = line[: remark.start()]
    if _PROSE.match(line):
        line = _of_sentence(line)
    line = _EMPHASIS.sub("", line).strip().strip("*_").removesuffix("。").strip()
    opened, closed = (sum(map(line.count, marks)) for marks in ("([", ")]"))
    return line[:-1] if closed > opened and line[-1] in ")]" else line  # of `(Answer: 7)`


def _doubts(remark: str) -> bool:
    """True if a remark doubts the answer, or has a word that changes a number."""
    words = _WORD.findall(remark)
    return _DOUBT.search(remark) is not None or any(map(units.changes_a_number, words))
