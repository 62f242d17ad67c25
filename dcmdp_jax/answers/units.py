"""Units of measurement after a number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit as powers of base units and a factor."""

    powers: tuple[tuple[str, int], ...]  # of base units, sorted by name
    factor: Fraction  # of one such unit, in base units
    pi: int  # the factor times pi to this power
    known: bool  # every word is in the table


_BASE = {  # name: powers of base units, factor
    "m": ({"m": 1}, "1"),
    "cm": ({"m": 1}, "1/100"),
    "mm": ({"m": 1}, "1/1000"),
    "km": ({"m": 1}, "1000"),
    "nm": ({"m": 1}, "1e-9"),
    "in": ({"m": 1}, "0.0254"),
    "ft": ({"m": 1}, "0.3048"),
    "yd": ({"m": 1}, "0.9144"),
    "mi": ({"m": 1}, "1609.344"),
    "s": ({"s": 1}, "1"),
    "ms": ({"s": 1}, "1/1000"),
    "min": ({"s": 1}, "60"),
    "h": ({"s": 1}, "3600"),
    "day": ({"s": 1}, "86400"),
    "week": ({"s": 1}, "604800"),
    "month": ({"month": 1}, "1"),
    "year": ({"month": 1}, "12"),
    "g": ({"g": 1}, "1"),
    "kg": ({"g": 1}, "1000"),
    "mg": ({"g": 1}, "1/1000"),
    "lb": ({"g": 1}, "453.59237"),
    "oz": ({"g": 1}, "28.349523125"),
    "l": ({"m": 3}, "1/1000"),
    "ml": ({"m": 3}, "1e-6"),
    "n": ({"g": 1, "m": 1, "s": -2}, "1000"),
    "j": ({"g": 1, "m": 2, "s": -2}, "1000"),
    "erg": ({"g": 1, "m": 2, "s": -2}, "1e-4"),
    "w": ({"g": 1, "m": 2, "s": -3}, "1000"),
    "hz": ({"s": -1}, "1"),
    "k": ({"K": 1}, "1"),
    "mol": ({"mol": 1}, "1"),
    "mph": ({"m": 1, "s": -1}, "0.44704"),
    "kph": ({"m": 1, "s": -1}, "5/18"),
    "dollar": ({"$": 1}, "1"),
    "cent": ({"$": 1}, "1/100"),
    "degree": ({"degree": 1}, "1"),
    "radian": ({"degree": 1}, "180"),  # over pi
}
_OVER_PI = {"radian"}
_NAMES = {
    "meter": "m",
    "metre": "m",
    "centimeter": "cm",
    "centimetre": "cm",
    "millimeter": "mm",
    "kilometer": "km",
    "kilometre": "km",
    "inch": "in",
    "inches": "in",
    "foot": "ft",
    "feet": "ft",
    "yard": "yd",
    "mile": "mi",
    "sec": "s",
    "second": "s",
    "minute": "min",
    "hr": "h",
    "hour": "h",
    "gram": "g",
    "kilogram": "kg",
    "pound": "lb",
    "lbs": "lb",
    "ounce": "oz",
    "liter": "l",
    "litre": "l",
    "milliliter": "ml",
    "newton": "n",
    "joule": "j",
    "watt": "w",
    "hertz": "hz",
    "kelvin": "k",
    "deg": "degree",
    "rad": "radian",
    "yr": "year",
    "usd": "dollar",
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER = {"squared": 2, "cubed": 3}
# Words that change a number: numbers and multiples, parts, operations, signs.
_CHANGE = set(
    """
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
        ninety hundred thousand mn bn mil lakh lac crore myriad dozen score gross pair couple double
        triple quadruple doubled tripled halved rooted twice thrice fold kilo mega giga tera milli
        micro nano th st nd rd ppm ppb permil permille permyriad bp bps half halve third quarter
        fourth fifth sixth seventh eighth ninth tenth twentieth hundredth thousandth pi tau radical
        plus minus divided multiplied added subtracted reduced increased decreased raised root power
        exponent factorial reciprocal inverse inverted opposite complement conjugate modulo mod base
        log octal hex hexadecimal binary decimal short wrong incorrect negative negated neg loss
        deficit debt 百 千 万 亿 半 倍
    """.split()
)
_MULTIPLES = ("fold", "illion", "illions", "illionth", "illionths")
# Words that compare a number, or begin another clause.
_NO_UNITS = set(
    """
        over by below under above beyond exceeding than between about approximately roughly almost
        nearly around and or not no nor except without if unless when where while is isn are was to
        from for but
    """.split()
)
_LATEX = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname|cdot)(?![A-Za-z])|[{}~*]")
_PIECE = re.compile(r"\s*(?:(/|per\b)|([^\W\d_]+)\.?(?:\s*\^\s*\(?\s*(-?\d)\s*\)?|(\d))?)\s*")
_HALF_OF_DAY = re.compile(r"\b([ap])\s?\.?\s?m\b\.?", re.IGNORECASE)


