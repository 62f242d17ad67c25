"""Does the constraint bind and hold where the policy has a choice?

The task and the engine of room.py, with two spellings of each digit, of which the engine holds one
coarsely. `grpo` has no constraint; `dcgrpo` has the paper's shaping with a PI controller. As fixed
before the first run: the tolerance lies between where GRPO and a multiplier of 1 end in room.csv
(0.025 and 0.015). It binds if mean delta of the last 80 steps is above the tolerance without the
constraint; it holds if it is within 5 % of the tolerance or under it with the constraint, and
lambda is at neither bound at the end. The seeds are those that no other study has.

Command:  dcmdp study experiments/laptop/binds.py
Hardware: two CPU cores
Time:     20 core-minutes, the warm-ups included
Result:   delta holds on all five seeds (0.0125 to 0.0188); it binds on three, on two of them with
          lambda inside its bounds at the end; engine's pass rate 0.95 against 0.96
"""

import dataclasses
from functools import partial

from room import start, with_outlier

from dcmdp_jax import constraint
from dcmdp_jax.config import ConstraintConfig
from dcmdp_jax.tools.study import Study

GRPO = dataclasses.replace(start(2), steps=240)
DC_GRPO = dataclasses.replace(
    GRPO,
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage,
        dual=partial(constraint.pi, proportional=30.0, decay=0.9),
        tolerance=0.018,
        dual_lr=2.0,
        multiplier_init=0.1,
        multiplier_max=3.0,
    ),
)
STUDY = Study({"grpo": GRPO, "dcgrpo": DC_GRPO}, seeds=5, first_seed=20, alter=with_outlier)
