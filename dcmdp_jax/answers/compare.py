r"""Whether two answers are equal, different, or of a form that is not read here.

Numbers, fractions, decimals and expressions are equal where their values are; 0.33 is not 1/3.
Top-level lists and sets are unordered, tuples and intervals ordered, with brackets that match; `1
\pm x` is two answers. Sets of real numbers are equal whether written as intervals, inequalities, by
what they leave out or by a condition. `x = 5`, `m + n = 5` and `\text{Area} = 5` equal 5, and `f(x)
= 2x` equals `2x`; `x = 5, y = 3` and `y = 3, x = 5` are `5, 3` in this order; two equations are
equal where they are multiples of each other. A row or a column equals the tuple of its entries.
Units are converted where both sides have known ones and left out where one has none; 50\% is 50 and
1/2. Ratios are equal where they are proportional, times of day where they are the same. Words are
equal but for case. Digits in a base, `52_8`, are a name of their own.
"""

from __future__ import annotations

import enum
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from dcmdp_jax.answers import units, values
from dcmdp_jax.answers.cursor import Node
from dcmdp_jax.answers.domains import MIRRORED, describes, domain
from dcmdp_jax.answers.names import is_curve, named_value, spread
from dcmdp_jax.answers.read import read
from dcmdp_jax.answers.tokens import plain
from dcmdp_jax.answers.work import Unreadable, Work

PAIR = 10  # operations that a pair of elements takes to be looked at
_SETS = ("group", "union", "set", "reals", "without", "such", "both", "either", "rel")
_NO_EXPRESSION = (*_SETS, "matrix", "text")


