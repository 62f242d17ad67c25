"""Checkpoints: everything a run needs to go on as if it had not stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import lax

from dcmdp_jax import errors, sharding
from dcmdp_jax.distributed import processes
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import TrainState
from dcmdp_jax.run import staging

WARMUP = "warmup"  # in the run's work folder; holds the checkpoints of its supervised stage
FROZEN = "frozen"  # folder of the run's work folder
_OS_ERROR = "os_error_code"  # in the message of a ValueError of TensorStore
REASON = 200  # characters of an error of Orbax in a message


class NoReadableCheckpoint(processes.Refused):
    """No checkpoint can be read: there is none, or all are damaged or of another model."""


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, one folder per step; the last `keep` stay.

    What is frozen (`TrainState.frozen`) is written once, with the first checkpoint, to
    `workdir/frozen`.

    A checkpoint is written atomically. Where there are several processes each writes its own
    shards, and all must call: the folder gets its name when the last process is done.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        self._workdir = workdir
        root = epath.Path(staging.root(workdir))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(root / "checkpoints", options=options)
        self._frozen = root / FROZEN
        self._has_frozen = bool(self._manager.all_steps())
        logging.getLogger("absl").addFilter(_is_not_saving_error)
        sys.unraisablehook = _tell_unraisable

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    @phase("saving a checkpoint")
    def save(self, state: TrainState, prompt_state: Any) -> None:
        """Saves a state and that of the prompt iterator; nothing where its step is saved already.

        A checksum of each leaf is saved with it. Returns once the state may be donated; the disk is
        written while training goes on, and `close` waits for it. Raises OSError where this
        checkpoint, or the one before, cannot be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        if staging.of(self._workdir):
            with processes.raise_on_all():  # before the checkpoint that goes on from these rows
                staging.upload(self._workdir)
        with self._failure_as_os_error():
            if jax.tree.leaves(state.frozen) and not self._has_frozen:
                checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
                checkpointer.save(self._frozen, args=_with_checksums(state.frozen), force=True)
                self._has_frozen = True
            args = _with_checksums(state._replace(frozen=()), prompt_state)
            self._manager.save(step, args=args)

    @phase("saving a checkpoint")
    def wait(self) -> None:
        """Waits until the last `save` is on the disk. Raises OSError where it cannot be written."""
        with self._failure_as_os_error():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failure_as_os_error(self) -> Iterator[None]:
        """Raises OSError where TensorStore raises ValueError because it cannot write a file, and
        names the remedy where a checkpoint cannot be given its name.
        """
        try:
            yield
        except OSError as error:
            if error.filename2 is None:  # not of a rename
                raise
            raise OSError(
                f"{self._manager.directory} is on a file system that cannot rename a folder "
                f"({error.strerror}), and so no checkpoint can be finished; mount a bucket with a "
                "hierarchical namespace, or by gcsfuse --rename-dir-limit 200000, or give another "
                "--workdir"
            ) from error
        except Exception as error:
            in_bucket = staging.of(self._workdir)  # whose libraries have errors of many kinds
            if not in_bucket and not (isinstance(error, ValueError) and _OS_ERROR in str(error)):
                raise
            cause = ": ".join(_first_line(error).split(": ")[-2:])  # without TensorStore's own path
            raise OSError(
                f"a checkpoint cannot be written to {self._manager.directory}: {cause[:REASON]}"
            ) from error

    @phase("reading the newest checkpoint")
    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """Returns (state, state of the prompt iterator) of the newest intact checkpoint, or None
        where there are no checkpoints.

        Newer checkpoints that are damaged are named on stderr and renamed to N.damaged, so that
        their steps can be saved again. Raises NoReadableCheckpoint, with no file changed, where all
        are damaged or none fits the model, and where that holds for what is frozen.

        Args:
            like: shapes with the shardings that the state is to have.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        reader = ocp.StandardCheckpointHandler()
        frozen = _read_frozen(self._frozen, like.frozen)
        (state, prompt_state), damaged = _newest_intact(
            self._manager.directory,
            steps,
            reader,
            ocp.args.StandardRestore(like._replace(frozen=())),
        )
        with processes.raise_on_all():
            if jax.process_index() == 0:
                for step in damaged:
                    _rename_damaged(self._manager.directory / str(step))
        if damaged:
            self._manager.reload()
        return state._replace(frozen=frozen), prompt_state

    def close(self) -> None:
        """Waits until everything is on the disk. Raises OSError where it cannot be written."""
        try:
            self.wait()
        finally:
            self._manager.close()


_PREVIOUS_HOOK = sys.unraisablehook


def _tell_unraisable(unraisable: Any) -> None:
    """Prints an exception that nobody can catch, but for the one that follows a failed write:
    Orbax closes its event loop then, which the callbacks of the other writes find closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        _PREVIOUS_HOOK(unraisable)


