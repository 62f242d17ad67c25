"""Calibration: the tolerance measured by the run itself, from the discrepancy at fixed weights.

At fixed weights the mean of delta is what numerics alone make of it, its floor: no multiplier can
push it lower. A tolerance is a margin above that floor.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from dcmdp_jax import constraint, files, objective, sharding, train_state, trainer_scores
from dcmdp_jax.batches import Batches
from dcmdp_jax.config import Calibrated, Config, with_tolerance
from dcmdp_jax.constraint import Calibration
from dcmdp_jax.distributed import processes
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import Batch, TrainState
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run import folder as run_folder
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.run.record import RECORD_FILE
from dcmdp_jax.seeds import Stream
from dcmdp_jax.stopping import NotKept

FILE = "calibration.json"
RECORDED = {"slack": files.NUMBER, "batches": files.INTEGER, "tolerance": files.NUMBER}
DIGITS = 4  # significant digits of a tolerance, whose error is far larger


@phase("measuring the floor of delta")
def run(
    config: Config, inputs: Inputs, workdir: pathlib.Path, state: TrainState, batches: Batches
) -> Config:
    """Measures the tolerance at the weights of `state` and records it in `workdir`.

    All processes must call. Returns `config` with the measured tolerance. The prompts that measure
    it come again in the first steps. Raises `stopping.NotKept` where the run is asked to stop.
    """
    options = config.constraint.tolerance
    prompt_state = inputs.prompts.get_state()
    processes.log0(f"measuring the floor of delta over {options.batches} batches")

    def collected() -> Iterator[Batch]:  # one at a time: a batch takes memory of the devices
        for number in range(options.batches):
            batch = batches.collect(Stream.CALIBRATION, number)
            if batch is None:
                raise NotKept("stopped in the calibration of the tolerance, which is not kept")
            yield batch.packed

    params, _ = train_state.sampled_from(state, config)
    calibration = measure_floor(
        config, inputs.model_config, inputs.mesh, params, collected(), options.slack
    )
    inputs.prompts.set_state(prompt_state)
    processes.log0(describe(calibration, options.slack))
    config = with_tolerance(config, rounded_tolerance(calibration))
    if jax.process_index() == 0:
        write(calibration, options, workdir)
        run_folder.write_config(workdir, config)
    return config


def measure_floor(
    config: Config,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    params: Any,
    batches: Iterable[Batch],
    slack: float,
) -> Calibration:
    """Returns `constraint.calibrate_tolerance` of batches that were sampled with `params`.

    Raises ValueError where the engine gave no token a finite log-prob.
    """
    measure = jax.jit(
        sharding.with_mesh(mesh, partial(_measure, config=config, model=model)),
        in_shardings=(
            None,  # as `params` lie
            train_state.batch_shardings(config, mesh),
        ),
        out_shardings=sharding.replicated(mesh),
    )
    # each is waited for: the next batch is sampled when nothing else runs
    sums, counts = zip(*(tuple(map(float, measure(params, batch))) for batch in batches))
    calibration = constraint.calibrate_tolerance(np.array(sums), np.array(counts), slack=slack)
    if not calibration.batches:
        raise ValueError(
            "the engine reported no finite log-prob for any token, so there is no floor of delta "
            "to measure"
        )
    return calibration


def _measure(
    params: Any, batch: Batch, *, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Sum of delta over the tokens of a batch, and how many there are."""
    batch = objective.apply_mask(batch, config)
    old_logp, _ = trainer_scores.score(params, batch, config, model)
    flat = (x.reshape(-1, x.shape[-1]) for x in (old_logp, batch.rollout_logp, batch.mask))
    return constraint.measure(*flat)


def rounded_tolerance(calibration: Calibration) -> float:
    """Returns the tolerance that a run uses: four significant digits."""
    return float(f"{float(calibration.tolerance):.{DIGITS}g}")


def tolerance_error(calibration: Calibration, slack: float) -> float:
    """Returns the standard error of c = max(floor (1 + slack), floor + 3 s), where s is the floor's
    standard error over K batches.

    (1 + slack) s where the slack decides; else s sqrt(1 + 9 / (2 (K - 1))), because s itself has
    the standard error s / sqrt(2 (K - 1)).
    """
    error = float(calibration.std_error)
    batches = float(calibration.batches)
    if slack * float(calibration.floor) >= 3 * error:
        return (1 + slack) * error
    return error * math.sqrt(1 + 9 / (2 * max(batches - 1, 1)))


def describe(calibration: Calibration, slack: float) -> str:
    """Returns two lines: the floor and the tolerance, with their standard errors and the rule that
    gives the second from the first.
    """
    floor, error, _, batches = map(float, calibration)
    rule = (
        f"floor x {1 + slack:g}"
        if slack * floor >= 3 * error
        else "floor + 3 standard errors; more batches narrow it"
    )
    tolerance = rounded_tolerance(calibration)
    return (
        f"floor of delta  {floor:.{DIGITS}g} ± {error:.1g}  "
        f"({batches:.0f} batches at fixed weights)\n"
        f"tolerance       {tolerance:g} ± {tolerance_error(calibration, slack):.1g}  ({rule})"
    )


def write(calibration: Calibration, options: Calibrated, workdir: pathlib.Path) -> None:
    """Records in `workdir` what a run measured, and the tolerance that it uses from now on."""
    record = {
        "slack": options.slack,
        "batches": options.batches,
        "floor": float(calibration.floor),
        "floor_std_error": float(calibration.std_error),
        "tolerance": rounded_tolerance(calibration),
        "tolerance_std_error": tolerance_error(calibration, options.slack),
    }
    files.write_json(workdir / FILE, record)


def read(workdir: pathlib.Path) -> dict[str, float]:
    """Returns slack, batches and tolerance as `write` recorded them.

    Raises ValueError where the file is damaged.
    """
    file = workdir / FILE
    try:
        record = files.read_json_object(file)
        files.check_fields(record, RECORDED, str(file))
    except ValueError as error:
        raise ValueError(
            f"{error}; {RECORD_FILE} beside it holds the tolerance: set --constraint.tolerance to "
            f"it and move {FILE} away"
        ) from None
    return {name: record[name] for name in RECORDED}


def settings(config: Config, workdir: pathlib.Path) -> Calibrated:
    """Returns the experiment's calibration settings, else those of the run in `workdir`, else the
    defaults.
    """
    if isinstance(config.constraint.tolerance, Calibrated):
        return config.constraint.tolerance
    if (workdir / FILE).is_file():
        record = read(workdir)
        return Calibrated(record["slack"], record["batches"])
    return Calibrated()


def with_recorded_tolerance(config: Config, workdir: pathlib.Path) -> Config:
    """Returns `config` with the tolerance that the run in `workdir` measured at its start; `config`
    itself where it needs none, or there is no such run.

    Raises ValueError where that run was calibrated with other settings.
    """
    options = config.constraint.tolerance
    file = workdir / FILE
    if not (isinstance(options, Calibrated) and checkpoint.steps(workdir) and file.is_file()):
        return config
    record = read(workdir)
    if (record["slack"], record["batches"]) != (options.slack, options.batches):
        raise ValueError(
            f"{workdir} holds a run calibrated with slack={record['slack']} and "
            f"batches={record['batches']}, not {options.slack} and {options.batches}; choose "
            "another --workdir, or the old values"
        )
    return with_tolerance(config, record["tolerance"])
