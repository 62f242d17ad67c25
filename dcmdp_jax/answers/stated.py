r"""The answer that a completion states.

Four forms state an answer: a box (`\boxed{7}`, `\fbox{7}`, `\boxed 7`), a line `#### 7`, a label
(`Answer: 7`, `<answer>7`), and a sentence `The answer is 7.` The last of them in the text counts,
whatever its form. After a label there may be a sentence, `He has 7 pens.`: then the answer is what
follows its verb, in full, so that it cannot be read if it is more than a number and a unit. The
time is linear in the text, of which the last `TAIL` characters are read.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dcmdp_jax.answers import units
from dcmdp_jax.answers.compare import equal

TAIL = 20_000  # characters at the end of a completion that are searched
LONGEST = 1_000  # characters of an answer and a remark after it
GAP = 200  # most characters between two boxes of one list

LABELS = 50  # the last labels are searched for an answer after them
ALIKE = 3  # lists of fewer other boxes may be one answer in several forms

_THINK = re.compile(r"[<\[](/?)(?:think(?:ing)?|thought|reasoning)[>\]]", re.IGNORECASE)

# Boxes. A box without braces ends with the formula, or else before a punctuation mark, a word or
# another box.
_BOX = r"\\(?:boxed|fbox)(?![A-Za-z])"
_BRACES = re.compile(rf"{_BOX}\s*\{{?|\\.|[{{}}]", re.DOTALL)
_STOP = rf"\$|\\[)\]]|{_BOX}|\s[A-Za-z]{{2}}"
_ITEM = r"(?:\\\$|\{(?:[^{}\n]|\{[^{}\n]*\})*\}|[^{}\n])"
_UNBRACED = re.compile(
    rf"(?:(?!{_STOP}){_ITEM}){{1,200}}(?=\$|\\[)\]])"
    rf"|(?:(?!{_STOP}|[.,;:!?](?:\s|$)){_ITEM}){{1,200}}"
)
_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w{1,9}\}))?"
# a word after a box that belongs to its number
_TIMES = re.compile(
    r"[\s~}$]*(?:\\[,;: ]|\\text\{|\\mathrm\{)?\s*"
    r"((?:hundred|thousand|million|billion|trillion|dozen)s?)\b"
)
_NAMED = re.compile(rf"(?<![A-Za-z\\])({_NAME})\s*=\s*\$?\Z")
# what may separate the boxes of a list: separators, `and`, a name, or the bullet of the next item
_BESIDE = re.compile(
    rf"(?:[\s$,;&，、；和或与]|\\[()\[\],;:!\\ ]|\\q?quad|\*\*|(?:and|or)\b"
    rf"|\\text\{{[\s,]*(?:and|or)\s*\}}|{_NAME}\s*="
    r"|(?<=\n)(?:[-+*•]|(?:Part )?\(?(?:[a-z]|\d|[ivx]{1,4})[.):]{1,2})"
    r"(?=\s))*"
)
# before a brace, and before and after a box, if they are part of a larger value
_PART = re.compile(r"(?:\\(?:[dtc]?frac|[dt]?binom|sqrt(?:\[\w{1,9}\])?)|[\^_])\s?\Z")
_OPERATION = r"\\(?:cdot|times|div)(?![A-Za-z])"
_FACTOR = re.compile(rf"(?:[\d/-]|[\w)}}]\s?\+|{_OPERATION}\s?)\Z")
_OPERATED = re.compile(rf"[/+]|\^\s*\{{?\s*[\w(+-]|\s?{_OPERATION}")  # not `^\circ`

# Lines that start with four hashes, some of which are headings
_HASHES = re.compile(r"(?<!#)####(?!#)[^\S\n]*(.*)")
_TITLE = re.compile(
    r"\W*(?:final|answer|summary|conclusion|solution|explanation|verif\w+|check\w*|notes?|step|case"
    r"|part|results?|approach|reasoning|method|analysis|proof|remarks?|calculat\w+|understand\w*"
    r"|problem|question|alternative|recap|key)\b",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"[*_]*\d+[.)]\s+[*_]*[A-Za-z]{2}")
_PROSE = re.compile(r"[*_]*[A-Za-z]{2,}(?![A-Za-z]|\s*[=({])")

# Labels, with Markdown before them, and sentences
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

# a value after one of these verbs ends a sentence
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|equals?|has|have|had|makes?|gets?|gives?|takes?|needs?|costs?"
    r"|earns?|pays?|spends?)[ \t]+(?=[*_]*(?:[-+]?\\?[$\d(]|\\[A-Za-z(]))"
)
# remarks that may follow an answer
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
    r"|hardly|barely|nobody|nothing|neither|nor|none|except|unless|if|half|zero|than|least|most"
    r"|up to|approximately|roughly|nearly|almost)\b|n['’]t\b",
    re.IGNORECASE,
)
_ROUGH = re.compile(r"\b(?:about|around|between|under|over|below|above)\b")
_WORD = re.compile(r"[A-Za-z]+")


class _Statement(NamedTuple):
    """An answer that is stated, and where."""

    start: int  # where its answer begins
    answer: str


class _Box(NamedTuple):
    """A box: the span of its command, and what is in it."""

    start: int
    end: int
    inside: str


def final_answer(text: str) -> str | None:
    """Returns the answer that a completion states, or None.

    Reasoning states nothing: the text after the last `</think>` is read, and none if a `<think>`
    does not end. Boxes next to each other are one list. A heading, `#### Summary`, is no answer.
    """
    text = _after_reasoning(text)[-TAIL:]
    forms = (_boxes(text), _hashes(text), _labels(text), _sentences(text), _late_labels(text))
    statements = [statement for statement in map(_last, forms) if statement]
    filled = [statement for statement in statements if statement.answer] or statements
    return max(filled, key=lambda statement: statement.start).answer if filled else None


def _last(statements: Iterable[_Statement]) -> _Statement | None:
    """Returns the first statement that is not empty, else an empty one, else None."""
    empty = None
    for statement in statements:
        if statement.answer:
            return statement
        empty = empty or statement
    return empty


def _after_reasoning(text: str) -> str:
    """Returns the text after the reasoning."""
    last = collections.deque(_THINK.finditer(text), maxlen=1)  # a text may hold 10^5 marks
    if not last:
        return text
    (mark,) = last
    return text[mark.end() :] if mark[1] else ""


def _boxes(text: str) -> Iterator[_Statement]:
    """Yields a statement for each group of boxes that belong together, the last group first."""
    group: list[_Box] = []
    for box in reversed(_each_box(text)):
        if group and not _together(text[box.end : group[0].start]):
            yield _list(text, group)
            group = []
        group.insert(0, box)
    if group:
        yield _list(text, group)


def _each_box(text: str) -> list[_Box]:
    r"""Returns the closed boxes, in order.

    Of nested boxes the inner one counts. A box inside a larger value, as in `\frac{1}{\boxed{2}}`
    and `-\boxed{2}`, does not count. Escaped braces are not braces.
    """
    boxes: list[_Box] = []
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
                while boxes and boxes[-1].start > brace.start():
                    boxes.pop()
            elif brace.group() != "{" and not (boxes and boxes[-1].start > brace.start()):
                inside = text[brace.end() : match.start()].strip()
                boxes.append(_Box(brace.start(), match.end(), inside))
        elif re.match(_BOX, token) and (bare := _UNBRACED.match(text, match.end())):
            boxes.append(_Box(match.start(), bare.end(), bare.group().strip()))
    return [box for box in boxes if not _is_part(text, box)]


def _is_part(text: str, box: _Box) -> bool:
    """Returns True if a box is a factor, summand or base of a larger value."""
    before = text[max(box.start - 8, 0) : box.start]
    return bool(_FACTOR.search(before) or _OPERATED.match(text, box.end))


def _together(between: str) -> bool:
    """Returns True if two boxes with this text between them are one list."""
    return len(between) <= GAP and _BESIDE.fullmatch(between) is not None


def _list(text: str, group: list[_Box]) -> _Statement:
    """Returns boxes that belong together as a list, or as one answer if they have one value.

    Names before the boxes stay if they differ.
    """
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
    return _Statement(group[-1].start, ", ".join(inside))


def _hashes(text: str) -> Iterator[_Statement]:
    """Yields what follows `####` on its line, the last first.

    Headings are left out: usual titles, numbered ones, and words with text below them.
    """
    for match in reversed(list(_HASHES.finditer(text))):
        line = match[1].strip()
        heading = _TITLE.match(line) or _NUMBERED.match(line)
        heading = heading or _PROSE.match(line) and text[match.end() :].strip()
        if line and not heading:
            yield _Statement(match.start(1), _trimmed(line.rstrip("# ")))


def _labels(text: str) -> Iterator[_Statement]:
    """Yields what follows a label, `Answer:` or `**Final Answer**`, on its line or below; the last
    first.
    """
    for match in list(_LABEL.finditer(text))[: -LABELS - 1 : -1]:
        if (statement := _below(text, match.end())).answer:
            yield statement


def _sentences(text: str) -> Iterator[_Statement]:
    """Yields what `The answer is: ...` and `The answer is 7.` state, the last first.

    `The answer is not easy.` states nothing.
    """
    for match in reversed(list(_SENTENCE.finditer(text))):
        value = _ONE_VALUE.match(text, match.end())
        if value and not match[1]:
            yield _Statement(value.start(1), _trimmed(value[1]))
        elif match[1] or _VALUE.match(text, match.end()):
            yield _below(text, match.end())


def _late_labels(text: str) -> Iterator[_Statement]:
    """Yields what follows `Answer:` within a line, if it is one value; the last first."""
    for match in reversed(list(_LATE_LABEL.finditer(text))):
        if value := _ONE_VALUE.match(text, match.end()):
            yield _Statement(value.start(1), _trimmed(value[1]))


def _below(text: str, start: int) -> _Statement:
    """Returns the bullets on the lines after `start`, or displayed mathematics, or the line."""
    if bullets := _BULLETS.match(text, start):
        items = _BULLET.sub("", bullets[1]).splitlines()
        return _Statement(bullets.start(1), ", ".join(map(_trimmed, items)))
    start = _BLANK.match(text, start).end()
    if display := _DISPLAY.match(text, start):
        return _Statement(start, (display[1] or display[2]).strip())
    line, *_ = text[start : start + LONGEST].split("\n", 1)
    return _Statement(start, _trimmed(line))


def _of_sentence(line: str) -> str:
    """Returns what follows the verb of a sentence.

    Returns the entire sentence if it has no verb or several, or expresses doubt.
    """
    values = list(_VERB.finditer(line))
    if len(values) != 1 or _DOUBT.search(line) or _ROUGH.search(line):
        return line
    return line[values[0].end() :].removesuffix(".")


def _trimmed(line: str) -> str:
    """Returns a line without emphasis, and without a remark that does not change the answer."""
    line = _CHECKED.sub("", line[:LONGEST]).strip().strip("`").removesuffix("</answer>").rstrip()
    if (remark := _REMARK.search(line)) and not _doubts(remark.group()):
        line = line[: remark.start()]
    if _PROSE.match(line):
        line = _of_sentence(line)
    line = _EMPHASIS.sub("", line).strip().strip("*_").removesuffix("。").strip()
    opened, closed = (sum(map(line.count, marks)) for marks in ("([", ")]"))
    return line[:-1] if closed > opened and line[-1] in ")]" else line  # of `(Answer: 7)`


def _doubts(remark: str) -> bool:
    """Returns True if a remark doubts the answer, or has a word that changes a number."""
    words = _WORD.findall(remark)
    return _DOUBT.search(remark) is not None or any(map(units.changes_a_number, words))
