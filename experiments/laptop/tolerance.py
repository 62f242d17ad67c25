"""Is there a best tolerance, is it the calibrated one, and does adapting the multiplier beat the best fixed one?

The engine is that of multiplier.py. The multiplier starts at 0.1 and is kept under 0.3; tolerances are multiples of this
engine's floor, the mean of five starts (floors.py).

Command:  dcmdp study experiments/laptop/tolerance.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

from functools import partial

from chain import HARMED, adaptive

from dcmdp_jax import constraint
from dcmdp_jax.study import Study

FLOOR = 0.0108  # of this engine at the start, mean of five (floors.py)
CONTROLLERS = {"relative": (constraint.relative_ascent, 0.05), "pi": (partial(constraint.pi, proportional=5.0), 1.0)}

STUDY = Study(
    {f"abs-c{part:g}": adaptive(constraint.shape, tolerance=part * FLOOR, multiplier_max=0.3, config=HARMED) for part in (0.5, 0.8, 1.2, 2.0)}
    | {f"abs-{name}": adaptive(constraint.shape, tolerance=0.8 * FLOOR, multiplier_max=0.3, dual=dual, dual_lr=rate,
                               config=HARMED)
       for name, (dual, rate) in CONTROLLERS.items()}, seeds=3)
