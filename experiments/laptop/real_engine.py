"""What does a real engine do to a run? vLLM in bfloat16 samples; GRPO with and without the
constraint.

vLLM runs on the CPU, where heads have 32 features or more, so that the model has 113 thousand
parameters in place of 89. `exact` is GRPO with the library's own engine in float32.

Command:  python -m benchmarks.engines.vllm_server experiments/laptop/real_engine.py
          --dtype bfloat16 -- dcmdp study experiments/laptop/real_engine.py --workers 1
Hardware: two CPU cores
Time:     10 minutes on a shared machine with the warm-up at hand, 1 of them to start vLLM
Result:   pass rate of the engine's policy from 0.37 to 0.72 (exact), from 0.35 to 0.65 and to 0.73;
          delta stays at its floor of 4e-4 and lambda at 0.1: one seed shows no effect of either
"""

import dataclasses

from chain import FLOAT32, GRPO, with_dual, with_engine

from dcmdp_jax import constraint
from dcmdp_jax.config import Calibrated, EvalConfig, ModelSource
from dcmdp_jax.tools.study import Study

EXACT = dataclasses.replace(
    with_engine(GRPO, FLOAT32),
    model=ModelSource(architecture=dataclasses.replace(GRPO.model.architecture, head_dim=32)),
    eval=EvalConfig(every=20, prompts=512),
    steps=40,
)
SAMPLED = with_engine(EXACT, FLOAT32, server="http://127.0.0.1:8765")

STUDY = Study(
    {
        "exact": EXACT,
        "grpo": SAMPLED,
        "dcgrpo": with_dual(
            constraint.shape_advantage,
            tolerance=Calibrated(slack=0.2),
            multiplier_max=1.0,
            config=SAMPLED,
        ),
    },
    seeds=1,
)
