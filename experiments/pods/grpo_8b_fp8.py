"""What does Qwen3-8B reach without the constraint, sampled by an fp8 engine? The paper's setting.

Command:  dcmdp train experiments/pods/grpo_8b_fp8.py --distributed --workdir RUN
          --model.folder Qwen3-8B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/grpo_8b_fp8.py out, then the evaluation in docs/pods.md
Hardware: a TPU slice; dcmdp plan experiments/pods/grpo_8b_fp8.py --topology v5p:4x4x4 tells what it
          needs
          v5 and v6 chips hold fp8 and multiply in bfloat16; --rollout.precision.weights int8
          --rollout.precision.activations int8 multiplies in 8 bits there.
Time:     not measured; at least 5.2 hours for 500 steps: a step's lower bound on v5p:4x4x4 is 37 s
          (docs/pods.md)
Result:   not run here; the paper's average over six sets is 64.7 (AIME24, AIME25, AMC23, MATH-500,
          Minerva, OlympiadBench: 53.2, 35.2, 89.5, 92.9, 50.0, 67.4; arXiv 2606.08779)
"""

from paper import FP8, grpo

CONFIG = grpo("grpo_8b_fp8", "8b", FP8, tolerance=0.0037)
