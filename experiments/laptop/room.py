"""Does shaping by |delta| move the policy to right answers that the engine represents well?

Each digit of the work may be written with any of `kinds` symbols, so a solution has kinds^11 right
spellings, and the expert draws each at random. The engine holds the output head in int4, one scale
a symbol; the last kind's weights have an outlier on a channel that the final norm mutes, so the
trainer's policy is the same with it or without, and the engine rounds those weights coarsely. Two
kinds make every choice binary, where |delta| is the same for both outcomes; three leave the shaping
a preference.

Command:  dcmdp study experiments/laptop/room.py, then python experiments/laptop/shares.py
Hardware: two CPU cores
Time:     17 minutes
Result:   a multiplier of 1 moves the distorted symbols' share from 0.34 to 0.14 (GRPO 0.29), at an
          equal pass rate
"""

import dataclasses

from chain import FLOAT32, GRPO, TASK, with_engine, with_fixed_multiplier

from dcmdp_jax import constraint
from dcmdp_jax.config import CheckpointConfig, Precision
from dcmdp_jax.tasks import Chain
from dcmdp_jax.tools.study import Study

DIGITS = "0123456789"
SPELLINGS = (DIGITS, "abcdefghij", "ABCDEFGHIJ")
WARMUP = 1500  # steps: after chain.py's 600 the task is not learnt with so many symbols
OUTLIER = 1.0  # the other weights of the head are about 0.13


@dataclasses.dataclass(frozen=True)
class Synonyms(Chain):
    """The chain task with `kinds` spellings of each digit in the work and the answer; the prompt
    has digits.
    """

    kinds: int = 3

    @property
    def alphabet(self):
        return super().alphabet + "".join(SPELLINGS[1 : self.kinds])

    def solution(self, example, rng):
        """The expert's work, each digit that it computes written in a kind drawn uniformly."""
        plain = super().solution(example, rng)
        # Prompt operands stay digits: positions 0 and 4 of each 6-character step are a value and a
        # result.
        return "".join(
            SPELLINGS[rng.integers(self.kinds)][int(c)] if self.computed(i) else c
            for i, c in enumerate(plain)
        )

    def computed(self, position):
        """Whether a position of a solution holds a value that may be spelt in any kind."""
        return (
            position % 6 in (0, 4)
            if position < 6 * self.operations
            else position == 6 * self.operations + 1
        )

    def reward(self, example, text):
        """1.0 where the answer after `#` is right in any spelling."""
        answer = text.partition("#")[2]
        return float(
            len(answer) == 1
            and answer in [spelt[int(example.answer)] for spelt in SPELLINGS[: self.kinds]]
        )


def with_outlier(params, size=OUTLIER):
    """The last hidden channel muted by the final norm, and an outlier there in the head for the
    last kind.
    """
    head = params["head"].at[-1].set(0.0).at[-1, -10:].set(size)
    return params | {"final_norm": params["final_norm"].at[-1].set(0.0), "head": head}


def start(kinds):
    task = Synonyms(TASK.operations, TASK.noise, kinds)
    architecture = dataclasses.replace(GRPO.model.architecture, vocab_size=len(task.alphabet) + 2)
    return dataclasses.replace(
        GRPO,
        model=dataclasses.replace(GRPO.model, architecture=architecture),
        rollout=dataclasses.replace(GRPO.rollout, precision=Precision(head="int4")),
        data=dataclasses.replace(GRPO.data, task=task),
        checkpoint=CheckpointConfig(every=40, keep=10),
        warmup=dataclasses.replace(GRPO.warmup, steps=WARMUP),
    )


def arms(kinds):
    base = start(kinds)
    return {
        f"{kinds}-{name}": arm
        for name, arm in {
            "none": with_engine(base, FLOAT32),
            "grpo": base,
            "abs-0.1": with_fixed_multiplier(constraint.shape_advantage, 0.1, base),
            "abs-1": with_fixed_multiplier(constraint.shape_advantage, 1.0, base),
            "cost-to-go-0.1": with_fixed_multiplier(constraint.shape_cost_to_go, 0.1, base),
        }.items()
    }


TWO = {name: arm for name, arm in arms(2).items() if name in ("2-none", "2-grpo", "2-abs-1")}
STUDY = Study(arms(3) | TWO, seeds=3, alter=with_outlier)
