"""What does Qwen3-8B reach without the constraint, sampled by a bfloat16 engine? The paper's
setting.

Command:  dcmdp train experiments/pods/grpo_8b_bf16.py --distributed --workdir RUN
          --model.folder Qwen3-8B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/grpo_8b_bf16.py out, then the evaluation in docs/pods.md
Hardware: a TPU slice; dcmdp plan experiments/pods/grpo_8b_bf16.py --topology v5p:4x4x4 tells what
          it needs
Time:     not measured; at least 5.9 hours for 500 steps: a step's lower bound on v5p:4x4x4 is 42 s
          (docs/pods.md)
Result:   not run here; the paper's average over six sets is 67.3 (AIME24, AIME25, AMC23, MATH-500,
          Minerva, OlympiadBench: 58.8, 40.0, 90.4, 93.7, 51.0, 70.1; arXiv 2606.08779)
"""

from paper import BF16, grpo

CONFIG = grpo("grpo_8b_bf16", "8b", BF16, tolerance=0.0037)
