"""What does a coarse engine cost a language model, and which correction gets it back?

The task and the rates of smollm2.py; the engine's weights are nf4 in groups of 32 (delta 0.07 to
0.11), and eight arms differ in what they make of the gap:

    exact     an engine without a gap
    grpo      nothing
    tis       importance weights up to 2
    icepop    tokens whose ratio is outside of 0.5 to 5 are left out
    dcgrpo    |delta| shaping, the paper's dual and constants, c 1.2 times the floor of the pilots
    signed    the signed form with lambda 1
    penalty   0.3 times mean delta is added to the loss
    rounded   the trainer's forward pass has the engine's rounding, straight through

The fixed multipliers are a tenth of those that stopped the pilots from learning. As fixed before
the first run: the outcome is the held-out pass rate of the engine's policy at the end, against
`grpo` in pairs of one seed; beside it, the trainer's rate less the engine's, which is what is lost
when the engine is what gets deployed.

Command:  bash experiments/language/get_smollm2.sh && dcmdp study experiments/language/nf4.py
Hardware: two CPU cores, 14 GiB of memory
Time:     15 to 20 minutes a run, two runs at once on two cores; 24 runs
Result:   the engine's pass rate at the end, means of three seeds (RESULTS.md): 0.98 without a gap,
          0.97 under GRPO, 0.98 from a trainer that rounds as the engine does, 0.96 under the
          penalty, 0.95 under DC-GRPO, whose trainer ends at 0.71, 0.94 under TIS, 0.87 under
          IcePop, 0.70 under the signed form
"""

import dataclasses
from functools import partial

from smollm2 import CONFIG

from dcmdp_jax import constraint
from dcmdp_jax.config import Config, ConstraintConfig, Precision
from dcmdp_jax.losses import corrections, policy
from dcmdp_jax.tools.study import Study

CLIPPED = partial(policy.clipped, clip_low=0.2, clip_high=0.24)


def arm(
    *,
    shaping=None,
    penalty=None,
    multiplier: float = 0.0,
    dual_lr: float = 0.0,
    precision: Precision = Precision("nf4", group=32),
    correction=None,
    quantize_aware: bool = False,
) -> Config:
    """GRPO under the coarse engine, but for what is named."""
    surrogate = (
        corrections.decoupled(CLIPPED, correction) if correction else CONFIG.algorithm.surrogate
    )
    return dataclasses.replace(
        CONFIG,
        rollout=dataclasses.replace(CONFIG.rollout, precision=precision),
        algorithm=dataclasses.replace(
            CONFIG.algorithm, surrogate=surrogate, quantize_aware=quantize_aware
        ),
        constraint=ConstraintConfig(
            shaping=shaping,
            penalty=penalty,
            dual=constraint.projected_ascent,
            tolerance=0.088,
            dual_lr=dual_lr,
            multiplier_init=multiplier,
        ),
        eval=dataclasses.replace(CONFIG.eval, every=12, prompts=256),
        steps=24,
    )


STUDY = Study(
    {
        "exact": arm(precision=Precision()),
        "grpo": arm(),
        "tis": arm(correction=corrections.tis(2.0)),
        "icepop": arm(correction=corrections.icepop(0.5, 5.0)),
        "dcgrpo": arm(shaping=constraint.shape_advantage, multiplier=0.1, dual_lr=1.0),
        "signed": arm(shaping=constraint.shape_signed, multiplier=1.0),
        "penalty": arm(penalty=constraint.penalty, multiplier=0.3),
        "rounded": arm(quantize_aware=True),
    },
    seeds=3,
)
