"""What does smollm2.py gain or lose by its constraint, whatever the seed?

Each seed runs with it and without it (lambda = 0). As fixed before the first of these runs: mean
delta of the last ten steps is compared with the tolerance, and the engine's held-out pass rates at
the end in pairs of one seed.

Command:  bash experiments/language/get_smollm2.sh && dcmdp study experiments/language/seeds.py
Hardware: two CPU cores, 14 GiB of memory
Time:     8 to 15 minutes a pair of runs
Result:   0.19 to 0.28 -> 0.95 to 0.99 with the constraint and without; delta of the last ten steps
          0.014 to 0.018 in both on three seeds, 0.011 in both on two
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
STUDY = Study({"dcgrpo": CONFIG, "grpo": GRPO}, seeds=5, first_seed=2)
