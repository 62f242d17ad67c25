r"""Decides whether two answers are equal, different, or of a form that is not read here.

Numbers, fractions, decimals and expressions are equal if their values are; 0.33 is not 1/3.
Top-level lists and sets are unordered; tuples and intervals are ordered, and their brackets must
match. `1 \pm x` is two answers. Sets of real numbers are equal whether they are written as
intervals, as inequalities, by a condition, or by what they leave out. `x = 5`, `m + n = 5` and
`\text{Area} = 5` equal 5, and `f(x) = 2x` equals `2x`; `x = 5, y = 3` and `y = 3, x = 5` equal `5,
3` in this order. Two equations are equal if they are multiples of each other. A row or a column
equals the tuple of its entries. Units are converted if both sides have units that are known, and
ignored if one side has none; 50\% equals 50 and 1/2. Ratios are equal if they are proportional,
times of day if they are the same, words if they differ in case alone. Digits in a base, `52_8`, are
compared as a name.
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
from dcmdp_jax.answers.names import expand, is_curve, named_value
from dcmdp_jax.answers.read import read
from dcmdp_jax.answers.tokens import plain
from dcmdp_jax.answers.work import Unreadable, Work

PAIR_COST = 10  # operations to look at a pair of elements
_SETS = ("group", "union", "set", "reals", "without", "such", "both", "either", "rel")
_NO_EXPRESSION = (*_SETS, "matrix", "text")


class Verdict(enum.Enum):
    """The result of a comparison."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNREADABLE = "cannot read"


