"""The value of a tree at a point: an exact fraction, or else a complex number of 60 digits.

Two expressions are equal if they agree to 40 digits at several fixed points. Operations are counted
before they are done, large ones several times.
"""

from __future__ import annotations

import decimal
import hashlib
import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.work import Work

DIGITS = 60
SAME_WITHIN = Decimal("1e-52")  # relative difference up to which two values are equal
DOUBTFUL_WITHIN = Decimal("1e-40")  # relative difference up to which it cannot be decided
LOST_BELOW = Decimal("1e-45")  # a summand relatively smaller may leave no digit in the sum
ZERO_BELOW = Decimal("1e-50")  # a result of round-off alone is smaller
LEAST_ROUND_OFF = Decimal("1e-70")  # numbers from here to ZERO_BELOW may be round-off
MAX_BITS = 20_000  # of an exact numerator or denominator
REAL_POINTS = 6
INTEGER_POINTS = 8
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
INTEGER_FUNCTIONS = {"factorial", "binom"}  # compared at integers
ROUNDING_FUNCTIONS = {"floor", "ceil"}
COUNT_NAMES = set("jklmnpqMN")  # variables that usually are integers

# operations that a step takes
STEP_COST = 3  # a node of a tree, or a sum or product of numbers
EXPONENTIAL_COST = 25
LOGARITHM_COST = 45
SERIES_COST = 90  # a sine or an angle
ROOT_COST = 15

Complex = tuple[Decimal, Decimal]
Number = Fraction | Complex

_CONSTANTS = (r"\pi", "e", "i")


class Unknown(ArithmeticError):
    """There is no value, or it cannot be decided: undefined, too large, of unknown kind."""


def equal(left: Node, right: Node, work: Work) -> bool:
    """Returns True if two expressions have the same value at every point where both have one.

    Variables take positive values; negative ones too if there is an absolute value; and integers if
    there are factorials or binomials, or if a count is rounded. Raises Unknown if both have a value
    at fewer than two points, or at none if there are no variables.
    """
    left_names = variables(left, work)
    right_names = variables(right, work)
    if bool(left_names) != bool(right_names):
        return False  # `f(0)`, which reads as a product, is not the number 0
    names = sorted(left_names | right_names)
    kinds = functions(left, work) | functions(right, work)
    integers = bool(
        kinds & INTEGER_FUNCTIONS or kinds & ROUNDING_FUNCTIONS and COUNT_NAMES.issuperset(names)
    )
    points = 0
    for number in range(INTEGER_POINTS if integers else REAL_POINTS) if names else range(1):
        point = {name: _variable_value(name, number, integers, "abs" in kinds) for name in names}
        try:
            if not agree(value(left, point, work), value(right, point, work)):
                return False
            points += 1
        except Unknown:
            continue
    if points < (2 if names else 1):
        raise Unknown("no point at which both have a value")
    return True


def value(node: Node, point: dict[str, Fraction], work: Work) -> Number:
    """Returns the value of an expression at `point`. Raises Unknown if it has none."""
    with decimal.localcontext(
        decimal.Context(
            prec=DIGITS,
            Emax=10**6,
            Emin=-(10**6),
            traps=[
                decimal.InvalidOperation,
                decimal.DivisionByZero,
                decimal.Overflow,
                decimal.Underflow,
            ],
        )
    ):
        try:
            return _Evaluator(point, work).value(node)
        except (decimal.DecimalException, ZeroDivisionError) as error:
            raise Unknown(str(error)) from None


def agree(left: Number, right: Number) -> bool:
    """Returns True if two values are equal apart from round-off.

    Raises Unknown if both may be nothing but round-off, or differ by little more than it.
    """
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emax=10**6, Emin=-(10**6))):
        (a, b), (c, d) = _complex(left), _complex(right)
        first = max(abs(a), abs(b))
        second = max(abs(c), abs(d))
        difference = max(abs(a - c), abs(b - d))
        if difference <= SAME_WITHIN * max(first, second):
            return True
        if max(first, second) >= ZERO_BELOW and difference <= DOUBTFUL_WITHIN * max(first, second):
            raise Unknown("equal in all but the last digits")
        if max(first, second) >= ZERO_BELOW:
            return False
        if max(first, second) < LEAST_ROUND_OFF:
            return False
        if first and second:
            raise Unknown("round-off beside round-off")
        return True


