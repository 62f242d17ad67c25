"""Is an fp8 engine harmless over 1,000 steps, and does the paper's setting change anything?

Command:  dcmdp study experiments/laptop/long.py
Hardware: two CPU cores
Time:     17 minutes
Result:   fp8 costs 0.02 ± 0.09; the paper's setting is 0.01 ± 0.06 ahead of that, with lambda at
          zero
"""

import dataclasses

from chain import ARMS, FP8, SLOW, with_engine, with_learning_rate

from dcmdp_jax.config import EvalConfig
from dcmdp_jax.tools.study import Study


def long(arm):
    return dataclasses.replace(
        with_learning_rate(arm, SLOW), steps=1000, eval=EvalConfig(every=100, prompts=512)
    )


STUDY = Study(
    {
        "none": long(ARMS["none"]),
        **{name: long(with_engine(ARMS[name], FP8)) for name in ("grpo", "calibrated")},
    },
    seeds=3,
)
