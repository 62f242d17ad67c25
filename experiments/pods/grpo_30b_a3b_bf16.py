"""What does Qwen3-30B-A3B reach without the constraint, sampled by a bfloat16 engine? The paper's
setting.

Command:  dcmdp train experiments/pods/grpo_30b_a3b_bf16.py --distributed --workdir RUN
          --model.folder Qwen3-30B-A3B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/grpo_30b_a3b_bf16.py out, then the evaluation in
          docs/pods.md
Hardware: a TPU slice; dcmdp plan experiments/pods/grpo_30b_a3b_bf16.py --topology v5p:4x4x4 tells
          what it needs
Time:     not measured; at least 8.2 hours for 500 steps: a step's lower bound on v5p:4x4x4 is 59 s
          (docs/pods.md)
Result:   not run here; the paper's average over six sets is 69.0 (AIME24, AIME25, AMC23, MATH-500,
          Minerva, OlympiadBench: 60.2, 43.6, 91.4, 95.5, 52.0, 71.3; arXiv 2606.08779)
"""

from paper import BF16, grpo

CONFIG = grpo("grpo_30b_a3b_bf16", "30b_a3b", BF16, tolerance=0.0050)