def compare(gold: str, answer: str) -> Verdict:
    """Returns the verdict on two answers, from what is read here alone, at a bounded cost (see
    `work`).

    EQUAL: both are spelled alike apart from layout, or have one value. DIFFERENT: one of them is
    empty, or both are read and have different values. UNREADABLE: one of them is of an unknown
    form, or the comparison has no result or would cost too much.
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
    """Returns True if `compare` returns EQUAL."""
    return compare(gold, answer) is Verdict.EQUAL


class _Comparison:
    """Compares trees, and counts the work.

    Its methods return True if two trees are equal as what the name says. They raise Unknown if that
    cannot be decided, and Unreadable if it takes too much work.
    """

    def __init__(self, work: Work):
        self.work = work

    def same(self, gold: Node, answer: Node) -> bool:
        """Compares two answers: sets of numbers, named values, or unordered lists of elements."""
        gold = expand(gold)
        answer = expand(answer)
        verdict = None
        if describes(gold) or describes(answer):
            verdict = self.same_domain(gold, answer)
        if verdict is None:
            verdict = self.same_in_order(gold, answer)
        if verdict is not None:
            return verdict
        return self.same_unordered(_items(gold), _items(answer))

    def same_domain(self, gold: Node, answer: Node) -> bool | None:
        """Compares two sets of real numbers. Returns None if one of them is no such set."""
        names = [self.names(node) for node in (gold, answer)]
        if all(names) and names[0] != names[1]:
            return None
        golds = domain(gold, self.work)
        answers = domain(answer, self.work)
        return None if golds is None or answers is None else golds == answers

    def names(self, node: Node) -> set[str]:
        """Returns the variables of a node, without those that only a set's condition has."""
        if node[0] == "such":
            return set()
        return values.variables(node, self.work) - {r"\infty"}

    def same_in_order(self, gold: Node, answer: Node) -> bool | None:
        """Compares the values of several names, as in `x = 5, y = 3`, with a bare list or tuple.

        The names' order counts; it is the alphabet's if the names follow each other in it. Returns
        None if the two are not such a pair.
        """
        for named, bare in ((gold, answer), (answer, gold)):
            if named[0] != "list" or bare[0] not in ("list", "group", "set"):
                continue
            items = bare[3:] if bare[0] == "group" else bare[1:]
            if not _has_different_names(named[1:]) or any(item[0] == "rel" for item in items):
                continue
            if bare[0] == "set" or bare[0] == "group" and bare[1:3] != ("(", ")"):
                return False  # has no order, or is an interval
            return self.same_pairwise([item[3] for item in _by_name(named[1:])], items)
        return None

    def same_pairwise(self, golds: Sequence[Node], answers: Sequence[Node]) -> bool:
        """Compares two sequences item by item."""
        if len(golds) != len(answers):
            return False
        unknown = None
        for gold, answer in zip(golds, answers):
            try:
                if not self.same(gold, answer):
                    return False
            except values.Unknown as error:
                unknown = error
        if unknown:
            raise unknown
        return True

    def same_unordered(self, golds: Sequence[Node], answers: Sequence[Node]) -> bool:
        """Compares two collections of items in any order: each gold item must pair with one answer
        item.
        """
        if len(golds) != len(answers):
            return False
        alike = Counter(golds) & Counter(answers)
        left = _without(answers, alike)
        unknown = None
        for gold in _without(golds, alike):
            for i, answer in enumerate(left):
                self.work.spend(PAIR_COST)
                try:
                    if self.same_element(gold, answer):
                        del left[i]
                        break
                except values.Unknown as error:
                    unknown = error
            else:
                if unknown:
                    raise unknown
                return False
        return True

    def same_element(self, gold: Node, answer: Node) -> bool:
        """Compares two elements of a list."""
        if gold[0] == answer[0] == "rel":
            return self.same_relation(gold, answer)
        if "rel" in (gold[0], answer[0]):
            if gold[0] == "rel" and is_curve(gold, self.work):
                return False
            relation, bare = (gold, answer) if gold[0] == "rel" else (answer, gold)
            return self.relation_and_value(relation, bare)
        if "text" in (gold[0], answer[0]):
            return _letters(gold) == _letters(answer) != ""
        if gold[0] == answer[0] == "group":
            return gold[1:3] == answer[1:3] and self.same_pairwise(gold[3:], answer[3:])
        if gold[0] == answer[0] == "union":
            return self.same_unordered(gold[1:], answer[1:])
        if gold[0] == answer[0] == "set":
            return self.same(gold, answer)
        if gold[0] == answer[0] == "matrix":
            shapes = [list(map(len, node[1:])) for node in (gold, answer)]
            cells = [[cell for row in node[1:] for cell in row] for node in (gold, answer)]
            return shapes[0] == shapes[1] and self.same_pairwise(*cells)
        if "qualified" in (gold[0], answer[0]):
            return gold[0] == answer[0] and gold[2] == answer[2] and self.same(gold[1], answer[1])
        kinds = {gold[0], answer[0]}
        if "residue" in kinds:
            return kinds == {"residue"} and self.same_residue(gold, answer)
        if kinds == {"group", "matrix"} and (vector := _vector(gold, answer)):
            return self.same_pairwise(*vector)
        if kinds == {"group", "matrix"} or kinds.issubset(_SETS):
            raise values.Unknown("two forms of a set or a vector")
        if _is_compound(gold) or _is_compound(answer):
            raise values.Unknown("an expression of sets or matrices")
        if kinds.intersection(_NO_EXPRESSION):
            return False
        return self.same_quantity(gold, answer)

    def same_quantity(self, gold: Node, answer: Node) -> bool:
        """Compares two values, with units, percent signs or neither."""
        a, u = self.measured(gold)
        b, v = self.measured(answer)
        if not _contains(gold, "quantity") and not _contains(answer, "quantity"):
            u = v = None  # `5 m` alone is a product
        if u is not None and v is not None:
            if u.powers != v.powers:
                return False
            if (u.factor, u.pi) != (v.factor, v.pi):
                a = _in_base_units(a, u)
                b = _in_base_units(b, v)
        if u is not None or v is not None:
            gold = a
            answer = b
        if "ratio" in (gold[0], answer[0]) or "clock" in (gold[0], answer[0]):
            return self.same_ratio(gold, answer)
        if "percent" in (gold[0], answer[0]) and gold[0] != answer[0]:
            share, bare = (gold[1], answer) if gold[0] == "percent" else (answer[1], gold)
            part = ("div", share, ("num", Fraction(100)))
            return values.equal(share, bare, self.work) or values.equal(part, bare, self.work)
        if gold[0] == "percent":
            gold = gold[1]
            answer = answer[1]
        return values.equal(gold, answer, self.work)

    def measured(self, node: Node) -> tuple[Node, units.Unit | None]:
        """Returns a value and its unit or None; the letter of `5 m` or `5 m^2` is a unit."""
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
        """Returns the value and unit of a sum such as `6 ft + 2 in`. A part without a unit has that
        of the others.
        """
        measured = [self.measured(part) for part in parts]
        parts_units = [unit for _, unit in measured if unit is not None]
        if all(unit == parts_units[0] for unit in parts_units):
            return ("add", *(value for value, _ in measured)), parts_units[0]
        kinds = {unit.powers for unit in parts_units}
        if len(parts_units) < len(parts) or len(kinds) > 1:
            raise values.Unknown("a sum of several units")
        total = "add", *(_in_base_units(value, unit) for value, unit in measured)
        return total, units.Unit(parts_units[0].powers, Fraction(1), 0, True)

    def same_ratio(self, gold: Node, answer: Node) -> bool:
        """Compares ratios and times of day: `3:2` equals `6:4` and `3/2`; a time of day equals only
        itself.
        """
        gold, answer = (node[1] if node[0] == "quantity" else node for node in (gold, answer))
        kinds = {gold[0], answer[0]}
        if "clock" in kinds:
            return gold == answer
        if kinds != {"ratio"}:
            ratio, bare = (gold, answer) if gold[0] == "ratio" else (answer, gold)
            return len(ratio) == 3 and self.same_quantity(("div", *ratio[1:]), bare)
        if len(gold) != len(answer):
            return False
        return all(
            values.equal(("mul", a, answer[1]), ("mul", b, gold[1]), self.work)
            for a, b in zip(gold[2:], answer[2:])
        )

    def same_residue(self, gold: Node, answer: Node) -> bool:
        """Compares two residues: `3 mod 5` equals `8 mod 5`."""
        if not values.equal(gold[2], answer[2], self.work):
            return False
        difference = "add", gold[1], ("neg", answer[1])
        turns = values.value(("div", difference, gold[2]), {}, self.work)
        return isinstance(turns, Fraction) and turns.denominator == 1

    # --- relations

    def same_relation(self, gold: Node, answer: Node) -> bool:
        """Compares two equations, inequalities or memberships."""
        if gold[1] == answer[1] == "=":
            return self.same_equation(gold, answer)
        if "in" in (gold[1], answer[1]):
            return self.same(*(node[3] if node[1] == "in" else node for node in (gold, answer)))
        if "=" in (gold[1], answer[1]) or len(gold) != len(answer):
            return False
        gold = _ascending(gold)
        answer = _ascending(answer)
        if gold[1] != answer[1]:
            return False
        if " " in gold[1]:
            return self.same_pairwise(gold[2:], answer[2:])
        differences = [("add", side[2], ("neg", side[3])) for side in (gold, answer)]
        return values.proportional(*differences, self.work, positive=gold[1] != "!=")

    def same_equation(self, gold: Node, answer: Node) -> bool:
        """Compares equations: the right sides if the left sides are equal, else as curves."""
        lefts = gold[2], answer[2]
        if lefts[0][0] == lefts[1][0] == "applied":
            renamed = answer[3]
            for new, old in zip(lefts[0][2:], lefts[1][2:]):
                renamed = _renamed(renamed, old, new)
            alike = lefts[0][1] == lefts[1][1] and len(lefts[0]) == len(lefts[1])
            return alike and self.same(gold[3], renamed)
        if lefts[0] == lefts[1]:
            return self.same(gold[3], answer[3])
        if "applied" not in (lefts[0][0], lefts[1][0]) and self.same(*lefts):
            return self.same(gold[3], answer[3])
        differences = [("add", side[2], ("neg", side[3])) for side in (gold, answer)]
        return values.proportional(*differences, self.work)

    def relation_and_value(self, relation: Node, bare: Node) -> bool:
        """Compares `x = 5` with 5, or `1 < x < 2` with `(1, 2)`."""
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
            _, operator, low, high, _ = _ascending(relation)
            below, above = operator.split()
            opening = "[" if below == "<=" else "("
            closing = "]" if above == "<=" else ")"
            return self.same_element(("group", opening, closing, low, high), bare)
        raise values.Unknown("an inequality and a set")


