"""The value of a tree at a point: an exact fraction where it is one, else a complex number of 60 digits.

Two expressions are equal where they agree at several fixed points, to 40 digits. Work is bounded: sizes of exact integers,
numbers of transcendental functions, arguments of sines.
"""

from __future__ import annotations

import decimal
import hashlib
import math
from decimal import Decimal
from fractions import Fraction

from dcmdp_jax.answers.read import Node

DIGITS = 60
AGREE = Decimal("1e-40")  # relative
NOTHING = Decimal("1e-50")  # cancelled
BITS = 20_000  # of an exact numerator or denominator
CALLS = 60  # of functions that are no arithmetic, in one value
REAL_POINTS, WHOLE_POINTS = 6, 8
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
WHOLE, ROUND, COUNTS = {"factorial", "binom"}, {"floor", "ceil"}, set("jklmnpqMN")  # what is compared at whole numbers

Complex = tuple[Decimal, Decimal]


class Unknown(ArithmeticError):
    """No value: undefined, too large, or of no kind that is known here."""


def equal(one: Node, other: Node) -> bool:
    """Whether two expressions have the same value at every point where both have one, and at two at the least.

    Variables take positive values, negative ones too where an absolute value is taken, and whole ones where the expressions hold
    factorials or binomials, or round what is named as a count.
    """
    if bool(variables(one)) != bool(variables(other)):
        return False  # `f(0)`, which reads as a product, is not the number 0
    names = sorted(variables(one) | variables(other))
    kinds = functions(one) | functions(other)
    whole = bool(kinds & WHOLE or kinds & ROUND and COUNTS.issuperset(names))
    found = 0
    for number in range(WHOLE_POINTS if whole else REAL_POINTS) if names else range(1):
        point = {name: _place(name, number, whole, "abs" in kinds) for name in names}
        try:
            if not agree(value(one, point), value(other, point)):
                return False
            found += 1
        except Unknown:
            continue
    return found >= (2 if names else 1)


def value(node: Node, point: dict[str, Fraction]) -> Fraction | Complex:
    """The value of an expression where its variables have the values of `point`. Raises Unknown where it has none."""
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emax=10**6, Emin=-10**6,
                                              traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow])):
        try:
            return _Evaluator(point).value(node)
        except (decimal.DecimalException, ZeroDivisionError) as error:
            raise Unknown(str(error)) from None


def agree(one: Fraction | Complex, other: Fraction | Complex) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emax=10**6, Emin=-10**6)):
        (a, b), (c, d) = _complex(one), _complex(other)
        first, second, apart = max(abs(a), abs(b)), max(abs(c), abs(d)), max(abs(a - c), abs(b - d))
        return apart <= AGREE * max(first, second) or max(first, second) < NOTHING


def proportional(one: Node, other: Node) -> bool:
    """Whether one expression is a constant, not zero, times the other."""
    names = sorted(variables(one) | variables(other))
    ratios = []
    for number in range(REAL_POINTS):
        point = {name: _place(name, number, False, False) for name in names}
        try:
            ratios.append(value(("div", ("num", value(one, point)), ("num", value(other, point))), {}))
        except Unknown:
            return False
    zero = Fraction(0)
    return not agree(ratios[0], zero) and all(agree(ratios[0], ratio) for ratio in ratios[1:])


def variables(node: Node) -> set[str]:
    """Names of the variables, without pi, e and i."""
    if node[0] == "var":
        return set() if node[1] in (r"\pi", "e", "i") else {node[1]}
    return set().union(*(variables(part) for part in node[1:] if isinstance(part, tuple)))


def functions(node: Node) -> set[str]:
    """Names of the functions in an expression, and `binom`."""
    own = {node[1]} if node[0] == "fn" else {"binom"} if node[0] == "binom" else set()
    return own.union(*(functions(part) for part in node[1:] if isinstance(part, tuple)))


def _place(name: str, number: int, whole: bool, signed: bool) -> Fraction:
    """A variable's value at point `number`, the same in every process."""
    draw = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:4], "big")
    if whole:
        return Fraction(2 + draw % 23)
    far = 9 if number % 3 == 2 else 1  # what holds near 1 may not hold beyond
    return Fraction(53 + draw % 150, 101) * far * (-1 if signed and (draw >> 16) % 2 else 1)


