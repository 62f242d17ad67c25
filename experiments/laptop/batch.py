"""Bias or noise? Four times the batch, and the same number of updates: noise falls by half, bias
stays.

The engine is that of multiplier.py.

Command:  dcmdp study experiments/laptop/batch.py
Hardware: two CPU cores
Time:     4 minutes
Result:   one seed of three is saved, at 0.93; two collapse as before
"""

import dataclasses

from chain import HARMED

from dcmdp_jax.tools.study import Study

STUDY = Study(
    {
        "grpo-batch4": dataclasses.replace(
            HARMED, data=dataclasses.replace(HARMED.data, prompts_per_step=64)
        )
    },
    seeds=3,
)
