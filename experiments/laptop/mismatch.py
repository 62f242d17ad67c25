"""Which property of the engine does the harm, at an equal gap? Plain GRPO under one source of
mismatch at a time.

Command:  dcmdp study experiments/laptop/mismatch.py
Hardware: two CPU cores
Time:     24 core-minutes of steps, beside other work
Result:   benign up to a delta of 0.004, ruin at 0.014; at an equal gap
          stale weights do far less harm
"""

import dataclasses

from chain import FLOAT32, FP8, GRPO, with_engine

from dcmdp_jax.config import Precision
from dcmdp_jax.tools.study import Study

STUDY = Study(
    {
        "int8": with_engine(GRPO, Precision("int8", activations="int8", cache="int8")),
        "fp8": with_engine(GRPO, FP8),
        "fp8-e5m2": with_engine(GRPO, dataclasses.replace(FP8, weights="float8_e5m2")),
        "nf4": with_engine(GRPO, Precision("nf4", group=32)),
        "int4-tensor": with_engine(GRPO, Precision("int4", group=-1)),
        "int4-head": with_engine(GRPO, Precision(head="int4")),
        "kv-fp8": with_engine(GRPO, Precision(cache="float8_e4m3fn")),
        **{f"stale-{k}": with_engine(GRPO, FLOAT32, staleness=k) for k in (1, 2, 4)},
    },
    seeds=3,
)
