"""Do the arms order alike in a Mixture-of-Experts, and what does replaying the routing do?

Eight experts, two a token. `replay` trains with the experts that the int4 engine chose; `top1` is
an exact engine whose router takes one expert a token, `top1-replay` the same with the trainer
taking that one too.

Command:  dcmdp study experiments/laptop/experts.py
Hardware: two CPU cores
Time:     16 minutes, with three warm-ups
Result:   GRPO ends at 0.17 of 0.56, |delta| shaping at 0.00; replay takes the router's gap away and
          is not shown to help
"""

import dataclasses

from chain import ARMS, EXPERTS, with_engine

from dcmdp_jax.config import ModelSource, Precision
from dcmdp_jax.tools.study import Study


def replayed(arm):
    return dataclasses.replace(
        arm, algorithm=dataclasses.replace(arm.algorithm, replay_routing=True)
    )


SPARSE = {
    name: dataclasses.replace(arm, model=ModelSource(architecture=EXPERTS))
    for name, arm in ARMS.items()
}
TOP1 = with_engine(SPARSE["grpo"], Precision(experts_per_token=1))

STUDY = Study(
    SPARSE | {"replay": replayed(SPARSE["grpo"]), "top1": TOP1, "top1-replay": replayed(TOP1)},
    seeds=3,
)
