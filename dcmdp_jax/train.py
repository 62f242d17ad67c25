"""The loop: prompts -> rollout -> rewards -> the compiled step -> weight sync, over and over."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from dcmdp_jax import calibrate, compiled_step, step_metrics
from dcmdp_jax.batches import Batches
from dcmdp_jax.config import Calibrated, Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.evaluation.held_out import HeldOut
from dcmdp_jax.experiment import pin
from dcmdp_jax.monitoring import gaps, metrics, phases
from dcmdp_jax.records import TrainState
from dcmdp_jax.run import checkpoint, recovery, staging, starting
from dcmdp_jax.run import folder as run_folder
from dcmdp_jax.run.inputs import Inputs, read_inputs
from dcmdp_jax.run.record import read_record, to_json
from dcmdp_jax.stopping import Interrupted, requests


def train(
    config: Config, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Runs or resumes the experiment in `workdir`; returns the final state.

    Args:
        devices: those of all processes that the run may use; None: all there are.

    Raises ValueError on input that cannot work, before compilation. On SIGINT or SIGTERM it saves
    at the next safe point and raises `stopping.Interrupted`; the same call resumes. Raises
    `stopping.Failed` where the run cannot go on as it is.
    """
    begun = workdir.is_dir() and checkpoint.begun(workdir)
    config = pin(config, read_record(workdir) if begun else None)
    return run(config, workdir, prepare(config, workdir, devices))


def prepare(
    config: Config, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> Inputs:
    """Reads and checks everything, then claims `workdir`.

    Nothing is compiled, and bad input leaves no trace. What one process refuses, all refuse.
    """
    processes.check_same(json.dumps(to_json(config)), "configuration")
    with processes.raise_on_all(), phases.told("reading the model and the problems"):
        inputs = read_inputs(config, devices)
        config = calibrate.with_recorded_tolerance(config, workdir)
        metrics.check_loggers(config)
        if inputs.verifiers:
            inputs.verifiers.start()
    return inputs._replace(lock=run_folder.claim(workdir, config))


def run(config: Config, workdir: pathlib.Path, inputs: Inputs, at_once: bool = False) -> TrainState:
    """Takes the steps that are left, in a folder that `prepare` has claimed.

    Returns the state after the last. With `at_once` a second Ctrl-C ends the process.
    """
    with (
        inputs.lock or contextlib.nullcontext(),
        staging.uploaded(workdir),
        phases.of_run(workdir, config.name, inputs.mesh),  # tells what takes long
        requests(processes.request_stop, at_once) as signalled,
        contextlib.closing(checkpoint.Checkpoints(workdir, config.checkpoint.keep)) as saved,
    ):

        def should_stop() -> bool:
            return signalled() or processes.stop_requested()

        config = calibrate.with_recorded_tolerance(config, workdir)
        state = starting.restore(saved, config, inputs)
        first_step = int(state.step) + 1 if state else 1
        with metrics.Log(workdir, config, first_step=first_step) as log:
            if state is None:
                state = starting.first_state(
                    config, inputs, workdir, lambda: processes.any_process(should_stop())
                )
            state = _loop(config, workdir, inputs, saved, log, state, should_stop)
        saved.close()
        if int(state.step) < config.steps:
            raise Interrupted(
                f"stopped after step {int(state.step)} of {config.steps}; everything is saved in "
                f"{workdir}"
            )
    return state


def _loop(
    config: Config,
    workdir: pathlib.Path,
    inputs: Inputs,
    saved: checkpoint.Checkpoints,
    log: metrics.Log,
    state: TrainState,
    should_stop: Callable[[], bool],
) -> TrainState:
    """Returns the state after the last step, or the one that the run was asked to stop after; it is
    saved.
    """
    prompt_state = inputs.prompts.get_state()
    with recovery.saved_on_failure(config, inputs, workdir, saved, log, state) as progress:
        batches = Batches(config, inputs, state, should_stop)
        held_out = HeldOut(config, inputs, batches.sampler, should_stop)
        if isinstance(config.constraint.tolerance, Calibrated):
            config = calibrate.run(config, inputs, workdir, state, batches)
            log.set_tolerance(config.constraint.tolerance)
        saved.save(state, prompt_state)
        saved.wait()  # what cannot be saved ends the run before its first step
        update = compiled_step.compile_step(config, inputs.model_config, inputs.mesh)
        started = time.perf_counter()
        for batch in batches:  # prompts -> rollout -> rewards
            batches.before_update(state)
            state, values = update(state, batch.packed)  # advantages -> ... -> params and dual
            progress.last = recovery.StepTaken(state, values, batch.without_arrays(), started)
            batches.after_update(state)  # weight sync back to the sampler

            row = progress.last.row()
            number = int(state.step)
            prompt_state = batch.prompt_state
            if _is_due(number, config.eval.every, config.steps, first=True):
                log.write_gaps(number, _gaps(values, config, inputs))
                row |= held_out.measure(state)
                log.write_samples(number, held_out.samples)
            log.write(number, row)
            progress.check_updates(row)
            if _is_due(number, config.checkpoint.every, config.steps):
                progress.check_weights()
                saved.save(state, prompt_state)
            started = time.perf_counter()
        progress.check_weights()
    saved.save(state, prompt_state)
    return state


def _gaps(values: step_metrics.Metrics, config: Config, inputs: Inputs) -> dict:
    """The row of `gaps.jsonl`: delta by position, and the worst tokens."""
    measured = jax.device_get(values["gaps"])
    return gaps.record(measured, config.rollout.max_tokens, inputs.tokenizer.decode)


def _is_due(number: int, every: int, last: int, first: bool = False) -> bool:
    """True if step `number` is one of every `every`, the last, or, with `first`, the first."""
    return every > 0 and (number % every == 0 or number == last or (first and number == 1))
