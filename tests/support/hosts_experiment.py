"""A tiny experiment for tests of several processes.

Its verifier rewards noise now and then, so that parameters move. Two environment variables break
it: UNREADABLE_CHECKPOINT, BROKEN_VERIFIER.
"""

import itertools
import os
import sys
from functools import partial

import orbax.checkpoint as ocp

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

CHAIN = Chain(operations=2)
CALLS = itertools.count()

if "UNREADABLE_CHECKPOINT" in os.environ:
    restore = ocp.StandardCheckpointHandler.restore

    def refuse(handler, directory, **arguments):
        if directory.parent.name == os.environ["UNREADABLE_CHECKPOINT"]:
            raise ValueError("a shard is damaged")
        return restore(handler, directory, **arguments)

    ocp.StandardCheckpointHandler.restore = refuse


def even(example, text):
    """Rewards half of all texts; fails from call number BROKEN_VERIFIER on."""
    if next(CALLS) >= int(os.environ.get("BROKEN_VERIFIER", sys.maxsize)):
        raise RuntimeError("the verifier is broken")
    return float(sum(map(ord, text)) % 2 == 0)


CONFIG = Config(
    name="hosts",
    model=ModelSource(
        architecture=ModelConfig(
            vocab_size=18,
            hidden_size=16,
            intermediate_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
        )
    ),
    data=DataConfig(task=CHAIN, verifier=even, prompts_per_step=4, max_prompt_tokens=6),
    rollout=RolloutConfig(samples=4, max_tokens=20, precision=Precision(weights="int8"), slots=8),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.2, clip_high=0.24)),
        reduce=reduce.token_mean,
        minibatches=2,
        learning_rate=0.01,
    ),
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage,
        dual=constraint.projected_ascent,
        tolerance=Calibrated(batches=2),
    ),
    warmup=WarmupConfig(steps=2, batch_size=8, learning_rate=3e-3),
    eval=EvalConfig(every=3, prompts=7),
    checkpoint=CheckpointConfig(every=2),
    steps=4,
)
