"""Does the constraint of smollm2.py bind and hold, whatever the seed?

Each seed runs with it and without it (lambda = 0). As fixed before the first of these runs: it
binds if mean delta of the last ten steps is above the tolerance without it, and holds if it is
within the tolerance with it, with lambda at neither bound at the end. The engine's held-out pass
rates are compared in pairs of one seed.

Command:  bash experiments/language/get_smollm2.sh && dcmdp study experiments/language/seeds.py
"""

import dataclasses

from smollm2 import CONFIG

from dcmdp_jax.tools.study import Study

GRPO = dataclasses.replace(
    CONFIG,
    constraint=dataclasses.replace(
        CONFIG.constraint, shaping=None, dual_lr=0.0, multiplier_init=0.0
    ),
)
STUDY = Study({"dcgrpo": CONFIG, "grpo": GRPO}, seeds=5, first_seed=1)
