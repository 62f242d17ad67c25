r"""One spelling, LaTeX in ASCII, for what Unicode, Markdown and keyboards write in several ways.

`５` becomes `5`, `x²` becomes `x^{2}`, `½` becomes `\frac{1}{2}`, `θ` becomes `\theta`, `**5**`
becomes `5`. `1{,}234`, `1\,234` and `1,\!234` become `1234`: between groups of three digits these
marks separate thousands only. The meaning of a plain comma depends on the brackets around it, which
`tokens` decides.
"""

from __future__ import annotations

import re
import unicodedata

_GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma
    sigma tau upsilon phi chi psi omega
""".split()
_NAMED = {  # command: its Unicode signs
    "Gamma": "Γ",
    "Delta": "Δ∆",
    "ell": "ℓ",
    "Theta": "Θ",
    "Lambda": "Λ",
    "Xi": "Ξ",
    "Pi": "Π",
    "Sigma": "Σ",
    "Upsilon": "Υ",
    "Phi": "Φ",
    "Psi": "Ψ",
    "Omega": "Ω",
    "cdot": "×·⋅∙•",
    "le": "≤⩽≦",
    "ge": "≥⩾≧",
    "ne": "≠",
    "approx": "≈",
    "equiv": "≡",
    "pm": "±",
    "mp": "∓",
    "surd": "√",
    "infty": "∞",
    "in": "∈",
    "cup": "∪",
    "cap": "∩",
    "setminus": "∖",
    "emptyset": "∅⌀",
    "mid": "∣",
    "langle": "⟨〈",
    "rangle": "⟩〉",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "angle": "∠",
    "triangle": "△",
    "land": "∧",
    "lor": "∨",
    "to": "→",
}
_SIGNS = {  # replaced before NFKC, which decomposes some of them, and after it
    **{chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(_GREEK)},
    **{sign: rf"\{name} " for name, signs in _NAMED.items() for sign in signs},
    **{sign: rf"\mathbb{{{letter}}}" for sign, letter in zip("ℝℤℕℚℂ", "RZNQC")},
    **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
    **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("⁄∕÷", "/"),
    **dict.fromkeys("’‘′ʹ", "'"),
    **dict.fromkeys('“”"£€¥₹\u200b\u200c\u200d\u2060\ufeff', ""),
    "∛": r"\surd[3]",
    "∜": r"\surd[4]",
    "∶": ":",
    "、": ",",
    "。": ".",
    "｛": r"\{",
    "｝": r"\}",
    "…": "...",
    "㎡": r"\text{ m}^{2}",
    "㎥": r"\text{ m}^{3}",
    "㎠": r"\text{ cm}^{2}",
    "㎤": r"\text{ cm}^{3}",
    "¢": r"\text{ cents}",
    "或": r"\text{ or }",
    "和": r"\text{ and }",
    "且": r"\text{ and }",
}
_TRANSLATED = str.maketrans(_SIGNS)
_REPEATED = re.compile("((?:[0-9][\u0305\u0307])+)")  # digits with a bar or a dot of their own
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₐₑₒₓₕₖₗₘₙₚₛₜ]+")
_ONE_CHARACTER_FRACTION = re.compile("[¼½¾⅐-⅞↉]")
_THOUSANDS = (
    re.compile(  # marks between two groups of digits that do not separate the items of a list
        r"(?<=\d)(?:\s*"
        r"(?:(?:\\text)?\{\s*,\s*\}|,\s*\\!|\\!\s*,|\\[,;: ]|\\thinspace)\s*"
        r"|[\u2005-\u2009\u202f\u00a0])"
        r"(?=\d{3}(?!\d))",
        re.ASCII,
    )
)
# `3{,}14`: the comma of a list has no braces
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)", re.ASCII)
_POWER = re.compile(r"(?<=[\w)}])\s*\*\*\s*(?=[\w({\\-])", re.ASCII)
_MODULE = re.compile(r"\b(?:np|math|sympy)\.(?=[a-z])")
_NO_WHOLE_PART = re.compile(r"(?<!\d)\.(?=\\(?:overline|bar|dot)\b)", re.ASCII)
_EMPHASIS = ("***", "**", "__", "`")


def normal(text: str) -> str:
    """Returns an answer in ASCII LaTeX, as far as that has a spelling, without emphasis and full
    stop.
    """
    text = text.replace(r"\overset{\cdot}", r"\dot")
    text = _REPEATED.sub(lambda match: rf"\overline{{{match[0][::2]}}}", text)
    text = _RAISED.sub(lambda match: "^{" + _compatible(match[0]) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + _compatible(match[0]) + "}", text)
    text = _ONE_CHARACTER_FRACTION.sub(_fraction, text)
    text = _THOUSANDS.sub("", text)
    text = _compatible(text.translate(_TRANSLATED)).translate(_TRANSLATED)
    text = _THOUSANDS.sub("", text)  # again: full-width digits are ASCII digits now
    text = _DECIMAL_COMMA.sub(".", text)
    text = _NO_WHOLE_PART.sub("0.", _MODULE.sub("", _POWER.sub("^", text)))
    text = _without_emphasis(text.strip())
    return text if text.endswith("...") else text.rstrip(". ")


def _compatible(text: str) -> str:
    """Returns a text in Unicode's normal form KC."""
    return unicodedata.normalize("NFKC", text)


def _fraction(match: re.Match) -> str:
    """Returns the LaTeX of a fraction that is one character."""
    top, bottom = _compatible(match[0]).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _without_emphasis(text: str) -> str:
    """Returns a text without Markdown's marks at its ends.

    Half a pair of marks may stand there, if the other half was before the answer.
    """
    for mark in _EMPHASIS:
        text = text.removeprefix(mark).removesuffix(mark)
    if len(text) > 2 and text[0] == text[-1] and text[0] in "*_":
        text = text[1:-1]
    return text.strip()
