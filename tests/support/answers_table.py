r"""Labelled pairs of answers: by hand, and by rules from numbers and the evaluation sets' answers.

Conventions: units, degrees and percent signs may be left out; a list without brackets, and a set,
have no order; an answer in one base does not equal the same digits in another; a rounded decimal
does not equal the exact value.
"""

import pathlib
import random
import re
from fractions import Fraction

BY_KIND = pathlib.Path(__file__).with_name("answers_by_kind.txt")

_EQUAL = r"""
18 | 18.0
18 | x = 18
18 | 18 \text{ cm}
18 cm^2 | 18
18 miles per hour | 18
36/2 | \dfrac{36}{2}
1.8e1 | 18
1.8 \times 10^{1} | 18
1200 | 1,200.00
1200 | 1{,}200
1200 | 1,\!200
11,\! 111,\! 111,\! 100 | 11111111100
-1/2 | -\frac12
-1/2 | - 1 / 2
9/5 | 1\frac{4}{5}
9/5 | 1 4/5
18/10 cups | 9/5
(1,1/2) | \left( 1, \frac{1}{2} \right)
1,-2,3 | $1$, $-2$, $3$
1,-2,3 | 3, 1 and -2
\frac{\pi}{2} | \dfrac{\pi}{2}
\frac{\pi}{2} | y = \pi/2
even | \text{even}
even | Even.
2\sqrt{3} | \sqrt{12}
[0,\infty) | \left[ 0, \infty \right)
2x+3 | 3+2x
(x+1)^2 | x^2+2x+1
\frac{\sqrt{3}}{2} | \sqrt{3}/2
\frac{1}{\sqrt{2}} | \frac{\sqrt2}{2}
2^{10} | 1024
\text{(B)} | B
\text{(B)} | (B)
\text{Evelyn} | evelyn
30^\circ | 30
30^\circ | 30 degrees
1 \pm \sqrt{19} | 1-\sqrt{19}, 1+\sqrt{19}
\{1\pm\sqrt{5},-2\} | \{-2, 1+\sqrt5, 1-\sqrt5\}
x \in [-2,7] | [-2,7]
x \in [-2,7] | -2 \le x \le 7
(2,\infty) | x > 2
(-\infty, 2) \cup (3, \infty) | (3,\infty)\cup(-\infty,2)
y = 2x + 3 | 2x+3
y = 2x + 3 | 2x - y + 3 = 0
5x - 7y + 11z + 4 = 0 | -10x+14y-22z=8
f(x)=2x | 2x
f(x)=2x | f(t) = 2t
15 cm^2 | 15\mbox{ cm}^2
864 \mbox{ inches}^2 | 864
864 \mbox{ inches}^2 | 6 square feet
5.4 \text{ cents} | 5.4
5.4 \text{ cents} | \$0.054
\$18.90 | 18.9
100 cm | 1 m
36 km/h | 10 \text{ m/s}
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}
50\% | 50
50\% | 0.5
50\% | \frac12
1 million | 1000000
5 dozen | 60
p - q | -q+p
\cot x | \frac{\cos x}{\sin x}
6 - 5i | -5i+6
e^{-i\pi} | -1
\sqrt[3]{-8} | -2
\binom{2n}{n} | \frac{(2n)!}{n!^2}
\frac{100!}{2^{50}} | 100!/2^{50}
\lfloor n/2 \rfloor + 1 | \left\lfloor \frac{n+2}{2} \right\rfloor
np.arcsin(10/13) | \arcsin \frac{10}{13}
\log_{10} 250 | 1+\log_{10} 25
\sin^2 x | 1-\cos^2 x
\sin^{-1}(1) | \pi/2
\arctan 1 | \frac{\pi}{4}
\frac{37}{4} m | \frac{37}{4} \text{ m}
|x| | \sqrt{x^2}
4210_{5} | 4210_5
3, 5, 7 | \{7, 5, 3\}
90^{\circ},60^{\circ} | 60, 90
k \geqslant 2 | [2, \infty)
\frac 34 | 0.75
\frac9{19} | 9/19
\frac{270}7\text{ degrees} | 270/7
4.5e33 | 4.5 \times 10^{33}
.35625 | 0.35625
-1./3 | -\frac{1}{3}
2RC+R+C | R+C+2CR
\frac{d !}{2 k(d-k) !} | \frac{d!}{2k \cdot (d-k)!}
\tan 45^\circ | \tan 45^{\circ}
x=5 | 5=x
58,500 | 58500
(-2,1) | -2<x<1
10^{100},10^{1 / 100} | \sqrt[100]{10}, 10^{100}
\frac{\log 2}{\log 2-\log 3} | \frac{\ln 2}{\ln (2/3)}
2021 \cdot 505 \cdot 337 | 343943885
5,000 meters | 5 km
3\frac{1}{2} | 3.5
0 | 0.0
-0 | 0
12\pi | \pi \cdot 12
11\sqrt2 | \sqrt{242}
\frac{11+9a}{20} | \frac{11}{20} + \frac{9a}{20}
6r^2-4r-24 | 2(3r^2 - 2r - 12)
(a+5)(b+2) | ab+2a+5b+10
x^3+3x-6 | 3x - 6 + x^{3}
\frac{1}{4} n(n+1) | \frac{n^2+n}{4}
\frac{n(n+1)(2 n+1)}{6} | \frac{2n^3+3n^2+n}{6}
(n-2) 2^{n}+1 | 2^n n - 2^{n+1} + 1
2^{k-n} | \frac{2^k}{2^n}
\frac{8}{\sqrt[3]{7}} | \frac{8 \sqrt[3]{49}}{7}
\frac{-1+\sqrt{5}}{2} | \frac{\sqrt5 - 1}{2}
1024-256 \pi | 256(4-\pi)
\frac{189 \sqrt{11}}{11} | \frac{189}{\sqrt{11}}
2^{-2 / 3}, 8 | 8, \frac{1}{\sqrt[3]{4}}
\sqrt{2}-1 | \frac{1}{1+\sqrt{2}}
\ln 2 + i\pi / 3 | \frac{i \pi}{3} + \ln(2)
\frac{1}{4-\omega^{2}} | -\frac{1}{\omega^2 - 4}
e^{2 t} e^{-t} | e^t
\frac{e^{2 i t}}{(2+2 i)} | \frac{(1-i) e^{2it}}{4}
\sqrt{2} \cos (2 t-\pi / 4) | \cos 2t + \sin 2t
\exp(-2t) | e^{-2t}
x_{0} \cos (\omega t) | \cos(\omega t) x_0
C_{1} e^{t}+C_2 e^{-t} | C_2 e^{-t} + C_1 e^{t}
m_{p} c^{2} | c^2 m_p
\frac{1}{\sqrt{2}}c | \frac{c\sqrt{2}}{2}
(3,4] | 3 < x \le 4
(-\sqrt{3}, \sqrt{3}) | \left(-\sqrt3,\sqrt3\right)
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] | [\pi^2/8, 5\pi^2/4]
(45^{\circ}, 60^{\circ}) | (45, 60)
(0,9) \cup (9,36) | (9,36) \cup (0,9)
(-\infty, 0) \cup\{1\} | \{1\} \cup (-\infty,0)
7.5 hours | 450 minutes
2 \text{ dozen} | 24
60 \text{ mph} | 60
10 \text{ square meters} | 10 m^2
\frac{600}{7} km/h | \frac{600}{7}
62.5% | \frac{5}{8}
17.5% | 17.5
f(x)=-1, f(x)=x+1 | f(x) = 1 + x, f(x) = -1
a=2, a=-6-4 \sqrt{2} | -6-4\sqrt2, 2
y^2 = 4x | x = \frac{y^2}{4}
\text{east} | East
\text{ellipse} | \textbf{ellipse}
\text{(E)} | \textbf{(E)}
\tan^{-1}(1) | \pi/4
\log_2 8 | 3
\csc x | \frac{1}{\sin x}
4! | 24
\lceil n / 2\rceil+1 | \lfloor (n+1)/2 \rfloor + 1
\lfloor 7/2 \rfloor | 3
(10^{4}, 10^{3}) | (10000, 1000)
(7,5,1,1) | (7, 5, 1, 1)
\left(\frac{t^{2}}{2}-t+C\right) e^{-t} | e^{-t} (t^2/2 - t + C)
0.\overline{3} | 0.\overline{3}
-\tau \ln \Delta | -\tau \ln(\Delta)
2 \pi / \omega | \frac{2\pi}{\omega}
x \ge 2 | [2,\infty)
"""
_DIFFERENT = r"""
18 | 180
18 | -18
1/3 | 0.333
1/3 | 0.333333333
\pi | 3.14159265358979
2 n | 2
2n | 2
3 m | 3
1 million | 1
5 dozens | 5
288 \pi | 288
2 pi | 2
52_8 | 52
52_8 | 42
1/0 | 0
3 or more | 3
1.5.5 | 1.5
(1,2) | (2,1)
(1,2) | [1,2]
(1,2) | 1,2
(1,200) | 1200
12,00 | 1200
1e5 | 1e6
1e9999 | 1e9998
1 2 | 12
\sqrt{3} | 3
a | A
5 squared | 5
x^2=4 | 4
\frac{1}{2} | \frac{1}{2}x
15 cm^2 | 15 m^2
5 cm | 5 m
18 miles | 18 hours
x=5 | y=5
y = 2x+3 | y=2x-3
\text{even} | \text{odd}
\text{(B)} | C
|x| | x
[0,\infty) | (0,\infty)
(-\infty,2) | (2,\infty)
1 \pm \sqrt{19} | 1+\sqrt{19}
1,2,3 | 1,2
1,1,2 | 1,2,2
\lfloor n/2 \rfloor | n/2
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
x+1 | x-1
x^2 | x^3
\sin x | \cos x
2x | 2y
f(x)=2x | f(x)=3x
0 | f(0)
\{1,2\} | (1,2)
even | neve
i | 1
2+3i | 2-3i
٣ | 3
x > 2 | x \ge 2
0.1 | 0.10000001
10^{10} | 10^{11}
50\% | 5
\sqrt{x^2} | -x
45^\circ | \pi/4
12\pi | 12
1.6 | 1.61
7.353e14 | 7.353e13
6r^2-4r-24 | 6r^2-4r+24
(a+5)(b+2) | (a+2)(b+5)
2^{k-n} | 2^{n-k}
e^{-2t} | e^{2t}
\cos (2 t) | \cos^2 t
C_1 e^{t} | C_2 e^{t}
x_0 | x_1
(3,4] | [3,4)
(3,4] | (3,4)
(0,9) \cup (9,36) | (0,36)
(1,-16,-4,43) | (1,-16,4,43)
(1,2,3) | (1,2)
7.5 hours | 7.5 minutes
10 m^2 | 10 m^3
\$5 | 5 cents
62.5% | 0.0625
f(x)=-1, f(x)=x+1 | f(x)=x+1
y^2=4x | y^2=-4x
y = -2x | x = -2y
\text{east} | \text{west}
\text{(B)} | \text{(D)}
\sqrt{2} | 1.41421356
2^{10} | 2^{11}
\frac{a}{b} | \frac{b}{a}
n^2 | 2^n
\binom{n}{2} | \frac{n^2}{2}
4! | 4
\lceil n / 2\rceil | \lfloor n/2 \rfloor
1 \frac{4}{5} | \frac{4}{5}
-2 | 2
10,080 | 10.080
x>2 | x<2
\pi | 22/7
3 \pm \sqrt{2} | 3 \pm \sqrt{3}
4210_5 | 4210_6
\infty | -\infty
\log_2 8 | \log_8 2
2 \text{ dozen} | 2
\{1,2,3\} | \{1,2,4\}
-13x+3 | 13x-3
"""

