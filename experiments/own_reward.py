"""Does a reward for each right step teach more than one for the answer? The quickstart's task with
a verifier of your own.

Half of the reward is for the answer, half for the share of the steps that are right. `stopped` and
`length` are passed because the verifier has parameters of these names: a completion that was cut
off earns nothing, and one that is longer than a solution loses a little.

Command:  dcmdp train experiments/own_reward.py --seed 1
Hardware: two CPU cores
Time:     14 minutes, beside about ten other programs
Result:   mean held-out reward of the engine's policy 0.53 -> 0.89 at step 60, 0.84 at step 160;
          of the trainer's 0.58 -> 0.87 -> 0.79
"""

import dataclasses
import re

from quickstart import CONFIG as QUICKSTART

STEP = re.compile(r"(\d)([-+*])(\d)=(\d)")


def answer_and_steps(example, text, stopped, length):
    """Returns 1.0 for a right solution, less for parts of one; any finite number is a reward."""
    if not stopped:
        return 0.0
    operations = (len(example.prompt) - 2) // 2
    steps = [STEP.fullmatch(step) for step in text.split(";")[:operations]]
    right = sum(is_right(*step.groups()) for step in steps if step)
    answered = text.partition("#")[2] == example.answer
    too_long = length > 6 * operations + 3  # the solution and the stop token
    return 0.5 * answered + 0.5 * right / operations - 0.1 * too_long


def is_right(left, operator, operand, result):
    values = {
        "+": int(left) + int(operand),
        "-": int(left) - int(operand),
        "*": int(left) * int(operand),
    }
    return values[operator] % 10 == int(result)


CONFIG = dataclasses.replace(
    QUICKSTART,
    name="own_reward",
    data=dataclasses.replace(QUICKSTART.data, verifier=answer_and_steps),
)
