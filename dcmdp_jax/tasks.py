"""Generated tasks, with an exact verifier and a noisy expert: training without a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dcmdp_jax.records import Example

OPERATORS = "+-*"
HELD_OUT_SHARE = 64  # one problem in 64 is held out


class Task(Protocol):
    """A family of problems that are addressed by number.

    A task for a model that brings no tokenizer has an `alphabet` too, and one that is warmed up on
    has a `solution`, as `Chain` has both.
    """

    def example(self, index: int, seed: int) -> Example:
        """Returns training problem `index` of stream `seed`; it is the same every time."""

    def held_out(self, count: int) -> list[Example]:
        """Returns a fixed list of distinct problems that `example` never returns."""

    def reward(self, example: Example, text: str) -> float:
        """Returns 1.0 for a right completion, else 0.0."""


@dataclass(frozen=True)
class Chain:
    """Arithmetic modulo 10, strictly from left to right, with the work shown.

    Prompt `3+5*2-4*7+9=`, solution `3+5=8;8*2=6;6-4=2;2*7=4;4+9=3;#3`: with n operations the prompt
    has 2n + 2 characters and the solution 6n + 2, and the stop token follows.
    """

    operations: int = 5
    # probability that the expert gets a step wrong, for + - *
    noise: tuple[float, float, float] = (0.15, 0.20, 0.30)

    def __post_init__(self):
        if self.operations not in range(1, 13):  # the problem's number fits an int64
            raise ValueError(f"Chain: operations={self.operations} must lie in 1..12")
        if len(self.noise) != 3 or not all(0 <= p <= 1 for p in self.noise):
            raise ValueError(f"Chain: noise={self.noise} must be three probabilities, for + - *")

    @property
    def alphabet(self) -> str:
        """The characters of prompts and solutions."""
        return "0123456789+-*=;#"

    @property
    def problems(self) -> int:
        """The number of problems, held-out ones included."""
        return 10 * 30**self.operations

    def example(self, index: int, seed: int) -> Example:
        """Returns training problem `index` of stream `seed`.

        It is drawn uniformly from the problems that are not held out.
        """
        rng = np.random.default_rng((seed, index))
        while True:
            number = int(rng.integers(self.problems))
            if not _is_held_out(number):
                return self._problem(number)

    def held_out(self, count: int) -> list[Example]:
        """Returns the first `count` held-out problems, in a fixed shuffled order.

        Raises ValueError if there are too few.
        """
        if count > self.problems // (2 * HELD_OUT_SHARE):
            raise ValueError(
                f"Chain({self.operations}) has too few problems to hold out {count}; set a smaller "
                "eval.prompts"
            )
        rng = np.random.default_rng(0)
        numbers: dict[int, None] = {}  # an ordered set
        while len(numbers) < count:
            drawn = rng.integers(self.problems, size=HELD_OUT_SHARE * count)
            numbers |= dict.fromkeys(number for number in drawn.tolist() if _is_held_out(number))
        return [self._problem(number) for number in list(numbers)[:count]]

    def solution(self, example: Example, rng: np.random.Generator) -> str:
        """Returns the expert's work on a problem.

        The result of each step is replaced by another digit with its operator's probability, and
        the work continues from the digit that was written.
        """
        prompt = example.prompt
        luck = rng.random(self.operations).tolist()
        shift = rng.integers(1, 10, size=self.operations).tolist()
        value = int(prompt[0])
        steps = []
        for i in range(self.operations):
            operator = prompt[1 + 2 * i]
            operand = int(prompt[2 + 2 * i])
            result = _apply(value, operator, operand)
            if luck[i] < self.noise[OPERATORS.index(operator)]:
                result = (result + shift[i]) % 10
            steps.append(f"{value}{operator}{operand}={result};")
            value = result
        return "".join(steps) + f"#{value}"

    def reward(self, example: Example, text: str) -> float:
        """Returns 1.0 if the text has one `#`, followed by the right digit at its end; else 0.0."""
        return float(text.partition("#")[2] == example.answer)

    def _problem(self, number: int) -> Example:
        """Returns the problem of a number in 0..problems-1."""
        number, value = divmod(number, 10)
        prompt = [str(value)]
        for _ in range(self.operations):
            number, operand = divmod(number, 10)
            number, kind = divmod(number, 3)
            prompt.append(f"{OPERATORS[kind]}{operand}")
            value = _apply(value, OPERATORS[kind], operand)
        return Example("".join(prompt) + "=", str(value), "chain")


def _apply(left: int, operator: str, right: int) -> int:
    """Returns the result of one operation modulo 10."""
    if operator == "+":
        return (left + right) % 10
    return (left - right) % 10 if operator == "-" else left * right % 10


def _is_held_out(number: int) -> bool:
    """Returns True for a pseudo-random share of the numbers, the same for every seed."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = (number ^ number >> 33) * factor & 0xFFFFFFFFFFFFFFFF
    return (number ^ number >> 33) % HELD_OUT_SHARE == 0
