"""What becomes of a run whose step fails: what is saved, and the sentence that says why."""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding, step_metrics
from dcmdp_jax.batches import Collected
from dcmdp_jax.config import Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import NotFinite, TrainState
from dcmdp_jax.run import checkpoint, staging
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.stopping import Failed

NOT_IN_ROW = ("gaps", "logp_finite")  # metrics of a step that no row holds


class StepTaken(NamedTuple):
    """A step that was dispatched: what a checkpoint and a row of it need."""

    state: TrainState  # after the step
    metrics: step_metrics.Metrics
    batch: Collected  # without its arrays
    started: float  # `time.perf_counter()` when the step before it had ended

    @phase("updating the policy")
    def row(self) -> dict[str, float]:
        """Returns the step's scalars, once they are computed, with the seconds it took."""
        scalars = {name: x for name, x in self.metrics.items() if name not in NOT_IN_ROW}
        row = {name: value.item() for name, value in jax.device_get(scalars).items()}
        return row | self.batch.metrics | {"seconds": time.perf_counter() - self.started}


class NoUpdates(Exception):
    """Too many steps in a row made no update."""


class Progress:
    """The last step that this call of `run` has taken, if any, and the steps without an update."""

    def __init__(self, config: Config, inputs: Inputs, state: TrainState):
        self.last: StepTaken | None = None
        self._config = config
        self._inputs = inputs
        self._skipped = int(state.skipped)
        self._idle = 0  # steps in a row that made no update
        self._is_finite = jax.jit(_is_finite, out_shardings=sharding.replicated(inputs.mesh))

    def check_weights(self) -> None:
        """To be called before a state is saved. Raises NotFinite if the last step left a weight
        that is not finite: with staleness, the sampler sees it a step later.
        """
        if self.last is not None and not self._is_finite(self.last.state.params):
            raise NotFinite(_weight_not_finite(self.last.state, self._inputs))

    def check_updates(self, row: dict[str, Any]) -> None:
        """To be called with each step's row. Raises NoUpdates after `algorithm.max_skipped` steps
        in a row of which every update was skipped.
        """
        algorithm = self._config.algorithm
        skipped = row["skipped"] - self._skipped
        self._skipped = row["skipped"]
        self._idle = self._idle + 1 if skipped == algorithm.epochs * algorithm.minibatches else 0
        if self._idle and self._idle == algorithm.max_skipped:
            cause = _first_not_finite(self.last, row, self._inputs)
            raise NoUpdates(
                f"{cause} is not finite, and the last {self._idle} steps made no update "
                "(algorithm.max_skipped allows that many); look for what overflows, or start anew "
                "with a smaller algorithm.learning_rate"
            )


@contextlib.contextmanager
def saved_on_failure(
    config: Config,
    inputs: Inputs,
    workdir: pathlib.Path,
    saved: checkpoint.Checkpoints,
    log: metrics.Log,
    state: TrainState,
) -> Iterator[Progress]:
    """A block that takes steps from `state` on and notes each in `Progress.last`.

    If the body raises, the last step and its metrics row are saved, unless its weights are not
    finite. Raises `stopping.Failed` for weights that are not finite, and after
    `algorithm.max_skipped` steps without an update.
    """
    progress = Progress(config, inputs, state)
    first = int(state.step)  # read now: the first step donates `state`
    try:
        yield progress
    except NotFinite as error:
        last = progress.last
        weight = _weight_not_finite(last.state if last else state, inputs)
        advice = _advice(first, last, saved, workdir)
        raise Failed(f"{weight or 'a weight of the engine'} is not finite {advice}") from error
    except NoUpdates as error:
        _save(saved, progress.last)
        step_number = int(progress.last.state.step)
        raise Failed(
            f"{error}. Everything up to step {step_number} is saved in {workdir}"
        ) from None
    except Exception as error:
        if progress.last is not None and processes.raised_on_all(error):
            _rescue(saved, log, progress, workdir)
        raise


def _save(saved: checkpoint.Checkpoints, last: StepTaken) -> None:
    saved.save(last.state, last.batch.prompt_state)
    saved.close()


def _rescue(
    saved: checkpoint.Checkpoints, log: metrics.Log, progress: Progress, workdir: pathlib.Path
) -> None:
    """Writes the last step's row, where it is missing, and saves its state; errors are printed."""
    last = progress.last
    number = int(last.state.step)
    if log.step < number:
        with processes.print_errors(f"the row of step {number} is not written"):
            log.write(number, last.row())
    with processes.print_errors(f"the state after step {number} is not saved"):
        progress.check_weights()
        _save(saved, last)
        processes.log0(staging.shown(f"the state after step {number} is saved in {workdir}"))


def _advice(
    first: int, last: StepTaken | None, saved: checkpoint.Checkpoints, workdir: pathlib.Path
) -> str:
    """When the weights stopped being finite, and what to do about it."""
    if last is None and not first:
        return (
            "before the first step; start from other weights, or with a smaller "
            "warmup.learning_rate"
        )
    number = int(last.state.step) if last else first
    if saved.latest == number:
        return (
            f"in checkpoint {number} of {workdir}; start anew in another --workdir, with a smaller "
            "algorithm.learning_rate"
        )
    return (
        f"after step {number}, which is not saved; start anew in another --workdir, with a smaller "
        "algorithm.learning_rate"
    )


def _first_not_finite(last: StepTaken, row: dict[str, Any], inputs: Inputs) -> str:
    """Names the first quantity of a step, in the order of its computation, that is not finite."""
    if weight := _weight_not_finite(last.state, inputs):
        return weight
    if not last.metrics["logp_finite"]:
        return "a log-prob of the trainer"
    if not math.isfinite(row.get("update_scale", 1.0)):
        return "what algorithm.update_scale returns"
    return "the gradient" if math.isfinite(row["loss"]) else "the loss"


def _is_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(params)]))


def _weight_not_finite(state: TrainState, inputs: Inputs) -> str:
    """Names the first parameter that holds NaN or an infinite number; "" where all are finite."""
    all_finite = jax.jit(
        partial(jax.tree.map, lambda w: jnp.all(jnp.isfinite(w))),
        out_shardings=sharding.replicated(inputs.mesh),
    )
    for path, finite in jax.tree_util.tree_leaves_with_path(all_finite(state.params)):
        if not finite:
            return f"the weight {jax.tree_util.keystr(path, simple=True, separator='.')}"
    return ""
