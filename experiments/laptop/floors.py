"""How large is the gap before any training, for each engine? Learning rate 0, four batches a start.

Command:  dcmdp study experiments/laptop/floors.py
Hardware: two CPU cores
Time:     8 core-minutes of steps, beside other work
Result:   0.0002 (bfloat16) to 0.011 (int4, one scale a weight)
"""

import dataclasses

from chain import FLOAT32, FP8, GRPO, INT4, with_engine

from dcmdp_jax.config import EvalConfig, Precision
from dcmdp_jax.tools.study import Study

STILL = dataclasses.replace(
    GRPO,
    algorithm=dataclasses.replace(GRPO.algorithm, learning_rate=0.0),
    steps=4,
    eval=EvalConfig(every=4, prompts=512),
)
ENGINES = {
    "float32": FLOAT32,
    "bfloat16": Precision(
        "bfloat16", activations="", cache="bfloat16", embed="bfloat16", head="bfloat16"
    ),
    "int8": Precision("int8", activations="int8", cache="int8"),
    "fp8": FP8,
    "fp8-e5m2": dataclasses.replace(FP8, weights="float8_e5m2"),
    "nf4": Precision("nf4", group=32),
    "int4": INT4,
    "int4-head": Precision(head="int4"),
    "int4-tensor": Precision("int4", group=-1),
    "kv-fp8": Precision(cache="float8_e4m3fn"),
    "a-fp8": Precision(activations="float8_e4m3fn"),
}

STUDY = Study({name: with_engine(STILL, engine) for name, engine in ENGINES.items()}, seeds=5)
