"""What does Qwen3-30B-A3B reach without the constraint, sampled by an fp8 engine? The paper's
setting.

Command:  dcmdp train experiments/pods/grpo_30b_a3b_fp8.py --distributed --workdir RUN
          --model.folder Qwen3-30B-A3B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/grpo_30b_a3b_fp8.py out, then the evaluation in
          docs/pods.md
Hardware: a TPU slice; dcmdp plan experiments/pods/grpo_30b_a3b_fp8.py --topology v5p:4x4x4 tells
          what it needs
          v5 and v6 chips hold fp8 and multiply in bfloat16; --rollout.precision.weights int8
          --rollout.precision.activations int8 multiplies in 8 bits there.
Time:     not measured; at least 5.5 hours for 500 steps: a step's lower bound on v5p:4x4x4 is 39 s
          (docs/pods.md)
Result:   not run here; the paper's average over six sets is 65.2 (AIME24, AIME25, AMC23, MATH-500,
          Minerva, OlympiadBench: 52.4, 37.5, 87.3, 93.8, 49.6, 65.2; arXiv 2606.08779)
"""

from paper import FP8, grpo

CONFIG = grpo("grpo_30b_a3b_fp8", "30b_a3b", FP8, tolerance=0.0050)