def _is_not_saving_error(record: logging.LogRecord) -> bool:
    """False if Orbax logs an exception of its saving thread: `save` or `close` raises it, too."""
    return not (record.exc_info and "orbax" in record.pathname)


def read(
    workdir: pathlib.Path,
    like: TrainState,
    before: float = math.inf,
    unread: Sequence[str] = ("opt_state", "before"),
) -> tuple[TrainState, Any]:
    """Returns (state, state of the prompt iterator) of the newest intact checkpoint whose step is
    less than `before`; the run may be going on.

    No file is changed; damaged checkpoints are named on stderr. Raises NoReadableCheckpoint where
    there is no such checkpoint, or none fits the model.

    Args:
        like: shapes with the shardings that the state is to have.
        unread: fields of the state that are left on the disk; they are None.
    """
    frozen_like = None if "frozen" in unread else like.frozen
    left = {name: getattr(like, name) for name in unread}
    left = jax.tree.map(lambda _: ocp.PLACEHOLDER, left) | {"frozen": ()}
    like = like._replace(**left)
    numbers = [step for step in reversed(steps(workdir)) if step < before]
    if not numbers:
        raise NoReadableCheckpoint(f"{workdir} holds no checkpoints; give the run's --workdir")
    args = ocp.args.PyTreeRestore(
        like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
    )
    root = epath.Path(staging.root(workdir))
    frozen = _read_frozen(root / FROZEN, frozen_like)
    (state, prompt_state), _ = _newest_intact(
        root / "checkpoints", numbers, ocp.PyTreeCheckpointHandler(), args
    )
    return state._replace(frozen=frozen), prompt_state


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of a run's checkpoints, oldest first."""
    if staging.of(workdir):  # where an unfinished one has the name of a finished one
        folder = epath.Path(staging.root(workdir)) / "checkpoints"
        names = [path.name for path in ocp.utils.checkpoint_steps_paths(folder)]
        return sorted(int(name) for name in names if name.isdigit())
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
    )


def begun(workdir: pathlib.Path) -> bool:
    """True if a run, or its supervised stage, has a checkpoint in `workdir`."""
    return bool(steps(workdir) or steps(workdir / WARMUP))


def _with_checksums(tree: Any, prompt_state: Any = None) -> ocp.args.Composite:
    """What Orbax writes of a tree and the state of the prompt iterator."""
    rest = {"data": prompt_state, "checksums": checksums(tree)}
    rest |= {"checksum": _text_checksum(rest)}
    stored = jax.tree.map(_as_stored, tree)
    return ocp.args.Composite(state=ocp.args.StandardSave(stored), rest=ocp.args.JsonSave(rest))


def _read_frozen(folder: epath.Path, like: Any) -> Any:
    """What `Checkpoints` wrote of `TrainState.frozen`; `like` itself where nothing is frozen.

    Raises NoReadableCheckpoint where it cannot be read, or does not fit the model.
    """
    if not jax.tree.leaves(like):
        return like
    reader = ocp.StandardCheckpointHandler()
    stored = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, _stored_dtype(w), sharding=w.sharding), like
    )
    try:
        with processes.raise_on_all():
            frozen, rest = _read(folder, reader, ocp.args.StandardRestore(stored))
        with processes.raise_on_all():
            _check(frozen, rest)
    except ValueError as error:
        raise NoReadableCheckpoint(
            f"{folder}, the frozen weights of the run, does not fit this experiment's model, or is "
            f"damaged; put a copy back, or begin anew in another --workdir ({error})"
        ) from None
    return jax.tree.map(lambda w, wanted: w.astype(wanted.dtype), frozen, like)


def _as_stored(x: Any) -> Any:
    """An array in the dtype in which it is written. Another one than its own goes to the host's
    memory, an array after the other: the devices may not hold them beside the state.
    """
    if x.dtype == _stored_dtype(x):
        return x
    host = x.sharding.with_memory_kind(sharding.HOST)
    return jax.block_until_ready(jax.device_put(x.astype(_stored_dtype(x)), host))


