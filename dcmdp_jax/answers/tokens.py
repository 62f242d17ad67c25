r"""The tokens of an answer, without what only changes its layout.

Spaces, typefaces, `\left`, `\displaystyle` and the like are dropped. Words keep whether they were
upright, as in `\text{cm}`. A comma that separates thousands is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from dcmdp_jax.answers.normal import normal
from dcmdp_jax.answers.work import Unreadable

LONGEST = 1_000  # characters
MAX_EXPONENT = 300  # of a number such as 1.5e10
DIGITS = 400  # of a number


class Token(NamedTuple):
    """A token of an answer."""

    kind: str  # num, word, name (an upright word), cmd, or the character itself
    text: str
    spaced: bool  # a space precedes it


_SPACES = """
    quad qquad enspace thinspace medspace thickspace negthinspace strut mathstrut displaystyle
    textstyle scriptstyle limits nolimits nonumber middle tiny small normalsize large Large LARGE
    huge Huge
""".split()
_LEXEME = re.compile(
    r"(?P<space>(?:[\s~$]|\\\Z|\\[,;:>!/ ()\[\]]|"
    rf"\\(?:{'|'.join(_SPACES)}|[bB]igg?[lrm]?)(?![A-Za-z]))+)"
    r"|(?P<fence>\\(?:left|right)(?![A-Za-z])\s*\.?)"
    r"|(?P<row>\\\\(?:\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\])?)"
    r"|(?P<dots>\.{3,})|(?P<num>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?)"
    r"|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<word>[A-Za-z]+)"
    r"|(?P<name>[\u00c0-\u024f\u0400-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+)"
    r"|(?P<sign>.)",
    re.DOTALL | re.ASCII,
)


def _commands(names: str) -> set[str]:
    """Returns LaTeX commands by their names."""
    return {rf"\{name}" for name in names.split()}


_UPRIGHT = _commands(
    "text textbf textit textrm textsf texttt textnormal textup emph mathrm mathsf "
    "mathtt mbox hbox operatorname rm"
)
_FACES = _UPRIGHT | _commands(
    "mathbf mathit mathnormal boldsymbol bm bf it underline boxed fbox "
    "bold pmb ensuremath mathop mathord"
)
_WITH_SETTING = _commands(
    "color textcolor hspace vspace phantom tag label"
)  # followed by a setting in braces
_SPELLINGS = {
    **dict.fromkeys(_commands("dfrac tfrac cfrac"), r"\frac"),
    **dict.fromkeys(_commands("dbinom tbinom"), r"\binom"),
    **dict.fromkeys([*_commands("vert lvert rvert Vert lVert rVert"), r"\|"], "|"),
    **dict.fromkeys(_commands("lparen lgroup"), "("),
    **dict.fromkeys(_commands("rparen rgroup"), ")"),
    **dict.fromkeys(_commands("leq leqslant leqq"), r"\le"),
    **dict.fromkeys(_commands("geq geqslant geqq"), r"\ge"),
    **dict.fromkeys(_commands("times cdot ast"), "*"),
    **dict.fromkeys(_commands("colon ratio"), ":"),
    **dict.fromkeys(_commands("backslash smallsetminus"), r"\setminus"),
    **dict.fromkeys(_commands("ldots dots cdots dotsc"), "..."),
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lt": "<",
    r"\gt": ">",
    r"\neq": r"\ne",
    r"\varnothing": r"\emptyset",
    r"\varepsilon": r"\epsilon",
    r"\varphi": r"\phi",
    r"\vartheta": r"\theta",
    r"\infin": r"\infty",
    r"\Bbb": r"\mathbb",
    r"\div": "/",
    r"\%": "%",
    r"\measuredangle": r"\angle",
    r"\bar": r"\overline",
    **dict.fromkeys([r"\degree", r"\textdegree"], "degrees"),
    r"\cr": r"\\",
}
_OTHER_NAMES = {"tg": "tan", "ctg": "cot", "cotg": "cot", "arctg": "arctan", "cosec": "csc"}
_JOINERS = {r"\land": "and", r"\wedge": "and", r"\lor": "or", r"\vee": "or"}
# commands whose argument keeps its braces
_TAKES_ARGUMENT = {"^", "_", r"\frac", r"\sqrt", r"\binom", r"\overline"}
_OPENS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", "{": "}"}
_BEFORE_OPENING = {"", "(", "{", ",", ";", "=", "and", "or", r"\{", r"\in", r"\cup", r"\setminus"}
_AFTER_CLOSING = {"", ")", "}", ",", ";", "and", "or", r"\}", r"\cup", r"\setminus"}
_MAY_BE_LISTS = {"(", "[", r"\{", r"\langle"}


def plain(text: str) -> str:
    """Returns an answer without what only changes its layout; unchanged if longer than LONGEST."""
    try:
        tokens = split(text)
    except Unreadable:
        return text.strip()
    joined = ""
    for before, token in zip([None, *tokens], tokens):
        if before is not None and before.kind == token.kind == "num":
            joined += " "
        joined += token.text
    return joined


def split(text: str) -> list[Token]:
    """Returns the tokens of an answer. Raises Unreadable if it is too long."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    text = normal(text)
    if len(text) > 2 * LONGEST:
        raise Unreadable("too long")
    tokens = _with_usual_brackets(_without_thousands(_without_layout(_lexemes(text))))
    while tokens and tokens[-1].text == ".":
        tokens.pop()
    return tokens


