"""Does a language model learn to write sentences from an engine in int8, and how large is the gap?

SmolLM2-135M-Instruct writes one sentence with two given words (two_words.py). The trainer is
float32, the engine's weights are int8 with a scale per channel. The shaping, the dual and their
constants are the paper's; the tolerance is 1.2 times the floor at the start, 0.0108.

Command:  bash experiments/language/get_smollm2.sh && dcmdp train experiments/language/smollm2.py
Hardware: two CPU cores, 8 GiB of memory
Time:     6 to 12 minutes on two cores of different speed, the installation and the download
          included
Result:   held-out pass rate of the engine's policy 0.24 -> 0.97, the trainer's 0.23 -> 0.98; delta
          0.0108 -> 0.0138, above the tolerance, with lambda at 0.10
"""

import pathlib
from functools import partial

from two_words import TwoWords

from dcmdp_jax import constraint
from dcmdp_jax.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    EvalConfig,
    ModelSource,
    Precision,
    RolloutConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce

MODEL = pathlib.Path(__file__).parents[2] / "models" / "smollm2-135m"

CONFIG = Config(
    name="smollm2",
    model=ModelSource(folder=str(MODEL)),
    data=DataConfig(task=TwoWords(), prompts_per_step=8, max_prompt_tokens=40),
    rollout=RolloutConfig(
        samples=8,
        max_tokens=20,
        stop_strings=("\n",),
        precision=Precision(weights="int8"),
        tokens_per_dispatch=4,
    ),
    algorithm=AlgorithmConfig(
        advantage=advantages.grpo,
        surrogate=corrections.decoupled(partial(policy.clipped, clip_low=0.2, clip_high=0.24)),
        reduce=reduce.token_mean,
        microbatches=2,
        row_length=128,
        learning_rate=1e-5,
        lr_warmup_steps=3,
        beta2=0.99,
    ),
    constraint=ConstraintConfig(
        shaping=constraint.shape_advantage,
        dual=constraint.projected_ascent,
        tolerance=0.013,
    ),
    eval=EvalConfig(every=10, prompts=128),
    checkpoint=CheckpointConfig(every=0),
    steps=20,
)
