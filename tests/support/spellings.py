r"""Right answers as a model writes them, and wrong ones close to them, for `rewards.math_answer`.

`right(gold, number)` yields the spellings of a right answer, and `wrong(gold, number)` the same
spellings of a wrong one; `number` is the problem's index in its set and picks a variant. A spelling
that makes no sense for an answer is left out.
"""

import re

from dcmdp_jax import rewards

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
WHOLE = re.compile(r"-?\d+")
WORD = re.compile(r"(?:\\text\{)?\(?[A-Za-z]{1,20}\)?\}?")
TUPLE = re.compile(r"(?:\\left)?([(\[])([^()\[\]{}=<>]+)(?:\\right)?([)\]])")
UNITS = (
    r"\text{ apples}",
    r"\text{ dollars}",
    r"\ \mathrm{cm}",
    r" \text{ cm}^2",
    " dollars",
    r"\text{ miles per hour}",
)
LABELS = (
    "Answer: ",
    "**Answer:** ",
    "**Final Answer:** ",
    "The final answer is: ",
    "### Final Answer\n\n",
    "Answer:\n",
)
HASHES = (("#### ", ""), ("####", ""), ("#### **", "**"), ("#### $", "$"))
FULL_WIDTH = {ord(sign): ord(sign) + 0xFEE0 for sign in "0123456789+-.,()/=:"}


def bare(gold):
    """A gold without its dollars and thousands marks."""
    inner = gold.strip().strip("$").strip()
    inner = inner if "$" not in inner else gold
    return inner.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", inner) else inner


def items(gold):
    """The items of a list without brackets, or the gold alone."""
    is_list = re.fullmatch(r"[^()\[\]{},]+(, ?[^()\[\]{},]+)+", gold)
    return re.split(r",\s*", gold) if is_list else [gold]


def bold(gold, number):
    if NUMBER.fullmatch(gold):
        return rf"\boxed{{\{('textbf', 'mathbf', 'boldsymbol')[number % 3]}{{{gold}}}}}"
    return rf"\boxed{{\textbf{{{gold}}}}}" if WORD.fullmatch(gold) else rf"**Answer: ${gold}$**"


def text(gold, number):
    if WORD.fullmatch(gold) and "text" not in gold:
        return rf"\boxed{{\text{{{gold}}}}}"
    if NUMBER.fullmatch(gold):
        return rf"\boxed{{\{('text', 'mathrm', 'mbox')[number % 3]}{{{gold}}}}}"
    return None


def units(gold, number):
    return rf"\boxed{{{gold}{UNITS[number % len(UNITS)]}}}" if NUMBER.fullmatch(gold) else None


def thousands(gold, number):
    if not WHOLE.fullmatch(gold) or len(gold.strip("-")) < 4:
        return None
    marked = f"{int(gold):,}".replace(",", (",", "{,}", r"\,", r",\!")[number % 4])
    return rf"\boxed{{{marked}{('', *UNITS)[number % 5]}}}"


def hashes(gold, number):
    before, after = HASHES[number % 4]
    return f"so it is done.\n{before}{gold}{after}"


def answer(gold, number):
    return f"so it is done.\n\n{LABELS[number % 6]}${gold}$"


def several(gold, number):
    if len(items(gold)) == 1:
        return rf"Thus $\boxed{{{gold}}}$" + "\n\n" + rf"$$\boxed{{{gold}}}$$"
    *first, last = (rf"\boxed{{{item}}}" for item in items(gold))
    return f"So {', '.join(first)} {('and', 'or')[number % 2]} {last}."


def guess(gold, number):
    tried = (4321, 40321)[number % 2]
    return rf"First guess: \boxed{{{tried}}}. That missed one." + "\n\n" + hashes(gold, number)


def thinking(gold, number):
    thought = "<think>\nmaybe \\boxed{4321}, or\nAnswer: 4321\n</think>\n\n"
    return thought + (answer, hashes)[number % 2](gold, number)


def full_width(gold, number):
    if re.fullmatch(r"[\d.,()/+-]+", gold):
        return rf"\boxed{{{gold.translate(FULL_WIDTH)}}}"
    return None


def percent(gold, number):
    return rf"\boxed{{{gold}{(chr(92), '')[number % 2]}%}}" if NUMBER.fullmatch(gold) else None


def spacing(gold, number):
    spaced = gold.replace(", ", (r",\ ", r",\;", r",\,", ",~")[number % 4])
    spaced = spaced.replace(r"\frac", r"\dfrac") if number % 2 else spaced
    return rf"\[ \boxed{{\,{spaced}\;}} \]"


SPELLINGS = (
    bold,
    text,
    units,
    thousands,
    hashes,
    answer,
    several,
    guess,
    thinking,
    full_width,
    percent,
    spacing,
)


def other_digit(gold):
    """The gold with another last digit."""
    changed = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), gold)
    return changed if changed != gold else None


def exchanged(gold):
    """A tuple, or a fraction, with two parts exchanged."""
    found = TUPLE.fullmatch(gold)
    if found and found[2].count(",") and "infty" not in gold:
        first, second, *rest = re.split(r",\s*", found[2])
        if first.strip() == second.strip():
            return None
        return f"{found[1]}{', '.join((second, first, *rest))}{found[3]}"
    fraction = re.fullmatch(r"(-?)\\frac\{(\w+)\}\{(\w+)\}", gold)
    if fraction and fraction[2] != fraction[3]:
        return rf"{fraction[1]}\frac{{{fraction[3]}}}{{{fraction[2]}}}"
    return None


def cut(gold):
    """A list without its last item."""
    kept = items(gold)[:-1]
    return ", ".join(kept) if kept and items(gold)[-1] not in kept else None


def other_word(gold):
    """Another choice or word."""
    if not WORD.fullmatch(gold):
        return None
    return re.sub(r"([A-Za-z])(\)?\}?)$", lambda end: "ba"[end[1] not in "aA"] + end[2], gold)


NEIGHBOURS = (other_digit, exchanged, cut, other_word)


def right(gold, number):
    """(name of the spelling, completion) of a gold."""
    for spell in SPELLINGS:
        completion = spell(bare(gold), number)
        if completion is not None:
            yield spell.__name__, completion


def wrong(gold, number):
    """(name of the spelling, completion) of what the gold is not; and, after a right guess, a wrong
    last statement."""
    for neighbour in NEIGHBOURS:
        near = neighbour(bare(gold))
        if near is None:
            continue
        yield from right(near, number)
        guessed = rf"First guess: \boxed{{{bare(gold)}}}. That is wrong."
        yield "last", guessed + "\n\n" + (hashes, answer)[number % 2](near, number)
        yield "last", f"Answer: {bare(gold)}\n\nNo: " + rf"it is $\boxed{{{near}}}$."


def graded(examples):
    """Yields, for all spellings of all golds and of their neighbours, (True for a completion that
    states the gold, the spelling's name, the completion, its example, whether it earns what it
    should)."""
    for number, example in enumerate(examples):
        for kind, spell in ((True, right), (False, wrong)):
            for name, completion in spell(example.answer, number):
                paid = rewards.math_answer(example, completion) == 1.0
                yield kind, name, completion, example, paid is kind