EQUAL, DIFFERENT = (
    [tuple(line.split(" | ")) for line in text.strip("\n").split("\n")]
    for text in (_EQUAL, _DIFFERENT)
)


def by_hand():
    """(gold, answer, whether they are equal)"""
    pairs = [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in DIFFERENT]
    for line in BY_KIND.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pairs.append((*line[2:].split(" | "), line[0] == "="))
    return pairs


def numbers(count=60):
    """Fractions in five spellings, and beside them a sum, a product, the inverse and a rounded
    decimal that they are not.
    """
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        a = rng.randint(-400, 400)
        b = rng.choice([2, 3, 4, 5, 7, 8, 9, 11, 16, 25, 30])
        value = Fraction(a, b)
        gold = rf"\frac{{{a}}}{{{b}}}"
        pairs += [
            (gold, form, True)
            for form in (
                f"{a}/{b}",
                str(value),
                rf"\dfrac{{{7 * a}}}{{{7 * b}}}",
                rf"x = {a} \div {b}",
                f"{value.numerator}.0/{value.denominator}",
            )
        ]
        wrong = [value + 1, value - Fraction(1, 100), -value, value * 10] + (
            [1 / value] if value else []
        )
        pairs += [(gold, str(other), False) for other in wrong if other != value]
        pairs.append((gold, f"{float(value):.4f}", 10_000 % value.denominator == 0))
    return pairs


