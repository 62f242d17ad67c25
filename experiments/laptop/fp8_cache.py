"""Does a gap of the paper's size, made by a real engine, cost anything, and does DC-GRPO mend it?

vLLM in bfloat16 with an fp8 cache samples; its mean delta at the start is 3e-3 (the paper's
tolerances are 0.0037 and 0.0050). `exact` is GRPO sampled by the library's engine in float32. The
model, learning rate and length are those of real_engine.py, but evaluated every ten steps.

Compared, as fixed before the first run: the engine's held-out pass rate at step 40, in pairs of one
seed, `grpo` with `exact` (what the gap costs) and `dcgrpo` with `grpo` (what the constraint
changes). A difference counts as shown where the 95 % interval over the three seeds leaves out 0.
Delta is compared with the run's own tolerance, 1.2 times its floor at the start. No other seed,
length or tolerance is tried.

Command:  python -m benchmarks.engines.vllm_server experiments/laptop/fp8_cache.py
          --dtype bfloat16 --kv-cache-dtype fp8_e4m3
          -- dcmdp study experiments/laptop/fp8_cache.py --workers 1
Hardware: two CPU cores
Time:     not measured
Result:   not measured
"""

import dataclasses

import real_engine

from dcmdp_jax.config import EvalConfig
from dcmdp_jax.tools.study import Study

STUDY = Study(
    {
        name: dataclasses.replace(arm, eval=EvalConfig(every=10, prompts=512))
        for name, arm in real_engine.STUDY.arms.items()
    },
    seeds=3,
)