def is_word(word: str, spaced: bool) -> bool:
    """Returns True if a word next to a number is read as a unit, not as a product of variables.

    `2xyz` is such a product. A word that is not in the table counts if it is `spaced` from the
    number.
    """
    return (
        _name(word) in _BASE
        and len(word) > 1
        or word in _POWERS
        or (spaced and len(word) > 2 and word.islower())
    )


def is_known(letter: str) -> bool:
    """Returns True if a letter is a unit of the table."""
    unit = read(letter)
    return unit is not None and unit.known


def changes_a_number(word: str) -> bool:
    """Returns True for `million`, `half`, `negative`, `tenfold` and the like, `k` and `M`."""
    lower = word.lower()
    if lower in _CHANGE or lower.removesuffix("s") in _CHANGE:
        return True
    return lower.endswith(_MULTIPLES) or len(word) == 1 and word in "kMBT"


def read(text: str) -> Unit | None:
    """Returns the unit that words with powers, `/` and `per` name, or None if they name none."""
    rest = _HALF_OF_DAY.sub(lambda match: match[1].lower() + "m", _LATEX.sub(" ", text).strip())
    powers: dict[str, int] = {}
    factor = Fraction(1)
    pi = 0
    is_known_unit = True
    sign = 1
    ahead = 1
    last = None
    while rest:
        piece = _PIECE.match(rest)
        if piece is None:
            return None
        rest = rest[piece.end() :]
        word = piece[2]
        if word is None:
            sign = -1
            last = None
            continue
        clause = word.lower() in _NO_UNITS or word == "times" and rest
        if clause or changes_a_number(word):
            return None
        if word in _POWERS:
            ahead = _POWERS[word]
            continue
        if word in _AFTER:
            if last is None:
                return None
            name = last[0]
            exponent = last[1] * (_AFTER[word] - 1)
            first = False
        else:
            name = _name(word)
            exponent = sign * ahead * int(piece[3] or piece[4] or 1)
            first = True
        ahead = 1
        base, scale = _BASE.get(name, ({name: 1}, "1"))
        is_known_unit = is_known_unit and name in _BASE
        for unit, power in base.items():
            powers[unit] = powers.get(unit, 0) + power * exponent
        factor *= Fraction(scale) ** exponent
        pi -= exponent * (name in _OVER_PI)
        last = (name, exponent) if first else None
    left = tuple(sorted((unit, power) for unit, power in powers.items() if power))
    return Unit(left, factor, pi, is_known_unit)


def _name(word: str) -> str:
    """Returns the table's name of a unit that may be written out or in the plural; another word in
    the singular.
    """
    if word in _BASE:
        return word
    lower = word.lower()
    for name in (lower, lower.removesuffix("s")):
        if name in _NAMES:
            return _NAMES[name]
        if name in _BASE and (len(name) > 2 or word == word.upper() and len(word) <= 2):
            return name
    return lower.removesuffix("s")
