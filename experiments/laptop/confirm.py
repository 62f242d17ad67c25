"""Do the best arms of multiplier.py hold where they were not chosen? One of each form, on five seeds of their own.

multiplier.py compares fifteen arms on three seeds, so that the best of them looks better than it is. These were picked from it,
before this ran. Seeds 3 to 7 are not among its own.

Command:  dcmdp study experiments/laptop/confirm.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

from chain import FLOAT32, HARMED, corrected, fixed, penalised, sampled

from dcmdp_jax import constraint
from dcmdp_jax.losses import corrections
from dcmdp_jax.study import Study

STUDY = Study({"none": sampled(HARMED, FLOAT32), "grpo": HARMED, "tis": corrected(corrections.tis(2.0), HARMED),
               "signed": fixed(constraint.shape_signed, 0.1, HARMED), "penalty": penalised(0.1, HARMED)}, seeds=5, first_seed=3)
