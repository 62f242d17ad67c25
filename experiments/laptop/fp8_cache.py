"""Does a gap of the paper's size, made by a real engine, cost anything, and does DC-GRPO mend it?

vLLM in bfloat16 with an fp8 cache samples; its mean delta at the start is 3e-3 (the paper's
tolerances are 0.0037 and 0.0050). `exact` is GRPO sampled by the library's engine in float32. The
model and the learning rate are those of real_engine.py; runs are 20 steps long, so that three seeds
fit in an hour of a loaded machine.

Compared, as fixed before the first run: the engine's held-out pass rate at step 20, in pairs of one
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

from chain import FLOAT32, with_dual, with_engine
from real_engine import EXACT

from dcmdp_jax import constraint
from dcmdp_jax.config import Calibrated, EvalConfig
from dcmdp_jax.rollout.vllm import vllm
from dcmdp_jax.tools.study import Study

SHORT = dataclasses.replace(EXACT, eval=EvalConfig(every=10, prompts=512), steps=20)
SAMPLED = with_engine(SHORT, FLOAT32, sampler=vllm("http://127.0.0.1:8765", connections=128))

STUDY = Study(
    {
        "exact": SHORT,
        "grpo": SAMPLED,
        "dcgrpo": with_dual(
            constraint.shape_advantage,
            tolerance=Calibrated(slack=0.2),
            multiplier_max=1.0,
            config=SAMPLED,
        ),
    },
    seeds=3,
)
