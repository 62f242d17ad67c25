"""Does the constraint help where the engine holds its weights in int4? Seven arms, two learning rates, five seeds.

Command:  dcmdp study experiments/laptop/main.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

from chain import ARMS, FAST, SLOW, at

from dcmdp_jax.study import Study

STUDY = Study({f"{name}-{rate:g}": at(arm, rate) for rate in (FAST, SLOW) for name, arm in ARMS.items()}, seeds=5)