def number(text: str) -> Fraction:
    """Returns the value of a token of digits. Raises Unreadable if it is too large."""
    digits, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_EXPONENT or len(digits) > DIGITS:
        raise Unreadable("too large a number")
    return Fraction("0" + digits.removesuffix(".")) * Fraction(10) ** int(exponent or 0)


def _lexemes(text: str) -> list[Token]:
    """Returns a text as tokens, with one spelling for each command, typefaces included."""
    lexemes = []
    spaced = False
    for match in _LEXEME.finditer(text):
        kind = match.lastgroup
        lexeme = match[0]
        if kind in ("space", "fence"):
            spaced = spaced or kind == "space"
            continue
        if kind in ("row", "dots"):
            lexeme = r"\\" if kind == "row" else "..."
        lexeme = _SPELLINGS.get(lexeme, lexeme)
        if lexeme.lstrip("\\") in _OTHER_NAMES:
            lexeme = lexeme.replace(lexeme.lstrip("\\"), _OTHER_NAMES[lexeme.lstrip("\\")])
        if lexeme in _JOINERS:
            lexemes.append(Token("name", _JOINERS[lexeme], spaced))
        elif kind in ("num", "word", "name"):
            lexemes.append(Token(kind, lexeme, spaced))
        elif lexeme == "degrees":
            lexemes.append(Token("name", lexeme, spaced))
        elif lexeme[0] == "\\" and len(lexeme) > 1:
            lexemes.append(Token("cmd", lexeme, spaced))
        else:
            lexemes.append(Token(lexeme, lexeme, spaced))
        spaced = False
    return lexemes


def _without_layout(lexemes: Sequence[Token]) -> list[Token]:
    """Returns tokens without typefaces, and with signs of several lexemes as one token."""
    tokens: list[Token] = []
    opened: list[tuple[bool, bool]] = []  # of each open brace: does it stay, were words upright
    upright = False
    at = 0
    spaced = False
    while at < len(lexemes):
        token = lexemes[at]
        spaced = spaced or token.spaced
        following = lexemes[at + 1].text if at + 1 < len(lexemes) else ""
        at += 1
        if length := _degree(lexemes, at - 1):
            tokens.append(Token("name", "degrees", spaced))
            at += length - 1
        elif token.text == r"\not" and following == "=":
            tokens.append(Token("cmd", r"\ne", spaced))
            at += 1
        elif token.text in _WITH_SETTING:
            while at < len(lexemes) and lexemes[at].text != "}":
                at += 1
            at += 1
        elif (
            token.text == r"\mathbb" or token.text == r"\mathbf" and _is_reals(lexemes[at : at + 3])
        ):
            end = at + (3 if following == "{" else 1)
            letters = "".join(part.text for part in lexemes[at:end]).strip("{}")
            tokens.append(Token("cmd", rf"\mathbb{{{letters}}}", spaced))
            at = end
        elif token.text in _FACES:
            if following != "{":
                continue  # `\bf 5`, `\text cm`
            stays = _is_argument(tokens)
            opened.append((stays, upright))
            upright = token.text in _UPRIGHT
            at += 1
            if stays:
                tokens.append(Token("{", "{", spaced))
        elif (token.text, following) == ("{", "}") and not _is_argument(tokens):
            at += 1
        elif token.text == "{":
            opened.append((True, upright))
            tokens.append(token._replace(spaced=spaced))
        elif token.text == "}" and opened:
            stays, upright = opened.pop()
            if not stays:
                spaced = True  # `\text{m}\text{s}` are two words
                continue
            tokens.append(token._replace(spaced=spaced))
        else:
            kind = "name" if token.kind == "word" and upright else token.kind
            tokens.append(Token(kind, token.text, spaced))
        spaced = False
    return tokens


