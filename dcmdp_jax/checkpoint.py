"""Checkpoints: everything a run needs to go on as if it had not stopped."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dcmdp_jax.records import TrainState


class Checkpoints:
    """`workdir/checkpoints`, one folder a step, written whole or not at all; the last `keep` are kept."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Any, seed: int) -> None:
        """Saves params, optimizer, dual and counters, the data position, and the seed: with the step, the PRNG's state.

        Returns once the state may be donated; `close` waits for the disk.
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
        step = self.latest
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), rest=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint {step} in {self._manager.directory} does not fit this experiment's model "
                             f"and optimizer, or is damaged: {error}") from error
        return found["state"], found["rest"]["data"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def exists(workdir: pathlib.Path) -> bool:
    """Whether a run's folder holds a whole checkpoint."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, what `restore` lays a checkpoint out as."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)
