"""Does the constraint help where the engine holds its weights in int4? Eight arms, two learning
rates, five seeds.

Command:  dcmdp study experiments/laptop/main.py
Hardware: two CPU cores
Time:     73 core-minutes of steps for seventy of the runs, beside other work
Result:   in ten pairs IcePop is behind GRPO, at 3e-4 so is DC-GRPO; nothing is shown to be ahead of
          it
"""

from chain import ARMS, FAST, SLOW, with_learning_rate

from dcmdp_jax.tools.study import Study

STUDY = Study(
    {
        f"{name}-{rate:g}": with_learning_rate(arm, rate)
        for rate in (FAST, SLOW)
        for name, arm in ARMS.items()
    },
    seeds=5,
)
