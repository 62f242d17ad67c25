"""Does the constraint hold on a language model's own tokens? GSM8K with a Qwen3 folder.

Command:  dcmdp train experiments/gsm8k.py --model.folder Qwen3-0.6B --data.path gsm8k/train.jsonl
          --data.eval_path gsm8k/test.jsonl
Hardware: one accelerator of 80 GB for Qwen3-0.6B (not run here); any machine for a tiny random
          folder
Time:     not measured
Result:   not measured here. Others report, on the 1,319 test problems: Qwen2.5-0.5B-Instruct from
          43.6 % to 50.2 % (greedy) in 100 GRPO steps of 20 x 8 at this learning rate (slime, pull
          request 1835), and Qwen3-1.7B from 31 % to 74 % with RLOO, most of it the answer's format
          (marin, issue 2024).
"""

from functools import partial

from dcmdp_jax import constraint, rewards
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    ModelSource,
    Precision,
    RolloutConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models.model_config import Compute

CONFIG = Config(
    name="gsm8k",
    model=ModelSource(compute=Compute(remat=True)),
    data=DataConfig(
        path="gsm8k/train.jsonl",
        verifier=rewards.math_answer,
        prompts_per_step=16,
        max_prompt_tokens=320,
        chat=True,
        instruction="Reason step by step and put the final answer after ####.",
    ),
    rollout=RolloutConfig(
        samples=8, max_tokens=512, precision=Precision(weights="float8_e4m3fn"), slots=128
    ),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.2, clip_high=0.24)),
        reduce=reduce.token_mean,
        minibatches=2,
        microbatches=8,
        learning_rate=1e-6,
    ),
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage, dual=constraint.projected_ascent, tolerance=0.0037
    ),
    eval=EvalConfig(every=20, prompts=256),
    steps=200,
)
