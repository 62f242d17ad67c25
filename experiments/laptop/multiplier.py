"""How much of a fixed multiplier helps, and is its window real? Three forms, four multipliers, three seeds.

Multiplier 0 is `grpo-0.0003` of main.py; 0.1 of the signed form and of the penalty are there too.

Command:  dcmdp study experiments/laptop/multiplier.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

from chain import fixed, penalised

from dcmdp_jax import constraint
from dcmdp_jax.study import Study

GRID = (0.05, 0.1, 0.2, 0.4)

STUDY = Study(
    {f"abs-{value:g}": fixed(constraint.shape, value) for value in GRID}
    | {f"signed-{value:g}": fixed(constraint.shape_signed, value) for value in GRID if value != 0.1}
    | {f"penalty-{value:g}": penalised(value) for value in GRID if value != 0.1}, seeds=3)
