"""Is an fp8 engine harmless over a thousand steps, and does the paper's own setting change anything?

Command:  dcmdp study experiments/laptop/long.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

import dataclasses

from chain import FP8, GRPO, SLOW, adaptive, at, sampled

from dcmdp_jax import constraint
from dcmdp_jax.config import EvalConfig
from dcmdp_jax.study import Study


def long(arm):
    return dataclasses.replace(at(arm, SLOW), steps=1000, eval=EvalConfig(every=100, prompts=512))


STUDY = Study({
    "grpo": long(sampled(GRPO, FP8)),
    "dcgrpo": long(sampled(adaptive(constraint.shape, tolerance=0.0037, multiplier_max=1.0), FP8)),
}, seeds=1)