def proportional(left: Node, right: Node, work: Work, positive: bool = False) -> bool:
    """Returns True if one expression is a constant other than zero times the other.

    With `positive` the constant must be positive.
    """
    names = sorted(variables(left, work) | variables(right, work))
    ratios = []
    for number in range(REAL_POINTS):
        point = {name: _variable_value(name, number, False, False) for name in names}
        parts = ("num", value(left, point, work)), ("num", value(right, point, work))
        ratios.append(value(("div", *parts), {}, work))
    first = ratios[0]
    if agree(first, Fraction(0)) or not all(agree(first, ratio) for ratio in ratios[1:]):
        return False
    return not positive or (first > 0 if isinstance(first, Fraction) else first[0] > 0)


def variables(node: Node, work: Work) -> set[str]:
    """Returns the names of the variables, without pi, e and i."""
    names = {part[1] for part in _nodes(node, work) if part[0] == "var"}
    return names.difference(_CONSTANTS)


def functions(node: Node, work: Work) -> set[str]:
    """Returns the names of the functions in an expression, `binom` included."""
    calls = [part for part in _nodes(node, work) if part[0] in ("fn", "binom")]
    return {part[1] if part[0] == "fn" else "binom" for part in calls}


def _nodes(node: Node, work: Work) -> Iterator[Node]:
    """Returns an iterator over a node and all nodes in it."""
    left = [node]
    while left:
        work.spend(1)
        node = left.pop()
        if isinstance(node[0], str):
            yield node
        parts = [part for part in node if type(part) is tuple and part]
        left.extend(part for part in parts if not isinstance(part[0], Decimal))


def _variable_value(name: str, number: int, integers: bool, signed: bool) -> Fraction:
    """Returns a variable's value at point `number`, the same in every process."""
    draw = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:4], "big")
    if integers:
        return Fraction(2 + draw % 23)
    far = 9 if number % 3 == 2 else 1  # expressions may agree near 1 alone
    return Fraction(53 + draw % 150, 101) * far * (-1 if signed and (draw >> 16) % 2 else 1)