def _stored_dtype(w: jax.Array) -> jnp.dtype:
    """The dtype in which an array is written: TensorStore has none of 4 bits."""
    return {"int4": jnp.dtype("int8"), "uint4": jnp.dtype("uint8")}.get(w.dtype.name, w.dtype)


def checksums(tree: Any) -> dict[str, str]:
    """Returns a checksum of each leaf's bits, as they are stored, by the leaf's name.

    It does not depend on the mesh or the number of processes. Leaves in the host's memory go to the
    devices one at a time.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    on_host = [leaf for leaf in leaves if leaf[1].sharding.memory_kind == sharding.HOST]
    others = [leaf for leaf in leaves if leaf[1].sharding.memory_kind != sharding.HOST]
    numbers = {}
    for group in [others, *([leaf] for leaf in on_host)]:
        for (path, _), checksum in zip(group, _checksums(tuple(leaf for _, leaf in group))):
            numbers[path] = f"{int(checksum):08x}"  # waits for it
    return {jax.tree_util.keystr(path): numbers[path] for path, _ in leaves}


@jax.jit
def _checksums(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [_checksum(jax.device_put(leaf, jax.memory.Space.Device)) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    """sum_i mix(bits_i xor i C) mod 2^32, where `mix` is a bijection of 32 bits and C is odd, so
    that i C differs between elements.

    The sum does not depend on the order of its terms. If one element differs, so does the sum; if
    several differ, two sums are equal by chance once in 2^32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    x = x.astype(_stored_dtype(x))
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(bits ^ (index * jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection: shifts and xors, products with odd numbers."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _text_checksum(record: Any) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _newest_intact(
    folder: epath.Path, steps: list[int], reader: ocp.CheckpointHandler, args: Any
) -> tuple[tuple[TrainState, Any], list[int]]:
    """What the first intact checkpoint of `steps`, newest first, holds, and the damaged steps
    before it. All processes take the same.
    """
    damaged = []
    reasons = []
    for step in steps:
        try:
            with processes.raise_on_all():
                state, rest = _read(folder / str(step), reader, args)
                unread = {
                    name: None
                    for name, part in state._asdict().items()
                    if any(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(part))
                }
                state = state._replace(**unread)
            with processes.raise_on_all():
                _check(state, rest)
        except ValueError as error:
            damaged.append(step)
            reasons.append(str(error))
            continue
        for number, reason in zip(damaged, reasons):
            _warn(
                f"checkpoint {number} in {folder} is damaged ({reason}); going on from checkpoint "
                f"{step}"
            )
        return (state, rest["data"]), damaged
    raise NoReadableCheckpoint(
        f"no checkpoint in {folder} can be read: {', '.join(map(str, steps))} do not fit this "
        "experiment's model and optimizer, or are damaged; nothing was changed (the newest: "
        f"{reasons[0]})"
    )


def _read(folder: epath.Path, reader: ocp.CheckpointHandler, args: Any) -> tuple[Any, dict]:
    """A checkpoint's tree and the rest, by Orbax's handlers: its manager would wait here for the
    other processes, for ever if one of them has raised.
    """
    try:
        rest = ocp.JsonCheckpointHandler().restore(folder / "rest", ocp.args.JsonRestore())
        tree = jax.block_until_ready(reader.restore(folder / "state", args=args))
    except MemoryError:
        raise
    # Orbax and TensorStore have no error of their own for files that are damaged
    except Exception as error:
        if errors.OUT_OF_MEMORY in str(error):
            raise
        raise ValueError(f"{type(error).__name__}: {_first_line(error)[:REASON]}") from error
    return tree, rest


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _check(tree: Any, rest: Any) -> None:
    """Raises ValueError if a checkpoint holds anything else than what was saved."""
    if not isinstance(rest, dict) or rest.keys() != {"data", "checksums", "checksum"}:
        raise ValueError("its data position is not what was saved")
    if rest["checksum"] != _text_checksum({name: rest[name] for name in ("data", "checksums")}):
        raise ValueError("its data position is not what was saved")
    for name, checksum in checksums(tree).items():
        if checksum != rest["checksums"].get(name):
            raise ValueError(f"{name} is not what was saved")


def _rename_damaged(folder: Any) -> None:
    """Renames N to N.damaged, or N.damaged.1 and so on where that exists."""
    target = folder.parent / f"{folder.name}.damaged"
    number = 0
    while target.exists():
        number += 1
        target = folder.parent / f"{folder.name}.damaged.{number}"
    folder.rename(target)


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
