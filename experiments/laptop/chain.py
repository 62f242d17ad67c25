"""What the laptop studies share: the chain task, a model that learns it in seconds, and how an arm
differs from plain GRPO.

The model has 89 thousand parameters (75 thousand active of 120 with experts); a noisy expert warms
it up to a pass rate of 0.35 at temperature 1, and 0.99 greedily, so that reinforcement learning
here sharpens what the model knows and teaches it nothing new.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from dcmdp_jax import constraint
from dcmdp_jax.config import (
    AlgorithmConfig,
    Calibrated,
    CheckpointConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    ModelSource,
    Precision,
    RolloutConfig,
    WarmupConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.tasks import Chain

TASK = Chain(operations=5, noise=(0.15, 0.20, 0.30))
DENSE = ModelConfig(
    vocab_size=18,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
EXPERTS = dataclasses.replace(DENSE, num_experts=8, experts_per_token=2, expert_size=48)

FLOAT32 = Precision()
INT4 = Precision(weights="int4")  # a scale for each output channel
COARSE = Precision(weights="int4", group=-1)  # a scale for each weight as a whole
FP8 = Precision(
    weights="float8_e4m3fn", group=-1, activations="float8_e4m3fn", cache="float8_e4m3fn"
)

CLIPPED = partial(policy.clipped, clip_low=0.2, clip_high=0.24)
FAST = 3e-4
SLOW = 1e-4  # learning rates: at the edge of stability, and well inside it
STEPS = {FAST: 120, SLOW: 160}

GRPO = Config(
    name="chain",
    model=ModelSource(architecture=DENSE),
    data=DataConfig(task=TASK, prompts_per_step=16, max_prompt_tokens=12),
    rollout=RolloutConfig(samples=8, max_tokens=33, precision=INT4, slots=128),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(CLIPPED),
        reduce=reduce.token_mean,
        minibatches=4,
        # prompts of a few tokens; completions are drawn to minibatches one by one, as in the
        # tables of RESULTS.md
        share_prompts=False,
        learning_rate=FAST,
        lr_warmup_steps=20,
        beta2=0.999,
    ),
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage,
        dual=constraint.projected_ascent,
        tolerance=0.0037,
        dual_lr=0.0,
        multiplier_init=0.0,
    ),
    warmup=WarmupConfig(steps=600, batch_size=128, learning_rate=3e-3),
    eval=EvalConfig(every=40, prompts=512),
    checkpoint=CheckpointConfig(every=0, keep=1),
    steps=STEPS[FAST],
)


def with_learning_rate(config: Config, learning_rate: float) -> Config:
    """The same arm with another learning rate, and the steps that belong to it."""
    algorithm = dataclasses.replace(config.algorithm, learning_rate=learning_rate)
    return dataclasses.replace(config, algorithm=algorithm, steps=STEPS[learning_rate])


def with_engine(config: Config, precision: Precision, **rollout) -> Config:
    """The same arm with another engine."""
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, precision=precision, **rollout)
    )


HARMED = with_engine(GRPO, COARSE)  # where mismatch ruins the run


def with_fixed_multiplier(shaping, multiplier: float, config: Config = GRPO) -> Config:
    """A multiplier that stays as it is."""
    return dataclasses.replace(
        config,
        constraint=dataclasses.replace(
            config.constraint, shaping=shaping, multiplier_init=multiplier
        ),
    )


def with_dual(
    shaping,
    *,
    tolerance: float | Calibrated,
    multiplier_max: float,
    dual=constraint.projected_ascent,
    dual_lr: float = 1.0,
    penalty=None,
    config: Config = GRPO,
) -> Config:
    """A multiplier that the dual moves, from the paper's 0.1."""
    return dataclasses.replace(
        config,
        constraint=ConstraintConfig(
            shaping=shaping,
            penalty=penalty,
            dual=dual,
            tolerance=tolerance,
            dual_lr=dual_lr,
            multiplier_init=0.1,
            multiplier_max=multiplier_max,
        ),
    )


def with_correction(correction, config: Config = GRPO) -> Config:
    """Importance weights for the gap in place of a constraint."""
    surrogate = corrections.decoupled(CLIPPED, correction)
    return dataclasses.replace(
        config, algorithm=dataclasses.replace(config.algorithm, surrogate=surrogate)
    )


def with_penalty(multiplier: float, config: Config = GRPO) -> Config:
    """The gap as a term of the loss, with a gradient of its own."""
    return dataclasses.replace(
        config,
        constraint=dataclasses.replace(
            config.constraint, shaping=None, penalty=constraint.penalty, multiplier_init=multiplier
        ),
    )


ARMS = {
    "none": with_engine(GRPO, FLOAT32),
    "grpo": GRPO,
    "tis": with_correction(corrections.tis(2.0)),
    "icepop": with_correction(corrections.icepop(0.5, 5.0)),
    # The paper's constants, but for c: 1.2 times this engine's floor at the start, mean of five
    # (floors.py), or the run's own.
    "dcgrpo": with_dual(constraint.shape_advantage, tolerance=0.0073, multiplier_max=1.0),
    "calibrated": with_dual(
        constraint.shape_advantage, tolerance=Calibrated(slack=0.2), multiplier_max=1.0
    ),
    "signed": with_fixed_multiplier(constraint.shape_signed, 0.1),
    "penalty": with_penalty(0.1),
}
