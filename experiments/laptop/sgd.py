"""Is it Adam? Plain descent, whose step is linear in the gradients, under the engine of
multiplier.py.

Adam divides by the root of the second moments, so that a small gradient of one sign moves a
parameter as far as a large one. The rate is the larger of the two at which seed 0 learns most
without a gap (of 3e-4 to 0.3; 1e-2 is too large).

Command:  dcmdp study experiments/laptop/sgd.py
Hardware: two CPU cores
Time:     4 minutes
Result:   as with Adam: 0.79 without a gap, GRPO 0.12, |delta| 0.05 under it, penalty 0.41 and
          signed 0.47 over it
"""

import dataclasses

from chain import FLOAT32, HARMED, with_engine, with_fixed_multiplier, with_penalty

from dcmdp_jax import constraint, optimizers
from dcmdp_jax.tools.study import Study

SGD = dataclasses.replace(
    HARMED,
    algorithm=dataclasses.replace(HARMED.algorithm, optimizer=optimizers.sgd, learning_rate=3e-3),
)

STUDY = Study(
    {
        "none": with_engine(SGD, FLOAT32),
        "grpo": SGD,
        "abs": with_fixed_multiplier(constraint.shape_advantage, 0.1, SGD),
        "signed": with_fixed_multiplier(constraint.shape_signed, 0.1, SGD),
        "penalty": with_penalty(0.1, SGD),
    },
    seeds=3,
)
