"""Where mismatch ruins the run, what rescues it? Three forms of the constraint, four fixed
multipliers each; the corrections.

The engine holds int4 with one scale a weight. Multiplier 0 is `int4-tensor` of mismatch.py.

Command:  dcmdp study experiments/laptop/multiplier.py
Hardware: two CPU cores
Time:     57 core-minutes of steps, beside other work
Result:   |delta| helps at no multiplier; the penalty at 0.1 is ahead of GRPO in three pairs of
          three
"""

from chain import HARMED, with_correction, with_dual, with_fixed_multiplier, with_penalty

from dcmdp_jax import constraint
from dcmdp_jax.losses import corrections
from dcmdp_jax.tools.study import Study

GRID = (0.05, 0.1, 0.2, 0.4)

STUDY = Study(
    {
        f"abs-{value:g}": with_fixed_multiplier(constraint.shape_advantage, value, HARMED)
        for value in GRID
    }
    | {
        f"signed-{value:g}": with_fixed_multiplier(constraint.shape_signed, value, HARMED)
        for value in GRID
    }
    | {f"penalty-{value:g}": with_penalty(value, HARMED) for value in GRID}
    | {
        "tis": with_correction(corrections.tis(2.0), HARMED),
        "icepop": with_correction(corrections.icepop(0.5, 5.0), HARMED),
        "dcgrpo": with_dual(
            constraint.shape_advantage, tolerance=0.013, multiplier_max=1.0, config=HARMED
        ),
    },
    seeds=3,
)
