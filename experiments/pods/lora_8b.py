"""Does DC-GRPO of Qwen3-8B need all parameters, or are adapters enough? The paper's setting with
LoRA of rank 32 and a bfloat16 engine.

Command:  dcmdp train experiments/pods/lora_8b.py --distributed --workdir RUN
          --model.folder Qwen3-8B --data.path dapo-math-17k.parquet
          dcmdp convert experiments/pods/lora_8b.py out --adapter, for the adapters alone
Hardware: a TPU slice; dcmdp plan experiments/pods/lora_8b.py --topology v5e:4x4 tells what it
          needs (docs/pods.md)
Time:     not measured
Result:   not measured
"""

import dataclasses

from paper import BF16, dcgrpo

from dcmdp_jax.config import Lora

PAPER = dcgrpo("lora_8b", "8b", BF16, tolerance=0.0037, multiplier=0.1)
CONFIG = dataclasses.replace(
    PAPER,
    model=dataclasses.replace(PAPER.model, lora=Lora(rank=32, alpha=32.0)),
    # a common choice: ten times the rate of all parameters
    algorithm=dataclasses.replace(PAPER.algorithm, learning_rate=1e-5),
)
