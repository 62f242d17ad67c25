"""Do the best arms hold where they were not chosen? Five of them, on five seeds of their own.

multiplier.py and tolerance.py compare twenty-nine arms on three seeds, so that the best of them
look better than they are. These were picked from them: one of each form, before any ran here; then,
with those results in view, the penalty under the dual at half the floor, and the multiplier that it
settles at as its control. No study of this engine has seeds 3 to 7.

Command:  dcmdp study experiments/laptop/confirm.py
Hardware: two CPU cores
Time:     12 minutes, with three warm-ups
Result:   the penalty 0.15 to 0.22 and the signed form 0.20 ahead of GRPO, of 0.36 that the gap
          takes; no interval leaves zero
"""

from chain import FLOAT32, HARMED, with_correction, with_engine, with_fixed_multiplier, with_penalty
from tolerance import STUDY as TOLERANCE

from dcmdp_jax import constraint
from dcmdp_jax.losses import corrections
from dcmdp_jax.tools.study import Study

STUDY = Study(
    {
        "none": with_engine(HARMED, FLOAT32),
        "grpo": HARMED,
        "tis": with_correction(corrections.tis(2.0), HARMED),
        "signed": with_fixed_multiplier(constraint.shape_signed, 0.1, HARMED),
        "penalty": with_penalty(0.1, HARMED),
        "penalty-0.3": with_penalty(0.3, HARMED),
        "penalty-dual": TOLERANCE.arms["penalty-c0.5"],
    },
    seeds=5,
    first_seed=3,
)
