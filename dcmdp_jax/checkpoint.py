"""Checkpoints: everything a run needs to go on as if it had not stopped."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dcmdp_jax.records import TrainState


class Checkpoints:
    """`workdir/checkpoints`, one folder a step, written whole or not at all; the last `keep` are kept.

    Of several processes each writes its own shards, and all must call: a folder gets its name when the last is done.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Any, seed: int) -> None:
        """Saves params, optimizer, dual and counters, the data position, and the seed: with the step, the PRNG's state.

        Returns once the state may be donated; the disk is written while training goes on, and `close` waits for it.
        """
        step = int(state.step)
        if step == self.latest:
            return
        rest = {"data": position, "seed": seed}
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), rest=ocp.args.JsonSave(rest)))

    def restore(self, like: TrainState) -> tuple[TrainState, Any]:
        """The newest checkpoint as (state, data position), laid out as `like` (shapes with shardings).

        Raises ValueError where the checkpoint does not fit the model.
        """
        return _restore(self._manager, self.latest, ocp.args.StandardRestore(like))

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def read(workdir: pathlib.Path, step: int, like: TrainState) -> tuple[TrainState, Any]:
    """Checkpoint `step` of a run that may be going on, as (state, data position); nothing in the folder is touched.

    The optimizer's moments are not read: `opt_state` is None. Raises ValueError where the checkpoint does not fit the model.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    wanted = like._replace(opt_state=jax.tree.map(lambda _: ocp.PLACEHOLDER, like.opt_state))
    with contextlib.closing(ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)) as manager:
        places = ocp.checkpoint_utils.construct_restore_args(wanted)
        state, position = _restore(manager, step, ocp.args.PyTreeRestore(wanted, restore_args=places))
    return state._replace(opt_state=None), position


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a run's whole checkpoints, oldest first."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def _restore(manager: ocp.CheckpointManager, step: int, state: Any) -> tuple[TrainState, Any]:
    args = ocp.args.Composite(state=state, rest=ocp.args.JsonRestore())
    try:
        found = manager.restore(step, args=args)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {step} in {manager.directory} does not fit this experiment's model and optimizer, or is "
                         f"damaged: {error}") from error
    return found["state"], found["rest"]["data"]
