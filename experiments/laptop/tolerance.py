"""Is there a best tolerance, and does adapting the multiplier beat the best fixed one?

The engine is that of multiplier.py; |delta| shaping (abs) and the penalty take the multiplier of
the same dual, which starts at 0.1 and is kept under 0.3. Tolerances are multiples of this engine's
floor, the mean of five starts (floors.py); `calibrated` measures each start's own and takes 1.2
times that. The best fixed multiplier of the penalty is multiplier.py's.

Command:  dcmdp study experiments/laptop/tolerance.py
Hardware: two CPU cores
Time:     11 minutes
Result:   |delta| shaping loses all 21 runs; the penalty is ahead of GRPO in 19 of 21, best at the
          tightest tolerance
"""

from functools import partial

from chain import HARMED, with_dual

from dcmdp_jax import constraint
from dcmdp_jax.config import Calibrated
from dcmdp_jax.tools.study import Study

FLOOR = 0.0108  # of this engine at the start, mean of five (floors.py)
FORMS = {
    "abs": {"shaping": constraint.shape_advantage},
    "penalty": {"shaping": None, "penalty": constraint.penalty},
}
DUALS = {
    **{f"c{part:g}": {"tolerance": part * FLOOR} for part in (0.5, 0.8, 1.2, 2.0)},
    "calibrated": {"tolerance": Calibrated(slack=0.2)},
    "relative": {"tolerance": 1.2 * FLOOR, "dual": constraint.relative_ascent, "dual_lr": 0.05},
    "pi": {"tolerance": 1.2 * FLOOR, "dual": partial(constraint.pi, proportional=5.0)},
}

STUDY = Study(
    {
        f"{form}-{name}": with_dual(**terms, **dual, multiplier_max=0.3, config=HARMED)
        for form, terms in FORMS.items()
        for name, dual in DUALS.items()
    },
    seeds=3,
)