def gold_forms(golds):
    """The answers of a set in other spellings, and in others that are not theirs."""
    pairs = []
    for gold in dict.fromkeys(golds):
        bare = (
            gold.replace("$", "") if gold.count("$") == 2 and gold[0] == gold[-1] == "$" else gold
        )
        pairs += [
            (gold, form, True)
            for form in (f"${bare}$", bare.replace(r"\frac", r"\dfrac"), rf" \displaystyle {bare} ")
        ]
        if "(" in bare and r"\left" not in bare and bare.count("(") == bare.count(")"):
            pairs.append((gold, bare.replace("(", r"\left(").replace(")", r"\right)"), True))
        pairs += _of_number(gold, bare) + _of_fraction(gold, bare) + _of_list(gold, bare)
    return pairs


def _of_number(gold, bare):
    if not re.fullmatch(r"-?\d{1,9}", bare):
        return []
    n = int(bare)
    wrong = [str(n + 1), str(n - 1), f"{bare}.5", f"({bare}, {bare})"] + (
        [str(-n), f"{n}0", f"{n}x"] if n else []
    )
    return [
        (gold, form, True)
        for form in (
            f"{n}.0",
            f"x = {n}",
            rf"\frac{{{2 * n}}}{{2}}",
            f"{n:,}",
            rf"{n} \text{{ units}}",
        )
    ] + [(gold, form, False) for form in wrong]


def _of_fraction(gold, bare):
    found = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", bare)
    if not found:
        return []
    a, b = map(int, found.groups())
    return [
        (gold, form, True)
        for form in (f"{a}/{b}", rf"\frac{{{3 * a}}}{{{3 * b}}}", rf"{a} \cdot \frac{{1}}{{{b}}}")
    ] + [
        (gold, form, False)
        for form in (f"{a + 1}/{b}", f"-{a}/{b}", f"{a}/{b + 1}")
        + ((f"{b}/{a}",) if a != b else ())
    ]


def _of_list(gold, bare):
    if not re.fullmatch(r"-?\d{1,2}(, ?-?\d{1,2})+", bare):
        return []
    items = [int(item) for item in bare.split(",")]
    changed = [*items[:-1], 1 + max(items)]
    return [
        (gold, ", ".join(map(str, items[::-1])), True),
        (gold, ", ".join(map(str, items[:-1])), False),
        (gold, ", ".join(map(str, changed)), False),
    ]
