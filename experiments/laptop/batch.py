"""Bias or noise? Four times the batch, and the same number of updates: noise falls by half, bias stays.

Command:  dcmdp study experiments/laptop/batch.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

import dataclasses

from chain import GRPO

from dcmdp_jax.study import Study

STUDY = Study({"grpo-batch4": dataclasses.replace(GRPO, data=dataclasses.replace(GRPO.data, prompts_per_step=64))}, seeds=3)
