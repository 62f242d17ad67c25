"""Does the constraint hold the gap of a bfloat16 engine, and does Qwen3-30B-A3B gain by it? The
paper's setting.

Command:  dcmdp train experiments/pods/dcgrpo_30b_a3b_bf16.py --distributed --workdir RUN
          --model.folder Qwen3-30B-A3B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/dcgrpo_30b_a3b_bf16.py out, then the evaluation in
          docs/pods.md
Hardware: a TPU slice; dcmdp plan experiments/pods/dcgrpo_30b_a3b_bf16.py --topology v5p:4x4x4 tells
          what it needs
Time:     not measured; at least 8.2 hours for 500 steps: a step's lower bound on v5p:4x4x4 is 59 s
          (docs/pods.md)
Result:   not run here; the paper's average over six sets is 71.8 (AIME24, AIME25, AMC23, MATH-500,
          Minerva, OlympiadBench: 66.8, 49.1, 91.9, 95.8, 52.9, 74.5; arXiv 2606.08779)
"""

from paper import BF16, dcgrpo

CONFIG = dcgrpo("dcgrpo_30b_a3b_bf16", "30b_a3b", BF16, tolerance=0.0050, multiplier=0.05)
