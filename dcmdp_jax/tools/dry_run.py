"""What `dcmdp train` would run: sizes, memory, steps, time. Nothing is compiled or written."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dcmdp_jax import calibrate, sharding, train_state
from dcmdp_jax.config import Calibrated, Config, with_tolerance
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.monitoring import metrics, phases
from dcmdp_jax.run import checkpoint, lock, staging
from dcmdp_jax.run import folder as run_folder
from dcmdp_jax.run.inputs import Inputs, read_inputs
from dcmdp_jax.tools import plan


def describe(
    config: Config, workdir: pathlib.Path, devices: Sequence[jax.Device] | None = None
) -> list[list[str]]:
    """Returns rows of two texts about the run that `train.prepare` would begin or go on with.

    Raises ValueError, ImportError or OSError where that would, but for what the start of a
    verifier's processes finds, and a bucket that another run uses.
    """
    inputs = read_inputs(config, devices)
    config = calibrate.with_recorded_tolerance(config, workdir)
    metrics.check_loggers(config)
    if not staging.of(workdir):
        lock.check(workdir)
    run_folder.check_is_same_run(workdir, config)
    taken = max(checkpoint.steps(workdir), default=0)
    return [
        ["experiment", config.name],
        ["model", _model(config, inputs.model_config)],
        ["parameters", _parameters(config, inputs)],
        ["devices", _devices(inputs.mesh)],
        ["sampling", _sampling(config, inputs)],
        *_memory(config, inputs),
        ["a step", _step(config)],
        ["steps", _steps(config, taken)],
        ["evaluation", _evaluation(config, inputs)],
        ["folder", _folder(workdir, taken)],
        ["time", _time(config, inputs, workdir, taken)],
    ]


def _model(config: Config, model: ModelConfig) -> str:
    shape = (
        f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads, vocabulary "
        f"{model.vocab_size:,}"
    )
    experts = f", {model.num_experts} experts" if model.num_experts else ""
    return f"{config.model.folder or 'random weights'}: {shape}{experts}"


def _parameters(config: Config, inputs: Inputs) -> str:
    model = inputs.model_config
    state = train_state.abstract(config, model, inputs.mesh)
    total = _count(train_state.abstract_params(model, inputs.mesh))
    trained = _count(state.params)
    return f"{total:,}" if trained == total else f"{total:,}, and {trained:,} are trained"


def _count(params: Any) -> int:
    return sum(math.prod(w.shape) for w in jax.tree.leaves(params))


def _devices(mesh: jax.sharding.Mesh) -> str:
    sizes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    axes = f", mesh {' x '.join(sizes)}" if sizes else ""
    return f"{phases.devices_of(mesh)}{axes}"


def _sampling(config: Config, inputs: Inputs) -> str:
    rollout = config.rollout
    if rollout.server:
        return f"the server {rollout.server}"
    if not rollout.own_engine:
        return "rollout.sampler of the experiment"
    where = _devices(inputs.decode_mesh)
    return f"{rollout.precision.weights} weights, {rollout.slots} slots, on {where}"


def _memory(config: Config, inputs: Inputs) -> list[list[str]]:
    """What lies on a device between programs, which need more while they run: `dcmdp plan` has
    that.
    """
    if isinstance(config.constraint.tolerance, Calibrated):
        config = with_tolerance(config, 1.0)  # shapes do not depend on the number
    model = inputs.model_config
    held = {
        "training state": sharding.local_bytes(train_state.abstract(config, model, inputs.mesh)),
        "batch": sharding.local_bytes(plan.abstract_batch(config, model, inputs.mesh)),
    }
    if config.rollout.own_engine:
        params = train_state.abstract_policy_params(config, model, inputs.mesh)
        prompts = config.data.prompts_per_step
        engine = plan.engine_of(config, model, params, inputs.decode_mesh, 1, prompts)
        held["weights of the engine"] = engine.weights_held
        held["cache of the engine"] = engine.cache + engine.prefix
    parts = ", ".join(f"{name} {plan.size(number)}" for name, number in held.items())
    return [
        ["memory", f"{plan.size(sum(held.values()))} a device between programs"],
        ["", parts],
    ]


def _step(config: Config) -> str:
    completions = config.data.prompts_per_step * config.rollout.samples
    tokens = completions * config.rollout.max_tokens
    updates = config.algorithm.epochs * config.algorithm.minibatches
    return (
        f"{config.data.prompts_per_step} prompts x {config.rollout.samples} samples, at most "
        f"{tokens:,} tokens sampled; updates: {updates}"
    )


def _steps(config: Config, taken: int) -> str:
    if taken >= config.steps:
        return f"none left of {config.steps}"
    if taken:
        return f"{config.steps - taken} of {config.steps}, from checkpoint {taken} on"
    warmup = config.warmup
    before = f", after a warm-up of {warmup.steps} x {warmup.batch_size}" if warmup.steps else ""
    return f"{config.steps}{before}"


def _evaluation(config: Config, inputs: Inputs) -> str:
    if inputs.held_out is None:
        return "none"
    return f"{len(inputs.held_out.lengths)} problems, every {config.eval.every} steps"


def _folder(workdir: pathlib.Path, taken: int) -> str:
    address = staging.shown(str(workdir))
    if taken:
        return f"{address}, resumed"
    if checkpoint.begun(workdir):
        return f"{address}, resumed in its warm-up"
    return f"{address}, {'exists' if workdir.is_dir() else 'new'}"


def _time(config: Config, inputs: Inputs, workdir: pathlib.Path, taken: int) -> str:
    left = max(config.steps - taken, 0)
    if not left:
        return "none"
    last = phases.read(workdir, config.name, phases.devices_of(inputs.mesh))
    if last is None:
        parent = os.path.dirname(staging.shown(str(workdir.absolute())))
        return (
            f"not known: no earlier run of {config.name} on these devices in {parent} to estimate "
            "from"
        )
    warmup = 0 if taken else config.warmup.steps
    seconds = left * last.a_step if taken else last.estimate(left, warmup)
    without = " without the warm-up" if warmup and not last.warmup_steps else ""
    return (
        f"about {phases.clock(seconds)}{without}, as the run before took "
        f"{phases.clock(last.a_step)} a step; evaluations and checkpoints come on top"
    )
