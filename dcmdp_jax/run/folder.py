"""A run's work folder: who may write to it, and which run it holds."""

from __future__ import annotations

import json
import pathlib
from typing import IO

import jax

from dcmdp_jax import files
from dcmdp_jax.config import Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.run import checkpoint, lock, staging
from dcmdp_jax.run.record import (
    RECORD_FILE,
    differences,
    lacks_field,
    read_record,
    to_json,
)

# What may differ between the two parts of a run that is resumed: its length, where it runs, and
# what only watches it.
MAY_CHANGE = (
    "steps",
    "mesh",
    "rollout.devices",
    "rollout.mesh",
    "rollout.slots",
    "rollout.server",
    "rollout.weights_folder",
    "data.verifier_timeout",
    "data.verifier_processes",
    "algorithm.microbatches",
    "algorithm.max_skipped",
    "eval",
    "checkpoint",
    "tensorboard",
    "wandb",
)


def claim(workdir: pathlib.Path, config: Config) -> IO[str] | staging.Lock | None:
    """Locks `workdir` and writes the configuration there, or checks that the run in it is this one.

    All processes must call. Returns the lock, held until it is closed, on process 0; None on the
    others. Raises ValueError where another process uses the folder, where it holds a run that
    differs in more than `MAY_CHANGE`, and where it is not shared with process 0.
    """
    staged = staging.of(workdir)
    if staged:
        staged.writes = jax.process_index() == 0
    held = None
    with processes.raise_on_all():
        if jax.process_index() == 0:
            held = staged.take() if staged else lock.take(workdir)
    try:
        with processes.raise_on_all():
            if staged:  # the last holder of the lock may have written since it was read
                staged.refresh()
            check_is_same_run(workdir, config)
        with processes.raise_on_all():
            if jax.process_index() == 0:
                if not checkpoint.steps(workdir):
                    metrics.set_aside(workdir)
                write_config(workdir, config)
                staging.upload(workdir)
        with processes.raise_on_all():
            if not staged and not (workdir / RECORD_FILE).is_file():
                raise ValueError(
                    f"{workdir.absolute()} is not on a file system shared with process 0; give "
                    "another --workdir"
                )
    except (ValueError, OSError):
        if held:
            held.close()
        raise
    return held


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes the resolved configuration beside the run, atomically: a run that is killed here can
    still be resumed.
    """
    files.write_atomic(workdir / RECORD_FILE, json.dumps(to_json(config), indent=2) + "\n")


def check_is_same_run(workdir: pathlib.Path, config: Config) -> None:
    """Raises ValueError where the run in `workdir` differs from `config` in what may not change."""
    if not checkpoint.begun(workdir):
        return
    now = to_json(config)
    before = read_record(workdir)
    for name, (old, new) in differences(before, now).items():
        if f"{name}.".startswith(tuple(f"{free}." for free in MAY_CHANGE)):
            continue
        if lacks_field(name, before) or lacks_field(name, now):
            raise ValueError(
                f"{workdir} holds a run of another version or experiment: only one of its record "
                f"and this configuration has {name}; go on with what began it, or choose another "
                "--workdir"
            )
        is_scalar = not isinstance(old, dict) and not isinstance(new, dict)
        difference = f"{name}={old}, not {new}" if is_scalar else f"another {name}"
        raise ValueError(
            f"{workdir} holds a run with {difference}; choose another --workdir, or the old value "
            f"(only {', '.join(MAY_CHANGE)} may change)"
        )