class Verdict(enum.Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNREADABLE = "cannot read"


def compare(gold: str, answer: str) -> Verdict:
    """Compares two answers by what is read here alone, at a cost that is bounded in advance (see
    `work`).

    Returns EQUAL where both are spelled alike but for what only changes the looks, or have one
    value. Returns DIFFERENT where one of them is empty, or where both are read and have different
    values. Returns UNREADABLE where one of them is of no known form, or where comparing them has no
    result or would cost too much.
    """
    spelled = plain(gold), plain(answer)
    if not all(spelled):
        return Verdict.DIFFERENT
    if spelled[0] == spelled[1]:
        return Verdict.EQUAL
    work = Work()
    try:
        same = _Comparison(work).same(read(gold, work), read(answer, work))
    except (Unreadable, values.Unknown):
        return Verdict.UNREADABLE
    return Verdict.EQUAL if same else Verdict.DIFFERENT


def equal(gold: str, answer: str) -> bool:
    """True if `compare` finds `answer` equal to `gold`."""
    return compare(gold, answer) is Verdict.EQUAL


class _Comparison:
    """Compares trees. Its methods raise Unknown where they cannot tell, and Unreadable where the
    work is too much."""

    def __init__(self, work: Work):
        self.work = work

    def same(self, one: Node, other: Node) -> bool:
        one = spread(one)
        other = spread(other)
        if (describes(one) or describes(other)) and (found := self.domains(one, other)) is not None:
            return found
        if (found := self.in_order(one, other)) is not None:
            return found
        return self.matched(_items(one), _items(other))

    def domains(self, one: Node, other: Node) -> bool | None:
        """Whether two sets of real numbers are equal; None where they are not two such sets."""
        names = [self.names(node) for node in (one, other)]
        if all(names) and names[0] != names[1]:
            return None
        ones = domain(one, self.work)
        others = domain(other, self.work)
        return None if ones is None or others is None else ones == others

    def names(self, node: Node) -> set[str]:
        """The variables of a node but for those that only a set's condition has."""
        if node[0] == "such":
            return set()
        return values.variables(node, self.work) - {r"\infty"}

    def in_order(self, one: Node, other: Node) -> bool | None:
        """Whether the values of several names, as in `x = 5, y = 3`, are those of a bare list or
        tuple in its order; None where the two are not such. Names that follow each other in the
        alphabet are in its order."""
        for named, bare in ((one, other), (other, one)):
            if named[0] != "list" or bare[0] not in ("list", "group", "set"):
                continue
            items = bare[3:] if bare[0] == "group" else bare[1:]
            if not _has_different_names(named[1:]) or any(item[0] == "rel" for item in items):
                continue
            if bare[0] == "set" or bare[0] == "group" and bare[1:3] != ("(", ")"):
                return False  # has no order, or is an interval
            return self.pairwise([item[3] for item in _by_name(named[1:])], items)
        return None

    def pairwise(self, ones: Sequence[Node], others: Sequence[Node]) -> bool:
        """Whether items are equal one by one."""
        if len(ones) != len(others):
            return False
        unknown = None
        for one, other in zip(ones, others):
            try:
                if not self.same(one, other):
                    return False
            except values.Unknown as error:
                unknown = error
        if unknown:
            raise unknown
        return True

    def matched(self, ones: Sequence[Node], others: Sequence[Node]) -> bool:
        """Whether the items pair off, in whatever order."""
        if len(ones) != len(others):
            return False
        alike = Counter(ones) & Counter(others)
        left = _rest(others, alike)
        unknown = None
        for one in _rest(ones, alike):
            for i, other in enumerate(left):
                self.work.spend(PAIR)
                try:
                    if self.element(one, other):
                        del left[i]
                        break
                except values.Unknown as error:
                    unknown = error
            else:
                if unknown:
                    raise unknown
                return False
        return True

    def element(self, one: Node, other: Node) -> bool:
        """Of a list: neither is one."""
        if one[0] == other[0] == "rel":
            return self.relations(one, other)
        if "rel" in (one[0], other[0]):
            if one[0] == "rel" and is_curve(one, self.work):
                return False
            relation, bare = (one, other) if one[0] == "rel" else (other, one)
            return self.relation_and_value(relation, bare)
        if "text" in (one[0], other[0]):
            return _letters(one) == _letters(other) != ""
        if one[0] == other[0] == "group":
            return one[1:3] == other[1:3] and self.pairwise(one[3:], other[3:])
        if one[0] == other[0] == "union":
            return self.matched(one[1:], other[1:])
        if one[0] == other[0] == "set":
            return self.same(one, other)
        if one[0] == other[0] == "matrix":
            shapes = [list(map(len, node[1:])) for node in (one, other)]
            cells = [[cell for row in node[1:] for cell in row] for node in (one, other)]
            return shapes[0] == shapes[1] and self.pairwise(*cells)
        if "qualified" in (one[0], other[0]):
            return one[0] == other[0] and one[2] == other[2] and self.same(one[1], other[1])
        kinds = {one[0], other[0]}
        if "residue" in kinds:
            return kinds == {"residue"} and self.residues(one, other)
        if kinds == {"group", "matrix"} and (vector := _vector(one, other)):
            return self.pairwise(*vector)
        if kinds == {"group", "matrix"} or kinds.issubset(_SETS):
            raise values.Unknown("two forms of a set or a vector")
        if _is_compound(one) or _is_compound(other):
            raise values.Unknown("an expression of sets or matrices")
        if kinds.intersection(_NO_EXPRESSION):
            return False
        return self.quantities(one, other)

    def quantities(self, one: Node, other: Node) -> bool:
        """Values with units, percentages, and plain values."""
        a, u = self.measured(one)
        b, v = self.measured(other)
        if not _holds(one, "quantity") and not _holds(other, "quantity"):
            u = v = None  # `5 m` alone is a product
        if u is not None and v is not None:
            if u.powers != v.powers:
                return False
            if (u.factor, u.pi) != (v.factor, v.pi):
                a = _in_base_units(a, u)
                b = _in_base_units(b, v)
        if u is not None or v is not None:
            one = a
            other = b
        if "ratio" in (one[0], other[0]) or "clock" in (one[0], other[0]):
            return self.ratios(one, other)
        if "percent" in (one[0], other[0]) and one[0] != other[0]:
            share, bare = (one[1], other) if one[0] == "percent" else (other[1], one)
            part = ("div", share, ("num", Fraction(100)))
            return values.equal(share, bare, self.work) or values.equal(part, bare, self.work)
        if one[0] == "percent":
            one = one[1]
            other = other[1]
        return values.equal(one, other, self.work)

    def measured(self, node: Node) -> tuple[Node, units.Unit | None]:
        """A value and its unit. Beside a quantity, the letter of `5 m` or `5 m^2` is one, too."""
        if node[0] == "quantity":
            return node[1:]
        if node[0] == "neg":
            value, unit = self.measured(node[1])
            return ("neg", value), unit
        if node[0] == "add" and any(part[0] == "quantity" for part in node[1:]):
            return self.measured_sum(node[1:])
        value, letters = _lettered(node)
        if letters and not values.variables(value, self.work):
            unit = units.read(letters)
            if unit is not None and unit.known:
                return value, unit
        return node, None

    def measured_sum(self, parts: Sequence[Node]) -> tuple[Node, units.Unit | None]:
        """`6 ft + 2 in`; a part without a unit has that of the others, if they have one alone."""
        measured = [self.measured(part) for part in parts]
        found = [unit for _, unit in measured if unit is not None]
        if all(unit == found[0] for unit in found):
            return ("add", *(value for value, _ in measured)), found[0]
        if len(found) < len(parts) or any(unit.powers != found[0].powers for unit in found):
            raise values.Unknown("a sum of several units")
        total = "add", *(_in_base_units(value, unit) for value, unit in measured)
        return total, units.Unit(found[0].powers, Fraction(1), 0, True)

    def ratios(self, one: Node, other: Node) -> bool:
        """`3:2` equals `6:4`, and `3/2`; of times of day, each equals itself alone."""
        one, other = (node[1] if node[0] == "quantity" else node for node in (one, other))
        kinds = {one[0], other[0]}
        if "clock" in kinds:
            return one == other
        if kinds != {"ratio"}:
            ratio, bare = (one, other) if one[0] == "ratio" else (other, one)
            return len(ratio) == 3 and self.quantities(("div", *ratio[1:]), bare)
        if len(one) != len(other):
            return False
        return all(
            values.equal(("mul", a, other[1]), ("mul", b, one[1]), self.work)
            for a, b in zip(one[2:], other[2:])
        )

    def residues(self, one: Node, other: Node) -> bool:
        """`3 mod 5` equals `8 mod 5`."""
        if not values.equal(one[2], other[2], self.work):
            return False
        difference = "add", one[1], ("neg", other[1])
        turns = values.value(("div", difference, one[2]), {}, self.work)
        return isinstance(turns, Fraction) and turns.denominator == 1

    # --- relations

    def relations(self, one: Node, other: Node) -> bool:
        """Two equations, inequalities, or memberships."""
        if one[1] == other[1] == "=":
            return self.equations(one, other)
        if "in" in (one[1], other[1]):
            return self.same(*(node[3] if node[1] == "in" else node for node in (one, other)))
        if "=" in (one[1], other[1]) or len(one) != len(other):
            return False
        one = _rising(one)
        other = _rising(other)
        if one[1] != other[1]:
            return False
        if " " in one[1]:
            return self.pairwise(one[2:], other[2:])
        differences = [("add", side[2], ("neg", side[3])) for side in (one, other)]
        return values.proportional(*differences, self.work, positive=one[1] != "!=")

    def equations(self, one: Node, other: Node) -> bool:
        lefts = one[2], other[2]
        if lefts[0][0] == lefts[1][0] == "applied":
            renamed = other[3]
            for new, old in zip(lefts[0][2:], lefts[1][2:]):
                renamed = _renamed(renamed, old, new)
            alike = lefts[0][1] == lefts[1][1] and len(lefts[0]) == len(lefts[1])
            return alike and self.same(one[3], renamed)
        if lefts[0] == lefts[1]:
            return self.same(one[3], other[3])
        if "applied" not in (lefts[0][0], lefts[1][0]) and self.same(*lefts):
            return self.same(one[3], other[3])
        differences = [("add", side[2], ("neg", side[3])) for side in (one, other)]
        return values.proportional(*differences, self.work)

    def relation_and_value(self, relation: Node, bare: Node) -> bool:
        _, operator, left, right, *middle = relation
        if operator == "in":
            return self.same(right, bare)
        if operator == "=":
            value = named_value(relation, self.work)
            constant = not values.variables(relation, self.work)
            if value is None and constant and self.same(left, right):
                value = right  # `2 + 3 = 5`
            return value is not None and self.same(value, bare)
        if bare[0] not in _SETS:
            return False
        if middle and middle[0][0] == "var":
            _, operator, low, high, _ = _rising(relation)
            below, above = operator.split()
            opening = "[" if below == "<=" else "("
            closing = "]" if above == "<=" else ")"
            return self.element(("group", opening, closing, low, high), bare)
        raise values.Unknown("an inequality and a set")


def _vector(one: Node, other: Node) -> tuple[Sequence[Node], Sequence[Node]] | None:
    """The entries of a tuple and of a row or a column; None where they are another pair."""
    tuple_, matrix = (one, other) if one[0] == "group" else (other, one)
    rows = matrix[1:]
    if tuple_[1:3] != ("(", ")") or len(rows) > 1 and any(len(row) > 1 for row in rows):
        return None
    return tuple_[3:], [cell for row in rows for cell in row]


def _rest(items: Sequence[Node], taken: Counter[Node]) -> list[Node]:
    """The items without those that are taken, as often as they are."""
    left = Counter(taken)
    rest = []
    for item in items:
        if left[item]:
            left[item] -= 1
        else:
            rest.append(item)
    return rest


def _items(node: Node) -> list[Node]:
    """The answers that a list, a set or a `\\pm` holds, or the one that it is."""
    items = list(node[1:]) if node[0] in ("list", "set") else [node]
    items = [item for item in items if not _is_of_whole_numbers(item)] or items
    return [way for item in items for way in _ways(item)]


def _is_of_whole_numbers(node: Node) -> bool:
    r"""True of `k \in \mathbb{Z}` behind an answer with a `k`."""
    if node[:2] != ("rel", "in") or node[3][0] != "var":
        return False
    return node[3][1] in (r"\mathbb{Z}", r"\mathbb{N}")


def _ways(node: Node) -> list[Node]:
    """A node without `\\pm`: two of them, where it has any."""
    if not _holds(node, "pm", "mp"):
        return [node]
    return [_chosen(node, upper) for upper in (True, False)]


def _holds(node: Node, *kinds: str) -> bool:
    return node[0] in kinds or any(_holds(part, *kinds) for part in node[1:] if type(part) is tuple)


def _chosen(node: Node, upper: bool) -> Node:
    """A node with the upper signs of `\\pm` and `\\mp`, or the lower ones."""
    if node[0] in ("pm", "mp"):
        inner = _chosen(node[1], upper)
        return inner if upper == (node[0] == "pm") else ("neg", inner)
    return tuple(_chosen(part, upper) if type(part) is tuple else part for part in node)


def _renamed(node: Node, old: str, new: str) -> Node:
    if node == ("var", old):
        return "var", new
    return tuple(_renamed(part, old, new) if type(part) is tuple else part for part in node)


def _has_different_names(items: Sequence[Node]) -> bool:
    """True if items are equations that each name a value, of more than one name."""
    names = {item[2] for item in items if item[:2] == ("rel", "=")}
    return len(names) == len(items) > 1


def _by_name(equations: Sequence[Node]) -> Sequence[Node]:
    """Equations as they are written, or in the order of the alphabet if it has their names in a
    row, such as x, y and z."""
    names = [equation[2][1] for equation in equations if equation[2][0] == "var"]
    if len(names) == len(equations) and "".join(sorted(names)) in string.ascii_letters:
        return sorted(equations, key=lambda equation: equation[2][1])
    return equations


def _is_compound(node: Node) -> bool:
    """True of sums, products and powers that hold a matrix, a tuple or a set: they are not computed
    here."""
    computed = node[0] in ("add", "mul", "div", "neg", "pow", "fn")
    return computed and _holds(node, "matrix", "group", "set")


def _rising(relation: Node) -> Node:
    """An inequality with `<` or `<=` for `>` or `>=`."""
    kind, operator, left, right, *middle = relation
    if operator[0] != ">":
        return relation
    mirrored = " ".join(MIRRORED[sign] for sign in reversed(operator.split()))
    return kind, mirrored, right, left, *middle


def _in_base_units(value: Node, unit: units.Unit) -> Node:
    return "mul", value, ("num", unit.factor), ("pow", ("var", r"\pi"), ("num", Fraction(unit.pi)))


def _lettered(node: Node) -> tuple[Node, str]:
    """A value and the letters that stand behind it as factors and divisors, such as `m/s^2`."""
    letters = ""
    while node[0] in ("div", "mul") and len(node) > 2 and (letter := _letter(node[-1])):
        if node[0] == "mul":
            return (node[1] if len(node) == 3 else node[:-1]), letter + letters
        letters = f"/{letter}{letters}"
        node = node[1]
    return node, ""


def _letter(node: Node) -> str:
    """A variable, or one to the power of a number, as it is written; "" for anything else."""
    if node[0] == "pow" and node[1][0] == "var" and node[2][0] == "num":
        return f"{node[1][1]}^{node[2][1]}"
    return node[1] if node[0] == "var" else ""


def _letters(node: Node) -> str:
    """The word that a text, or a product of variables, spells."""
    if node[0] == "text":
        return node[1]
    if node[0] == "var":
        return node[1].casefold()
    if node[0] == "mul":
        parts = [_letters(part) for part in node[1:]]
        return "".join(parts) if all(parts) else ""
    return ""
