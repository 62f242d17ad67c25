"""Do the arms order the same way in a Mixture-of-Experts? Eight experts, two a token.

Command:  dcmdp study experiments/laptop/experts.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

import dataclasses

from chain import ARMS, EXPERTS

from dcmdp_jax.config import ModelSource
from dcmdp_jax.study import Study


def sparse(arm):
    return dataclasses.replace(arm, model=ModelSource(shape=EXPERTS))


STUDY = Study({name: sparse(arm) for name, arm in ARMS.items()}, seeds=3)