class _Evaluator:
    def __init__(self, point: dict[str, Fraction]):
        self.point, self.calls = point, 0

    def value(self, node: Node) -> Fraction | Complex:
        kind, *parts = node
        if kind == "num":
            return parts[0]
        if kind == "var":
            return self.variable(parts[0])
        if kind in ("add", "mul"):
            total = self.value(parts[0])
            for part in parts[1:]:
                total = (_add if kind == "add" else _mul)(total, self.value(part))
            return total
        if kind == "neg":
            return _mul(Fraction(-1), self.value(parts[0]))
        if kind == "div":
            return _div(self.value(parts[0]), self.value(parts[1]))
        if kind == "pow":
            return self.power(self.value(parts[0]), self.value(parts[1]))
        if kind == "root":
            return self.root(self.value(parts[0]), self.value(parts[1]))
        if kind == "binom":
            n, k = (_whole(self.value(part)) for part in parts)
            return _bounded(Fraction(math.comb(n, k)))
        if kind == "fn":
            return self.call(parts[0], self.value(parts[1]))
        raise Unknown(kind)

    def variable(self, name: str) -> Fraction | Complex:
        if name == r"\pi":
            return +PI, Decimal(0)
        if name == "e":
            return Decimal(1).exp(), Decimal(0)
        if name == "i":
            return Decimal(0), Decimal(1)
        return self.point[name]

    def power(self, base: Fraction | Complex, exponent: Fraction | Complex) -> Fraction | Complex:
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            n, bits = exponent.numerator, max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator == 1 and abs(n) * bits <= BITS:
                return base ** n
            if 1 < exponent.denominator < 10 and base > 0 and (exact := _exact_root(base, exponent.denominator)) is not None:
                return self.power(exact, Fraction(n))
        if _is_zero(base):
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Unknown("a power of zero")
        self.called(2)
        return _exp(_mul(exponent, self.log(base)))

    def root(self, degree: Fraction | Complex, inside: Fraction | Complex) -> Fraction | Complex:
        if not isinstance(degree, Fraction) or degree.denominator > 1 or not 1 <= degree <= 100:
            raise Unknown("a root of this degree")
        if isinstance(inside, Fraction) and inside < 0 and degree % 2:
            return _mul(Fraction(-1), self.root(degree, -inside))  # the real one
        if degree == 2 and not isinstance(inside, Fraction) and inside[1] == 0 and inside[0] > 0:
            return inside[0].sqrt(), Decimal(0)
        return self.power(inside, 1 / degree)

    def call(self, name: str, x: Fraction | Complex) -> Fraction | Complex:
        if name == "abs":
            return abs(x) if isinstance(x, Fraction) else (_modulus(x), Decimal(0))
        if name in ("floor", "ceil"):
            return Fraction((math.floor if name == "floor" else math.ceil)(self.real(x)))
        if name == "factorial":
            return _bounded(Fraction(math.factorial(_whole(x))))
        self.called(1)
        z = _complex(x)
        if name == "exp":
            return _exp(z)
        if name == "ln":
            return self.log(z)
        return _TRIGONOMETRY[name](self, z)

    def called(self, times: int) -> None:
        self.calls += times
        if self.calls > CALLS:
            raise Unknown("too many functions")

    def log(self, x: Fraction | Complex) -> Complex:
        a, b = _complex(x)
        if a == b == 0:
            raise Unknown("log 0")
        return _modulus((a, b)).ln(), _angle(a, b)

    def real(self, x: Fraction | Complex) -> Fraction | Decimal:
        """To be rounded: what is whole but for round-off is whole."""
        if isinstance(x, Fraction):
            return x
        if abs(x[1]) > NOTHING or abs(x[0]) > 10**30:
            raise Unknown("rounded")
        near = x[0].to_integral_value()
        return near if abs(x[0] - near) < Decimal("1e-25") else x[0]

    def turned(self, z: Complex) -> tuple[Complex, Complex]:
        """sin z and cos z."""
        up, down = _exp((-z[1], z[0])), _exp((z[1], -z[0]))
        half = Fraction(1, 2)
        return _mul(_div(_sub(up, down), (Decimal(0), Decimal(1))), half), _mul(_add(up, down), half)

    def arcsin(self, z: Complex) -> Complex:
        inside = _sub(Fraction(1), _mul(z, z))
        root = self.power(inside, Fraction(1, 2))
        return _mul((Decimal(0), Decimal(-1)), self.log(_add(_mul((Decimal(0), Decimal(1)), z), root)))


