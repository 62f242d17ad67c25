"""The setting of the DCMDP paper (arXiv 2606.08779), which the experiments beside this file share.

Known, from a published summary (the authors' code is not public): GRPO, 64 prompts x 8 samples of
up to 8,192 tokens, AdamW at a learning rate of 1e-6 with betas 0.9 and 0.95, clip 0.24, bfloat16
training. The multiplier starts at 0.1 (8B) or 0.05 (30B-A3B), its step is 1.0, and the tolerance is
0.0037 or 0.0050.

Left open there and chosen here: one update a batch, both sides of the clip at 0.24, float32
parameters and moments, 500 steps, prompts of up to 1,024 tokens, a multiplier of at most 1,
thinking on. With one update the ratio is 1 when its gradient is taken, so that the clip never acts:
the paper, which states a clip, may make several updates a batch. One is the choice that leaves the
constraint alone to hold the policy near the sampler, and scores a batch in the update's own forward
pass. `--algorithm.minibatches 4 --algorithm.microbatches 2` makes four, with the clip at work and a
scoring pass before them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from dcmdp_jax import constraint, rewards
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelSource,
    Precision,
    RolloutConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models import sizes
from dcmdp_jax.models.model_config import Compute

BF16 = Precision(weights="bfloat16", embed="bfloat16", head="bfloat16")
# one scale an output channel, one a token
FP8 = dataclasses.replace(BF16, weights="float8_e4m3fn", activations="float8_e4m3fn")
MODELS = {
    "8b": (sizes.QWEN3_8B, MeshConfig()),
    "30b_a3b": (sizes.QWEN3_30B_A3B, MeshConfig(expert=8)),
}


def dcgrpo(
    name: str, size: str, engine: Precision, *, tolerance: float, multiplier: float
) -> Config:
    """One row of the paper's table, with the constraint."""
    shape, mesh = MODELS[size]
    return Config(
        name=name,
        model=ModelSource(architecture=shape, compute=Compute(bfloat16=True, remat=True)),
        data=DataConfig(
            path="dapo-math-17k.parquet",
            verifier=rewards.math_answer,
            prompts_per_step=64,
            max_prompt_tokens=1024,
            chat=True,
            enable_thinking=True,
        ),
        rollout=RolloutConfig(
            samples=8,
            max_tokens=8192,
            precision=engine,
            slots=512,
            tokens_per_dispatch=32,
            devices=-1,
            mesh=MeshConfig(tensor=4),
        ),
        algorithm=AlgorithmConfig(
            advantage=advantages.grpo,
            surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.24, clip_high=0.24)),
            reduce=reduce.token_mean,
            microbatches=8,
            learning_rate=1e-6,
            beta1=0.9,
            beta2=0.95,
        ),
        constraint=ConstraintConfig(
            shaping=constraint.shape_advantage,
            dual=constraint.projected_ascent,
            tolerance=tolerance,
            dual_lr=1.0,
            multiplier_init=multiplier,
        ),
        mesh=mesh,
        eval=EvalConfig(every=0),
        steps=500,
    )


def grpo(name: str, size: str, engine: Precision, *, tolerance: float) -> Config:
    """The same row without: a multiplier of 0 that stays there. The tolerance is drawn in the
    report.
    """
    config = dcgrpo(name, size, engine, tolerance=tolerance, multiplier=0.0)
    return dataclasses.replace(
        config, constraint=dataclasses.replace(config.constraint, dual_lr=0.0)
    )
