"""Does the constraint run end to end? The chain task with an int4 engine, warm-up on a noisy
expert, then DC-GRPO.

Command:  dcmdp train experiments/quickstart.py
Hardware: two CPU cores
Time:     2 minutes on two idle cores after the installation, up to 8 on a shared machine
Result:   held-out pass rate of the int4 engine's policy 0.33 -> 0.87 in 160 steps, of the float32
          trainer's 0.35 -> 0.86; lambda 0.10 -> 0.19 (bound 0.20), mean delta 0.008 -> 0.0037. One
          seed on one machine; on another 0.32 -> 0.79 and 0.35 -> 0.71, lambda at its bound from
          step 126, mean delta 0.0058 at the end. Other streams of random numbers, and other
          round-off in the warm-up, ended at 0.92 / 0.88, 0.89 / 0.83, 0.87 / 0.67 and 0.56 / 0.43.
          The tolerance lies under the floor of the start. Without mismatch
          (--rollout.precision.weights float32): 0.93 for both, delta 1e-7; with other round-off
          0.89.
"""

from functools import partial

from dcmdp_jax import constraint
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ModelSource,
    Precision,
    RolloutConfig,
    WarmupConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.tasks import Chain

CHAIN = Chain(operations=5, noise=(0.15, 0.20, 0.30))

CONFIG = Config(
    name="quickstart",
    model=ModelSource(
        architecture=ModelConfig(
            vocab_size=18,
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
        )
    ),
    data=DataConfig(task=CHAIN, prompts_per_step=16, max_prompt_tokens=12),
    rollout=RolloutConfig(samples=8, max_tokens=33, precision=Precision(weights="int4"), slots=128),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.2, clip_high=0.24)),
        reduce=reduce.token_mean,
        minibatches=4,
        learning_rate=1e-4,
        lr_warmup_steps=20,
        beta2=0.999,
    ),
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage,
        dual=constraint.projected_ascent,
        tolerance=0.004,
        multiplier_max=0.2,
    ),
    warmup=WarmupConfig(steps=600, batch_size=128, learning_rate=3e-3),
    eval=EvalConfig(every=20, prompts=512),
    steps=160,
)