_TRIGONOMETRY = {
    "sin": lambda at, z: at.turned(z)[0],
    "cos": lambda at, z: at.turned(z)[1],
    "tan": lambda at, z: _div(*at.turned(z)),
    "cot": lambda at, z: _div(*at.turned(z)[::-1]),
    "sec": lambda at, z: _div(Fraction(1), at.turned(z)[1]),
    "csc": lambda at, z: _div(Fraction(1), at.turned(z)[0]),
    "arcsin": lambda at, z: at.arcsin(z),
    "arccos": lambda at, z: _sub((PI / 2, Decimal(0)), at.arcsin(z)),
    "arctan": lambda at, z: (_angle(Decimal(1), z[0]), Decimal(0)) if not z[1] else _unknown("arctan"),
    "sinh": lambda at, z: _mul(_sub(_exp(z), _exp(_mul(Fraction(-1), z))), Fraction(1, 2)),
    "cosh": lambda at, z: _mul(_add(_exp(z), _exp(_mul(Fraction(-1), z))), Fraction(1, 2)),
    "tanh": lambda at, z: _div(_sub(_exp(z), _exp(_mul(Fraction(-1), z))), _add(_exp(z), _exp(_mul(Fraction(-1), z)))),
}


def _unknown(what: str) -> None:
    raise Unknown(what)


def _bounded(x: Fraction) -> Fraction:
    if max(x.numerator.bit_length(), x.denominator.bit_length()) > BITS:
        raise Unknown("too large")
    return x


def _whole(x: Fraction | Complex) -> int:
    if not isinstance(x, Fraction) or x.denominator > 1 or not 0 <= x <= 1_500:
        raise Unknown("not a whole number of moderate size")
    return int(x)


def _is_zero(x: Fraction | Complex) -> bool:
    return x == 0 if isinstance(x, Fraction) else max(abs(x[0]), abs(x[1])) < NOTHING


def _complex(x: Fraction | Complex) -> Complex:
    return (Decimal(x.numerator) / Decimal(x.denominator), Decimal(0)) if isinstance(x, Fraction) else x


def _add(x: Fraction | Complex, y: Fraction | Complex) -> Fraction | Complex:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x + y)
    (a, b), (c, d) = _complex(x), _complex(y)
    return a + c, b + d


def _sub(x: Fraction | Complex, y: Fraction | Complex) -> Fraction | Complex:
    return _add(x, _mul(Fraction(-1), y))


def _mul(x: Fraction | Complex, y: Fraction | Complex) -> Fraction | Complex:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x * y)
    (a, b), (c, d) = _complex(x), _complex(y)
    return a * c - b * d, a * d + b * c


def _div(x: Fraction | Complex, y: Fraction | Complex) -> Fraction | Complex:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _bounded(x / y)
    (a, b), (c, d) = _complex(x), _complex(y)
    if _is_zero((c, d)):
        raise Unknown("division by zero")
    size = c * c + d * d
    return (a * c + b * d) / size, (b * c - a * d) / size


def _exact_root(x: Fraction, degree: int) -> Fraction | None:
    """The positive root of a positive fraction where it is a fraction."""
    roots = []
    for part in (x.numerator, x.denominator):
        low, high = 1, 1 << -(-part.bit_length() // degree)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle ** degree >= part else (middle + 1, high)
        if low ** degree != part:
            return None
        roots.append(low)
    return Fraction(*roots)


def _modulus(z: Complex) -> Decimal:
    return abs(z[0]) if not z[1] else (z[0] * z[0] + z[1] * z[1]).sqrt()


def _exp(x: Fraction | Complex) -> Complex:
    a, b = _complex(x)
    size = a.exp()
    sine, cosine = _sine(b), _sine(b + PI / 2)
    return size * cosine, size * sine


def _sine(x: Decimal) -> Decimal:
    if not x:
        return x
    if abs(x) > 10**6:
        raise Unknown("sine of a large number")
    x = x % (2 * PI)
    total, term, n = x, x, 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        term *= -x * x / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


def _angle(a: Decimal, b: Decimal) -> Decimal:
    """The angle of a + ib in (-pi, pi]."""
    if not b:
        return PI if a < 0 else Decimal(0)
    if abs(a) < abs(b):
        return (PI / 2).copy_sign(b) - _arctan(a / b)
    turn = Decimal(0) if a > 0 else PI.copy_sign(b)
    return turn + _arctan(b / a)


def _arctan(x: Decimal) -> Decimal:
    """Of |x| <= 1."""
    for _ in range(3):
        x = x / (1 + (1 + x * x).sqrt())
    total, term, n = x, x, 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        term *= -x * x
        n += 2
        total += term / n
    return 8 * total
