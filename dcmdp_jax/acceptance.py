"""Updates are kept or undone by a batch that was sampled after them (`algorithm.accept`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.config import Config
from dcmdp_jax.records import Batch, Before, TrainState


def keep_or_undo(
    state: TrainState,
    new: TrainState,
    old_logp: jax.Array,
    batch: Batch,
    advantage: jax.Array,
    config: Config,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns `new`, the state after a step, if `algorithm.accept` accepts the updates of the step
    before; otherwise with parameters and optimizer state from before those. And as a metric, which
    of the two.

    No update is judged twice: the batch after one that undid a step trains.

    Args:
        state: before the step.
        old_logp, advantage: [M, A, n, T] and [M, A, n, 1 or T], of the batch that the step took.
    """
    if not config.algorithm.accept:
        return new, {}
    width = batch.mask.shape[-1]
    accepted = config.algorithm.accept(
        old_logp.reshape(-1, width),
        batch.rollout_logp.reshape(-1, width),
        jnp.broadcast_to(advantage, batch.mask.shape).reshape(-1, width),
        batch.mask.reshape(-1, width),
    )
    before = state.before
    accepted |= ~before.pending
    params, opt_state, before = jax.lax.cond(
        accepted,
        lambda: (
            new.params,
            new.opt_state,
            Before(state.params, state.opt_state, jnp.bool_(True)),
        ),
        lambda: (before.params, before.opt_state, before._replace(pending=jnp.bool_(False))),
    )
    new = new._replace(params=params, opt_state=opt_state, before=before)
    return new, {"accepted": accepted.astype(jnp.float32)}
