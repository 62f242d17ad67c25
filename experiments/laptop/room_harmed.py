"""Where the gap ruins GRPO, does a choice of equally right answers let |delta| shaping help?

The task, starts and head of room.py with three kinds; the other weights are in multiplier.py's
int4, under which GRPO collapses. That part of the gap is in every symbol, whichever is chosen.

Command:  dcmdp study experiments/laptop/room_harmed.py, then python experiments/laptop/shares.py
Hardware: two CPU cores
Time:     6 minutes after room.py
Result:   no: all nine runs of |delta| are lost (0.00 to 0.17), GRPO's mean is 0.38, no gap's 0.94
"""

from chain import FLOAT32, with_engine, with_fixed_multiplier, with_penalty
from room import start, with_outlier

from dcmdp_jax import constraint
from dcmdp_jax.config import Precision
from dcmdp_jax.tools.study import Study

HARMED = with_engine(start(3), Precision(weights="int4", group=-1, head="int4"))

STUDY = Study(
    {
        "none": with_engine(HARMED, FLOAT32),
        "grpo": HARMED,
        "abs-0.1": with_fixed_multiplier(constraint.shape_advantage, 0.1, HARMED),
        "abs-1": with_fixed_multiplier(constraint.shape_advantage, 1.0, HARMED),
        "cost-to-go-0.1": with_fixed_multiplier(constraint.shape_cost_to_go, 0.1, HARMED),
        "signed": with_fixed_multiplier(constraint.shape_signed, 0.1, HARMED),
        "penalty": with_penalty(0.1, HARMED),
    },
    seeds=3,
    alter=with_outlier,
)