def _vector(gold: Node, answer: Node) -> tuple[Sequence[Node], Sequence[Node]] | None:
    """Returns the entries of a tuple and of a row or column; None for another pair."""
    tuple_, matrix = (gold, answer) if gold[0] == "group" else (answer, gold)
    rows = matrix[1:]
    if tuple_[1:3] != ("(", ")") or len(rows) > 1 and any(len(row) > 1 for row in rows):
        return None
    return tuple_[3:], [cell for row in rows for cell in row]


def _without(items: Sequence[Node], taken: Counter[Node]) -> list[Node]:
    """Returns `items` without those in `taken`, as often as they are taken."""
    left = Counter(taken)
    rest = []
    for item in items:
        if left[item]:
            left[item] -= 1
        else:
            rest.append(item)
    return rest


def _items(node: Node) -> list[Node]:
    r"""Returns the elements of a list, a set or a `\pm`, or the node itself as its only element."""
    items = list(node[1:]) if node[0] in ("list", "set") else [node]
    items = [item for item in items if not _is_of_whole_numbers(item)] or items
    return [way for item in items for way in _without_plus_minus(item)]


def _is_of_whole_numbers(node: Node) -> bool:
    r"""Returns True for `k \in \mathbb{Z}`, which may follow an answer that has a `k`."""
    if node[:2] != ("rel", "in") or node[3][0] != "var":
        return False
    return node[3][1] in (r"\mathbb{Z}", r"\mathbb{N}")


