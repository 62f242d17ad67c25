"""Which tokens make the difference? Shaping on one sign of the advantage, or of the gap, alone.

The engine is that of multiplier.py.

Command:  dcmdp study experiments/laptop/split.py
Hardware: two CPU cores
Time:     4 minutes
Result:   at lambda 0.1 crediting what the engine finds likelier is the half that helps; charging
          either half does not
"""

from functools import partial

import jax.numpy as jnp
from chain import HARMED, with_fixed_multiplier

from dcmdp_jax import constraint
from dcmdp_jax.tools.study import Study


def where(chosen, shaped):
    """`shaped` where `chosen(advantage, gap)` says so, the advantage as it is elsewhere; the gap is
    trainer minus engine.
    """
    return partial(_where, chosen=chosen, shaped=shaped)


def _where(advantage, old_logp, rollout_logp, multiplier, tolerance, mask, *, chosen, shaped):
    gap = constraint.signed_delta(old_logp, rollout_logp, mask)
    part = mask.astype(bool) & chosen(jnp.broadcast_to(advantage, gap.shape), gap)
    plain = constraint.shape_advantage(advantage, old_logp, rollout_logp, 0.0, tolerance, mask)
    return jnp.where(
        part, shaped(advantage, old_logp, rollout_logp, multiplier, tolerance, mask), plain
    )


def failed(advantage, gap):
    return advantage < 0


def succeeded(advantage, gap):
    return advantage > 0


def engine_likelier(advantage, gap):
    return gap < 0


def trainer_likelier(advantage, gap):
    return gap > 0


STUDY = Study(
    {
        f"signed-{part.__name__}": with_fixed_multiplier(
            where(part, constraint.shape_signed), 0.1, HARMED
        )
        for part in (failed, succeeded)
    }
    # abs and signed charge what the trainer finds likelier alike; they differ on what the engine
    # finds likelier.
    | {
        "charge-trainer_likelier": with_fixed_multiplier(
            where(trainer_likelier, constraint.shape_advantage), 0.1, HARMED
        ),
        "charge-engine_likelier": with_fixed_multiplier(
            where(engine_likelier, constraint.shape_advantage), 0.1, HARMED
        ),
        "credit-engine_likelier": with_fixed_multiplier(
            where(engine_likelier, constraint.shape_signed), 0.1, HARMED
        ),
    },
    seeds=3,
)
