"""Which half of the paper's charge sets the trainer's policy apart from the engine's?

Under A - lambda |delta| in nf4.py the trainer's policy gets worse while the engine's stays good.
The charge lowers sampled tokens of either kind, and each is charged alone here:

    charge_engine    those that the engine finds likelier than the trainer: the trainer, which had
                     them too low, is pushed further away
    charge_trainer   those that the trainer finds likelier: it is pushed back
    credit_engine    those that the engine finds likelier are credited instead (`shape_credit`)

The dual and its constants are those of `dcgrpo` in nf4.py. As fixed before the first run: if the
first half does the damage, then under `charge_engine` the trainer's pass rate less the engine's at
the end is lower than under `charge_trainer`, in pairs of one seed, and delta of the last eight
steps is larger. Under `credit_engine`, delta and the engine's pass rate against `grpo`.

Command:  bash experiments/language/get_smollm2.sh && dcmdp study experiments/language/nf4_halves.py
Hardware: two CPU cores, 14 GiB of memory
Time:     15 to 20 minutes a run, two runs at once on two cores; 9 runs
Result:   seven runs, seeds 0 and 1 of the charges: under `charge_engine` the trainer's policy ends
          0.22 and 0.47 behind the engine's, delta at 0.13 and 0.16; under `charge_trainer` level,
          delta at 0.10 and 0.09. Under `credit_engine` (three seeds) delta is 0.021 ± 0.012
          below GRPO's, the engine's pass rate 0.04 ± 0.13 below
"""

import jax.numpy as jnp
from nf4 import arm

from dcmdp_jax import constraint
from dcmdp_jax.tools.study import Study


def charge_engine(advantage, old_logp, rollout_logp, multiplier, tolerance, mask):
    """A - lambda max(pi_infer - pi_train, 0)."""
    gap = constraint.signed_delta(old_logp, rollout_logp, mask)
    return jnp.where(mask, advantage - multiplier * jnp.maximum(-gap, 0.0), 0.0)


def charge_trainer(advantage, old_logp, rollout_logp, multiplier, tolerance, mask):
    """A - lambda max(pi_train - pi_infer, 0)."""
    gap = constraint.signed_delta(old_logp, rollout_logp, mask)
    return jnp.where(mask, advantage - multiplier * jnp.maximum(gap, 0.0), 0.0)


STUDY = Study(
    {
        "charge_engine": arm(shaping=charge_engine, multiplier=0.1, dual_lr=1.0),
        "charge_trainer": arm(shaping=charge_trainer, multiplier=0.1, dual_lr=1.0),
        "credit_engine": arm(shaping=constraint.shape_credit, multiplier=0.1, dual_lr=1.0),
    },
    seeds=3,
)
