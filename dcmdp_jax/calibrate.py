"""The tolerance measured, not copied: the floor of delta at fixed weights, in the run's own engine
and trainer.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from dcmdp_jax import checkpoint, constraint, files, sharding, step
from dcmdp_jax.config import Calibrated, Config, ModelConfig, with_tolerance
from dcmdp_jax.constraint import Calibration
from dcmdp_jax.records import Batch
from dcmdp_jax.run_record import RECORD_FILE

FILE = "calibration.json"
RECORDED = {"slack": files.NUMBER, "batches": files.INTEGER, "tolerance": files.NUMBER}
# number of the first batch: no step's, so that calibration shares no key with training
FIRST = 2**30
DIGITS = 4  # of a tolerance: its error is far larger


def measure_floor(
    config: Config,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    params: Any,
    batches: Iterable[Batch],
    slack: float,
) -> Calibration:
    """`constraint.calibrate_tolerance` of batches that an engine with the weights `params` sampled.

    Raises ValueError where the engine gave no token a finite log-prob.
    """
    places = step.state_shardings(config, model, mesh).params
    whole = sharding.replicated(mesh)
    measured = jax.jit(
        sharding.with_mesh(mesh, partial(_measure, config=config, model=model)),
        in_shardings=(places, step.batch_shardings(config, mesh)),
        out_shardings=whole,
    )
    sums, counts = zip(*(map(float, measured(params, batch)) for batch in batches))
    found = constraint.calibrate_tolerance(np.array(sums), np.array(counts), slack=slack)
    if not found.batches:
        raise ValueError(
            "the engine reported no finite log-prob for any token, so there is no floor of delta to measure"
        )
    return found


def _measure(
    params: Any, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    old_logp, _ = step.score(params, batch, config, model)
    flat = (x.reshape(-1, x.shape[-1]) for x in (old_logp, batch.rollout_logp, batch.mask))
    return constraint.measure(*flat)


def rounded_tolerance(found: Calibration) -> float:
    """The number that a run uses, to four digits."""
    return float(f"{float(found.tolerance):.{DIGITS}g}")


def tolerance_error(found: Calibration, slack: float) -> float:
    """Standard error of c = max(floor (1 + slack), floor + 3 s), s the floor's standard error over
    K batches.

    (1 + slack) s where the slack decides, else s sqrt(1 + 9 / (2 (K - 1))), for s is itself known
    to s / sqrt(2 (K - 1)).
    """
    error = float(found.std_error)
    batches = float(found.batches)
    if slack * float(found.floor) >= 3 * error:
        return (1 + slack) * error
    return error * math.sqrt(1 + 9 / (2 * max(batches - 1, 1)))


def describe(found: Calibration, slack: float) -> str:
    """The floor and the tolerance with their standard errors, and how the one follows from the
    other.
    """
    level, error, _, batches = map(float, found)
    rule = (
        f"floor x {1 + slack:g}"
        if slack * level >= 3 * error
        else "floor + 3 standard errors; more batches narrow it"
    )
    return (
        f"floor of delta  {level:.{DIGITS}g} ± {error:.1g}  ({batches:.0f} batches at fixed weights)\n"
        f"tolerance       {rounded_tolerance(found):g} ± {tolerance_error(found, slack):.1g}  ({rule})"
    )


def write(found: Calibration, wanted: Calibrated, workdir: pathlib.Path) -> None:
    """Records in `workdir` what a run measured and which tolerance it uses from now on."""
    record = {
        "slack": wanted.slack,
        "batches": wanted.batches,
        "floor": float(found.floor),
        "floor_std_error": float(found.std_error),
        "tolerance": rounded_tolerance(found),
        "tolerance_std_error": tolerance_error(found, wanted.slack),
    }
    files.write_json(workdir / FILE, record)


def read(workdir: pathlib.Path) -> dict[str, float]:
    """What `write` has recorded. Raises ValueError where that is damaged."""
    file = workdir / FILE
    try:
        record = files.read_json_object(file)
        files.check_fields(record, RECORDED, str(file))
    except ValueError as error:
        raise ValueError(
            f"{error}; {RECORD_FILE} beside it holds the tolerance: set --constraint.tolerance to it "
            f"and move {FILE} away"
        ) from None
    return {name: record[name] for name in RECORDED}


def settings(config: Config, workdir: pathlib.Path) -> Calibrated:
    """What the experiment asks for, else what the run in `workdir` was measured with, else the
    defaults.
    """
    if isinstance(config.constraint.tolerance, Calibrated):
        return config.constraint.tolerance
    if (workdir / FILE).is_file():
        record = read(workdir)
        return Calibrated(record["slack"], record["batches"])
    return Calibrated()


def with_recorded_tolerance(config: Config, workdir: pathlib.Path) -> Config:
    """`config` with the tolerance that the run in `workdir` measured at its start, if there is such
    a run.
    """
    wanted = config.constraint.tolerance
    file = workdir / FILE
    if not (isinstance(wanted, Calibrated) and checkpoint.steps(workdir) and file.is_file()):
        return config
    record = read(workdir)
    if (record["slack"], record["batches"]) != (wanted.slack, wanted.batches):
        raise ValueError(
            f"{workdir} holds a run calibrated with slack={record['slack']} and batches={record['batches']}, "
            f"not {wanted.slack} and {wanted.batches}; choose another --workdir, or the old values"
        )
    return with_tolerance(config, record["tolerance"])
