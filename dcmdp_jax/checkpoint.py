"""Checkpoints: everything a run needs to go on as if it had not stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import lax

from dcmdp_jax.distributed import processes
from dcmdp_jax.records import TrainState

REASON = 200  # characters of what Orbax says about a file


class NoReadableCheckpoint(processes.Refused):
    """There are checkpoints, and none that can be read."""


class Checkpoints:
    """`workdir/checkpoints`, one folder a step, written whole or not at all; the last `keep` are
    kept.

    Of several processes each writes its own shards, and all must call: a folder gets its name when
    the last is done.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
        logging.getLogger("absl").addFilter(_is_not_raised)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Any, seed: int) -> None:
        """Saves params, optimizer, dual and counters, the data position, and the seed: with the
        step, the PRNG's state.

        Each leaf's checksum goes with it. Returns once the state may be donated; the disk is
        written while training goes on, and `close` waits for it. Raises OSError where that, or the
        save before, cannot be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        rest = {"data": position, "seed": seed, "checksums": checksums(state)}
        rest |= {"checksum": _text_checksum(rest)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), rest=ocp.args.JsonSave(rest))
        with self._written():
            self._manager.save(step, args=args)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """TensorStore raises ValueError where a disk is full."""
        try:
            yield
        except ValueError as error:
            if "os_error_code" not in str(error):
                raise
            cause = ": ".join(_first_line(error).split(": ")[-2:])  # behind the places it came from
            raise OSError(
                f"a checkpoint cannot be written to {self._manager.directory}: {cause[:REASON]}"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """The newest whole checkpoint as (state, data position), laid out as `like` (shapes with
        shardings); None without any.

        Newer ones that are damaged are said and renamed to N.damaged, so that their steps can be
        saved anew. Raises `NoneWhole`, with every file where it was, where all are damaged, or none
        fits the model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        reader = ocp.StandardCheckpointHandler()
        found, damaged = _newest_whole(
            self._manager.directory, steps, reader, ocp.args.StandardRestore(like)
        )
        with processes.raise_on_all():
            if jax.process_index() == 0:
                for step in damaged:
                    _put_aside(self._manager.directory / str(step))
        if damaged:
            self._manager.reload()
        return found

    def close(self) -> None:
        """Waits for what is being saved. Raises OSError where it cannot be written."""
        try:
            with self._written():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for what Orbax logs of an exception in a thread that saves, which may outlive the run:
    `save` or `close` raises the exception, too.
    """
    return not (record.exc_info and "orbax" in record.pathname)


def read(
    workdir: pathlib.Path, like: TrainState, before: float = math.inf
) -> tuple[TrainState, Any]:
    """The newest whole checkpoint, of a step before `before`, of a run that may be going on, as
    (state, data position).

    Nothing in the folder is touched; what is damaged is said. The optimizer's moments are not read:
    `opt_state` is None. Raises `NoneWhole` where there is no such checkpoint, or none fits the
    model.
    """
    wanted = like._replace(opt_state=jax.tree.map(lambda _: ocp.PLACEHOLDER, like.opt_state))
    numbers = [step for step in reversed(steps(workdir)) if step < before]
    if not numbers:
        raise NoReadableCheckpoint(f"{workdir} holds no checkpoints; give the run's --workdir")
    args = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
    )
    folder = epath.Path((workdir / "checkpoints").absolute())
    (state, position), _ = _newest_whole(folder, numbers, ocp.PyTreeCheckpointHandler(), args)
    return state, position


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
    )


def checksums(tree: Any) -> dict[str, str]:
    """A checksum of each leaf's bits, by the leaf's name; the same on every mesh and number of
    processes.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree))
    return {
        jax.tree_util.keystr(path): f"{int(found):08x}"
        for path, found in zip(paths, _checksums(leaves))
    }


@jax.jit
def _checksums(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [_checksum(jax.device_put(leaf, jax.memory.Space.Device)) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    """sum_i mix(bits_i xor i C) mod 2^32, with C odd, so that places differ, and `mix` a bijection
    of 32 bits.

    A sum of integers has no order. Where a single element differs, its term does, and so does the
    sum; where several differ, two sums agree by chance, once in 2^32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(bits ^ (place * jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    """MurmurHash3's last step: xors with shifts, and products with odd numbers, each of which can
    be undone.
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _text_checksum(record: Any) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _newest_whole(
    folder: epath.Path, steps: list[int], reader: ocp.CheckpointHandler, args: Any
) -> tuple[tuple[TrainState, Any], list[int]]:
    """Of `steps`, newest first: what the first whole one holds, and those before it. All processes
    take the same.
    """
    damaged = []
    reasons = []
    for step in steps:
        try:
            with processes.raise_on_all():
                found, rest = _read(folder / str(step), reader, args)
            with processes.raise_on_all():
                _check(found, rest)
        except ValueError as error:
            damaged.append(step)
            reasons.append(str(error))
            continue
        for number, reason in zip(damaged, reasons):
            _warn(
                f"checkpoint {number} in {folder} is damaged ({reason}); going on from checkpoint {step}"
            )
        if "checksums" not in rest:
            _warn(
                f"checkpoint {step} in {folder} holds no checksums, so damage to it would not be seen"
            )
        return (found, rest["data"]), damaged
    raise NoReadableCheckpoint(
        f"no checkpoint in {folder} can be read: {', '.join(map(str, steps))} do not fit this "
        f"experiment's model and optimizer, or are damaged; nothing was changed (the newest: {reasons[0]})"
    )


def _read(folder: epath.Path, reader: ocp.CheckpointHandler, args: Any) -> tuple[TrainState, dict]:
    """A checkpoint's state, and the rest. Orbax's manager would wait for the other processes in
    here, for ever where one of them finds damage; its readers do not.
    """
    try:
        rest = ocp.JsonCheckpointHandler().restore(folder / "rest", ocp.args.JsonRestore())
        state = jax.block_until_ready(reader.restore(folder / "state", args=args))
    except MemoryError:
        raise
    # Orbax and TensorStore have no error of their own for files that are damaged
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise ValueError(f"{type(error).__name__}: {_first_line(error)[:REASON]}") from error
    if any(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(state.opt_state)):
        state = state._replace(opt_state=None)
    return state, rest


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _check(state: TrainState, rest: Any) -> None:
    """Raises ValueError where a checkpoint holds something else than was saved; those of older
    versions have no checksums.
    """
    if not isinstance(rest, dict) or rest.keys() not in (
        {"data", "seed"},
        {"data", "seed", "checksums", "checksum"},
    ):
        raise ValueError("its data position is not what was saved")
    if "checksums" not in rest:
        return
    if rest["checksum"] != _text_checksum(
        {name: rest[name] for name in ("data", "seed", "checksums")}
    ):
        raise ValueError("its data position is not what was saved")
    for name, found in checksums(state).items():
        if found != rest["checksums"].get(name):
            raise ValueError(f"{name} is not what was saved")


def _put_aside(folder: Any) -> None:
    names = (
        f"{folder.name}.damaged{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000)))
    )
    folder.rename(
        next(folder.parent / name for name in names if not (folder.parent / name).exists())
    )


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
