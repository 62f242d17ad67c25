"""Does a coarse engine cost a language model more at three times the learning rate?

`exact` and `grpo` of nf4.py at 3e-5 in place of 1e-5, for 16 steps. An arithmetic toy collapses
under a coarse engine at the highest rate that it bears without one, and not at a third of it
(RESULTS.md). As fixed before the first run: the outcome is the held-out pass rate of the engine's
policy at the end, `grpo` against `exact` in pairs of one seed.

Command:  bash experiments/language/get_smollm2.sh && dcmdp study experiments/language/nf4_rate.py
Hardware: two CPU cores, 14 GiB of memory
Time:     about 9 minutes a run, two runs at once on two cores; 6 runs
Result:   the engine's pass rate 0.99 without a gap, 0.98 under GRPO, 0.01 ± 0.04 apart
"""

import dataclasses

import nf4

from dcmdp_jax.config import Config
from dcmdp_jax.tools.study import Study


def faster(arm: Config) -> Config:
    """Returns an arm at the higher learning rate."""
    return dataclasses.replace(
        arm,
        algorithm=dataclasses.replace(arm.algorithm, learning_rate=3e-5),
        eval=dataclasses.replace(arm.eval, every=8),
        steps=16,
    )


STUDY = Study({name: faster(nf4.STUDY.arms[name]) for name in ("exact", "grpo")}, seeds=3)