def _without_plus_minus(node: Node) -> list[Node]:
    r"""Returns the two nodes that a node with `\pm` stands for, or the node itself."""
    if not _contains(node, "pm", "mp"):
        return [node]
    return [_with_signs(node, upper) for upper in (True, False)]


def _contains(node: Node, *kinds: str) -> bool:
    """Returns True if a node, or a node in it, is of one of these kinds."""
    return node[0] in kinds or any(
        _contains(part, *kinds) for part in node[1:] if type(part) is tuple
    )


def _with_signs(node: Node, upper: bool) -> Node:
    r"""Returns a node with the upper signs of `\pm` and `\mp`, or with the lower ones."""
    if node[0] in ("pm", "mp"):
        inner = _with_signs(node[1], upper)
        return inner if upper == (node[0] == "pm") else ("neg", inner)
    return tuple(_with_signs(part, upper) if type(part) is tuple else part for part in node)


def _renamed(node: Node, old: str, new: str) -> Node:
    """Returns a node with one variable renamed."""
    if node == ("var", old):
        return "var", new
    return tuple(_renamed(part, old, new) if type(part) is tuple else part for part in node)


def _has_different_names(items: Sequence[Node]) -> bool:
    """Returns True if items are equations that each give a value to another name."""
    names = {item[2] for item in items if item[:2] == ("rel", "=")}
    return len(names) == len(items) > 1


def _by_name(equations: Sequence[Node]) -> Sequence[Node]:
    """Returns equations in the alphabet's order if their names are consecutive letters, else as
    they are.
    """
    names = [equation[2][1] for equation in equations if equation[2][0] == "var"]
    if len(names) == len(equations) and "".join(sorted(names)) in string.ascii_letters:
        return sorted(equations, key=lambda equation: equation[2][1])
    return equations


def _is_compound(node: Node) -> bool:
    """Returns True for sums, products and powers that contain a matrix, a tuple or a set, which are
    not computed here.
    """
    computed = node[0] in ("add", "mul", "div", "neg", "pow", "fn")
    return computed and _contains(node, "matrix", "group", "set")


def _ascending(relation: Node) -> Node:
    """Returns an inequality written with `<` or `<=`."""
    kind, operator, left, right, *middle = relation
    if operator[0] != ">":
        return relation
    mirrored = " ".join(MIRRORED[sign] for sign in reversed(operator.split()))
    return kind, mirrored, right, left, *middle


def _in_base_units(value: Node, unit: units.Unit) -> Node:
    """Returns a value times what its unit is in base units."""
    return "mul", value, ("num", unit.factor), ("pow", ("var", r"\pi"), ("num", Fraction(unit.pi)))


def _lettered(node: Node) -> tuple[Node, str]:
    """Returns a value and the letters that follow it as factors and divisors, such as `m/s^2`."""
    letters = ""
    while node[0] in ("div", "mul") and len(node) > 2 and (letter := _letter(node[-1])):
        if node[0] == "mul":
            return (node[1] if len(node) == 3 else node[:-1]), letter + letters
        letters = f"/{letter}{letters}"
        node = node[1]
    return node, ""


def _letter(node: Node) -> str:
    """Returns a variable or its power as it is written; an empty string for other nodes."""
    if node[0] == "pow" and node[1][0] == "var" and node[2][0] == "num":
        return f"{node[1][1]}^{node[2][1]}"
    return node[1] if node[0] == "var" else ""


def _letters(node: Node) -> str:
    """Returns the word that a text, or a product of variables, spells; an empty string if it spells
    none.
    """
    if node[0] == "text":
        return node[1]
    if node[0] == "var":
        return node[1].casefold()
    if node[0] == "mul":
        parts = [_letters(part) for part in node[1:]]
        return "".join(parts) if all(parts) else ""
    return ""
