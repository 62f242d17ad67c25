"""Does the constraint hold the gap of a bfloat16 engine, and does the model gain? Qwen3-30B-A3B in the paper's setting.

Command:  dcmdp train experiments/pod_30b_a3b.py --distributed --model.folder Qwen3-30B-A3B --data.path dapo-math-17k.parquet
Hardware: a TPU slice; `dcmdp plan experiments/pod_30b_a3b.py --topology v5p:4x4x4` tells what it needs
Time:     not measured; docs/pods.md has the least time a step can take
Result:   not measured here; the paper reports an average of 71.8 over six sets, 69.0 without the constraint (arXiv 2606.08779)
"""

from functools import partial

from dcmdp_jax import constraint, rewards
from dcmdp_jax.config import (AlgorithmConfig, Config, ConstraintConfig, DataConfig, EvalConfig, MeshConfig, ModelSource,
                              Precision, RolloutConfig)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models import sizes

CONFIG = Config(
    name="pod_30b_a3b",
    model=ModelSource(shape=sizes.QWEN3_30B_A3B, bfloat16=True, remat=True),
    data=DataConfig(path="dapo-math-17k.parquet", verifier=rewards.math_answer, prompts_per_step=64,
                    max_prompt_tokens=1024, chat=True, enable_thinking=True),
    rollout=RolloutConfig(samples=8, max_tokens=8192, precision=Precision(weights="bfloat16", embed="bfloat16", head="bfloat16"),
                          slots=512, tokens_per_dispatch=32, devices=-1, mesh=MeshConfig(tensor=4)),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.24, clip_high=0.24)),
        reduce=reduce.token_mean, microbatches=8, learning_rate=1e-6, beta1=0.9, beta2=0.95),
    constraint=ConstraintConfig(shape=constraint.shape, dual=constraint.projected_ascent, tolerance=0.0050, dual_lr=1.0,
                                multiplier_init=0.05),
    mesh=MeshConfig(expert=8),
    eval=EvalConfig(every=0),
    steps=500,
)