class _Evaluator:
    """Computes values at one point.

    Methods raise Unknown if there is no value, and Unreadable if it takes too much work.
    """

    def __init__(self, point: dict[str, Fraction], work: Work):
        self.point = point
        self.work = work

    def value(self, node: Node) -> Number:
        """Returns the value of a node."""
        self.work.spend(STEP_COST)
        kind, *parts = node
        if kind == "num":
            return parts[0]
        if kind == "var":
            return self.variable(parts[0])
        if kind in ("add", "mul"):
            combine = self.add if kind == "add" else self.mul
            total = self.value(parts[0])
            for part in parts[1:]:
                total = combine(total, self.value(part))
            return total
        if kind == "neg":
            return self.negative(self.value(parts[0]))
        if kind in ("div", "ratio") and len(parts) == 2:
            return self.div(self.value(parts[0]), self.value(parts[1]))
        if kind == "pow":
            return self.power(self.value(parts[0]), self.value(parts[1]))
        if kind == "root":
            return self.root(self.value(parts[0]), self.value(parts[1]))
        if kind == "binom":
            n, k = (self.small_integer(self.value(part)) for part in parts)
            return self.exact(math.comb(n, k))
        if kind == "fn":
            return self.call(parts[0], self.value(parts[1]))
        if kind == "det":
            return self.determinant(parts)
        raise Unknown(kind)

    def variable(self, name: str) -> Number:
        """Returns the value of a constant or a variable."""
        if name == r"\pi":
            return +PI, Decimal(0)
        if name == "e":
            return Decimal(1).exp(), Decimal(0)
        if name == "i":
            return Decimal(0), Decimal(1)
        if name not in self.point:
            raise Unknown(name)
        return self.point[name]

    # --- arithmetic

    def spend_for(self, *numbers: Fraction) -> None:
        """Counts an operation on exact numbers, which mostly takes a greatest common divisor."""
        sizes = [part.bit_length() for x in numbers for part in (x.numerator, x.denominator)]
        self.work.spend(STEP_COST + sum(sizes) // 200 + max(sizes) ** 2 // 400_000)

    def exact(self, x: Fraction | int) -> Fraction:
        """Returns a fraction. Raises Unknown if it has more than MAX_BITS."""
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Unknown("too large")
        return Fraction(x)

    def complex(self, x: Number) -> Complex:
        """Returns a number as a complex one."""
        if isinstance(x, Fraction):
            self.spend_for(x)
        return _complex(x)

    def add(self, x: Number, y: Number) -> Number:
        """Returns x + y."""
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            self.spend_for(x, y)
            return self.exact(x + y)
        self.work.spend(STEP_COST)
        (a, b), (c, d) = self.complex(x), self.complex(y)
        for left, right in ((a, c), (b, d)):
            small, large = sorted((abs(left), abs(right)))
            if ZERO_BELOW < small < LOST_BELOW * large:
                raise Unknown("a summand is lost beside another")
        return a + c, b + d

    def negative(self, x: Number) -> Number:
        """Returns -x."""
        return -x if isinstance(x, Fraction) else (-x[0], -x[1])

    def sub(self, x: Number, y: Number) -> Number:
        """Returns x - y."""
        return self.add(x, self.negative(y))

    def mul(self, x: Number, y: Number) -> Number:
        """Returns x * y."""
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            self.spend_for(x, y)
            return self.exact(x * y)
        self.work.spend(STEP_COST)
        (a, b), (c, d) = self.complex(x), self.complex(y)
        return a * c - b * d, a * d + b * c

    def div(self, x: Number, y: Number) -> Number:
        """Returns x / y."""
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            self.spend_for(x, y)
            return self.exact(x / y)
        self.work.spend(2 * STEP_COST)
        (a, b), (c, d) = self.complex(x), self.complex(y)
        if _is_zero((c, d)):
            raise Unknown("division by zero")
        size = c * c + d * d
        return (a * c + b * d) / size, (b * c - a * d) / size

    def power(self, base: Number, exponent: Number) -> Number:
        """Returns a power: exact if it is a fraction, else the principal value."""
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            n = exponent.numerator
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator == 1 and abs(n) * bits <= MAX_BITS:
                self.work.spend(STEP_COST + abs(n) * bits // 200)
                return base**n
            if 1 < exponent.denominator < 10 and base > 0:
                self.work.spend(ROOT_COST + bits // 10 + bits**2 // 100_000)
                if (exact := _exact_root(base, exponent.denominator)) is not None:
                    return self.power(exact, Fraction(n))
        if _is_zero(base):
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Unknown("a power of zero")
        return self.exp(self.mul(exponent, self.log(base)))

    def root(self, degree: Number, inside: Number) -> Number:
        """Returns a root; the real one if the degree is odd and `inside` is negative."""
        if not isinstance(degree, Fraction) or degree.denominator > 1 or not 1 <= degree <= 100:
            raise Unknown("a root of this degree")
        if isinstance(inside, Fraction) and inside < 0 and degree % 2:
            return self.negative(self.root(degree, -inside))  # the real one
        if degree == 2 and not isinstance(inside, Fraction) and inside[1] == 0 and inside[0] > 0:
            self.work.spend(ROOT_COST)
            return inside[0].sqrt(), Decimal(0)
        return self.power(inside, 1 / degree)

    def determinant(self, rows: list[tuple[Node, ...]]) -> Number:
        """Returns the determinant of at most four rows, by expansion along the first row."""
        if not 1 <= len(rows) <= 4 or any(len(row) != len(rows) for row in rows):
            raise Unknown("no determinant, or a large one")
        if len(rows) == 1:
            return self.value(rows[0][0])
        total: Number = Fraction(0)
        for column, cell in enumerate(rows[0]):
            minor = [row[:column] + row[column + 1 :] for row in rows[1:]]
            part = self.mul(self.value(cell), self.determinant(minor))
            total = self.sub(total, part) if column % 2 else self.add(total, part)
        return total

    # --- functions

    def call(self, name: str, x: Number) -> Number:
        """Returns the value of a function at x."""
        if name == "abs":
            return abs(x) if isinstance(x, Fraction) else (self.modulus(x), Decimal(0))
        if name in ("floor", "ceil"):
            return Fraction((math.floor if name == "floor" else math.ceil)(self.real(x)))
        if name == "factorial":
            return self.exact(math.factorial(self.small_integer(x)))
        z = self.complex(x)
        if name == "exp":
            return self.exp(z)
        if name == "ln":
            return self.log(z)
        return _OF_COMPLEX[name](self, z)

    def small_integer(self, x: Number) -> int:
        """Returns x as an integer from 0 to 1500."""
        if not isinstance(x, Fraction) or x.denominator > 1 or not 0 <= x <= 1_500:
            raise Unknown("not a whole number of moderate size")
        self.work.spend(STEP_COST + int(x) // 10)
        return int(x)

    def real(self, x: Number) -> Fraction | Decimal:
        """Returns a real number to be rounded: an integer apart from round-off is that integer."""
        if isinstance(x, Fraction):
            self.spend_for(x)
            return x
        if abs(x[1]) > ZERO_BELOW or abs(x[0]) > 10**30:
            raise Unknown("rounded")
        near = x[0].to_integral_value()
        return near if abs(x[0] - near) < Decimal("1e-25") else x[0]

    def modulus(self, z: Complex) -> Decimal:
        """Returns |z|."""
        if not z[1]:
            return abs(z[0])
        self.work.spend(ROOT_COST)
        return (z[0] * z[0] + z[1] * z[1]).sqrt()

    def exp(self, x: Number) -> Complex:
        """Returns e to the power of x."""
        a, b = self.complex(x)
        self.work.spend(EXPONENTIAL_COST)
        size = a.exp()
        return size * self.series_cosine(b), size * self.series_sine(b)

    def log(self, x: Number) -> Complex:
        """Returns the principal logarithm."""
        a, b = self.complex(x)
        if a == b == 0:
            raise Unknown("log 0")
        self.work.spend(LOGARITHM_COST)
        return self.modulus((a, b)).ln(), self.angle(a, b)

    def sin(self, z: Complex) -> Complex:
        return self.sine_and_cosine(z)[0]

    def cos(self, z: Complex) -> Complex:
        return self.sine_and_cosine(z)[1]

    def tan(self, z: Complex) -> Number:
        return self.div(*self.sine_and_cosine(z))

    def cot(self, z: Complex) -> Number:
        sine, cosine = self.sine_and_cosine(z)
        return self.div(cosine, sine)

    def sec(self, z: Complex) -> Number:
        return self.div(Fraction(1), self.cos(z))

    def csc(self, z: Complex) -> Number:
        return self.div(Fraction(1), self.sin(z))

    def sine_and_cosine(self, z: Complex) -> tuple[Number, Number]:
        """Returns sin z and cos z."""
        if not z[1]:
            return (self.series_sine(z[0]), Decimal(0)), (self.series_cosine(z[0]), Decimal(0))
        up = self.exp((-z[1], z[0]))
        down = self.exp((z[1], -z[0]))
        sine = self.div(self.sub(up, down), (Decimal(0), Decimal(2)))
        return sine, self.div(self.add(up, down), Fraction(2))

    def arcsin(self, z: Complex) -> Number:
        root = self.power(self.sub(Fraction(1), self.mul(z, z)), Fraction(1, 2))
        i = Decimal(0), Decimal(1)
        return self.mul(self.negative(i), self.log(self.add(self.mul(i, z), root)))

    def arccos(self, z: Complex) -> Number:
        return self.sub((PI / 2, Decimal(0)), self.arcsin(z))

    def arctan(self, z: Complex) -> Number:
        if z[1]:
            raise Unknown("arctan")
        return self.angle(Decimal(1), z[0]), Decimal(0)

    def sinh(self, z: Complex) -> Number:
        return self.div(self.sub(self.exp(z), self.exp(self.negative(z))), Fraction(2))

    def cosh(self, z: Complex) -> Number:
        return self.div(self.add(self.exp(z), self.exp(self.negative(z))), Fraction(2))

    def tanh(self, z: Complex) -> Number:
        return self.div(self.sinh(z), self.cosh(z))

    def series_cosine(self, x: Decimal) -> Decimal:
        """Returns the cosine of a real number."""
        return self.series_sine(x + PI / 2) if x else Decimal(1)

    def series_sine(self, x: Decimal) -> Decimal:
        """Returns the sine of a real number, by its power series."""
        if not x:
            return x
        if abs(x) > 10**6:
            raise Unknown("sine of a large number")
        self.work.spend(SERIES_COST)
        x = x % (2 * PI)
        total = x
        term = x
        n = 1
        while abs(term) > Decimal(10) ** -(DIGITS + 5):
            term *= -x * x / ((n + 1) * (n + 2))
            total = total + term
            n = n + 2
        return total

    def angle(self, a: Decimal, b: Decimal) -> Decimal:
        """Returns the angle of a + ib in (-pi, pi]."""
        if not b:
            return PI if a < 0 else Decimal(0)
        self.work.spend(SERIES_COST)
        if abs(a) < abs(b):
            return (PI / 2).copy_sign(b) - _arctan(a / b)
        turn = Decimal(0) if a > 0 else PI.copy_sign(b)
        return turn + _arctan(b / a)


_OF_COMPLEX = {
    "sin": _Evaluator.sin,
    "cos": _Evaluator.cos,
    "tan": _Evaluator.tan,
    "cot": _Evaluator.cot,
    "sec": _Evaluator.sec,
    "csc": _Evaluator.csc,
    "arcsin": _Evaluator.arcsin,
    "arccos": _Evaluator.arccos,
    "arctan": _Evaluator.arctan,
    "sinh": _Evaluator.sinh,
    "cosh": _Evaluator.cosh,
    "tanh": _Evaluator.tanh,
}


def _is_zero(x: Number) -> bool:
    """Returns True if a number is zero apart from round-off."""
    return x == 0 if isinstance(x, Fraction) else max(abs(x[0]), abs(x[1])) < ZERO_BELOW


def _complex(x: Number) -> Complex:
    """Returns a number as a pair of decimals, its real and imaginary part."""
    if isinstance(x, Fraction):
        return Decimal(x.numerator) / Decimal(x.denominator), Decimal(0)
    return x


def _exact_root(x: Fraction, degree: int) -> Fraction | None:
    """Returns the positive root of a positive fraction, or None if it is no fraction."""
    top = _whole_root(x.numerator, degree)
    bottom = _whole_root(x.denominator, degree)
    root = Fraction(top, bottom)
    return root if root**degree == x else None


def _whole_root(n: int, degree: int) -> int:
    """Returns the root of a positive integer, rounded down, by Newton's method from above."""
    root = 1 << -(-n.bit_length() // degree)
    while (lower := ((degree - 1) * root + n // root ** (degree - 1)) // degree) < root:
        root = lower
    return root


def _arctan(x: Decimal) -> Decimal:
    """Returns the arctangent of a number from -1 to 1."""
    for _ in range(3):
        x = x / (1 + (1 + x * x).sqrt())
    total = x
    term = x
    n = 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        term *= -x * x
        n += 2
        total += term / n
    return 8 * total