def _is_argument(tokens: Sequence[Token]) -> bool:
    """Returns True if what follows is the argument of the last token."""
    return bool(tokens) and tokens[-1].text in _TAKES_ARGUMENT


def _is_reals(lexemes: Sequence[Token]) -> bool:
    """Returns True for `{R}`."""
    return [lexeme.text for lexeme in lexemes] == ["{", "R", "}"]


def _degree(lexemes: Sequence[Token], at: int) -> int:
    r"""Returns how many lexemes from `at` on write degrees: `^\circ`, `^{\circ}`, `^\degree`."""
    texts = [token.text for token in lexemes[at : at + 4]]
    if texts[:1] != ["^"]:
        return 0
    if at and lexemes[at - 1].kind == "num":
        texts = [r"\circ" if text == "o" else text for text in texts]  # `75^o`
    if texts[1:2] in ([r"\circ"], ["degrees"]):
        return 2
    return 4 if texts[1:] in (["{", r"\circ", "}"], ["{", "degrees", "}"]) else 0


def _without_thousands(tokens: Sequence[Token]) -> list[Token]:
    """Returns tokens with `1,234` as one number, unless its bracket may be a list.

    A tuple, set or interval has no item that starts with a zero, so `(1,000)` is a number.
    """
    joined: list[Token] = []
    brackets: list[str] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token.text in _OPENS:
            brackets.append(token.text)
        elif brackets and token.text == _OPENS[brackets[-1]]:
            brackets.pop()
        groups = _thousands(tokens, at)
        if (
            brackets
            and brackets[-1] in _MAY_BE_LISTS
            and not any(part.text[0] == "0" for part in tokens[at + 2 : at + 2 * groups + 1 : 2])
        ):
            groups = 0
        number = "".join(part.text for part in tokens[at : at + 2 * groups + 1 : 2])
        joined.append(token._replace(text=number))
        at += 2 * groups + 1
    return joined


def _thousands(tokens: Sequence[Token], at: int) -> int:
    """Returns how many groups of three digits, each after a comma, belong to the number at `at`."""
    before = tokens[at - 1].text if at else ""
    if not re.fullmatch(r"\d{1,3}", tokens[at].text):
        return 0
    if before in (",", ".") and not tokens[at].spaced:
        return 0
    groups = 0
    while True:
        mark = at + 2 * groups + 1
        pair = tokens[mark : mark + 2]
        if [part.kind for part in pair] != [",", "num"] or any(part.spaced for part in pair):
            return groups
        ended = groups and "." in tokens[mark - 1].text
        if ended or not re.fullmatch(r"\d{3}(\.\d*)?", pair[1].text):
            return 0
        groups += 1


def _with_usual_brackets(tokens: Sequence[Token]) -> list[Token]:
    """Returns tokens with `]1, 2[` in round brackets, and a vector in angular ones."""
    if len(tokens) > 2 and (tokens[0].text, tokens[-1].text) == ("<", ">"):  # `<1, 2>`
        first, *inside, last = tokens
        tokens = [
            first._replace(kind="cmd", text=r"\langle"),
            *inside,
            last._replace(kind="cmd", text=r"\rangle"),
        ]
    turned = []
    for at, token in enumerate(tokens):
        before = tokens[at - 1].text if at else ""
        after = tokens[at + 1].text if at + 1 < len(tokens) else ""
        if token.text == "]" and before in _BEFORE_OPENING and after not in _AFTER_CLOSING:
            token = Token("(", "(", token.spaced)
        elif token.text == "[" and after in _AFTER_CLOSING and before not in _BEFORE_OPENING:
            token = Token(")", ")", token.spaced)
        turned.append(token)
    return turned
