"""The loop: prompts, rollout, rewards, the compiled step, weight sync."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import (
    calibrate,
    checkpoint,
    data,
    files,
    gaps,
    lock,
    metrics,
    rewards,
    sharding,
    step,
    stopping,
    sync,
    warmup,
)
from dcmdp_jax import (
    tokenizer as tokenizers,
)
from dcmdp_jax.config import (
    Calibrated,
    Config,
    ModelConfig,
    Precision,
    RolloutConfig,
    with_tolerance,
)
from dcmdp_jax.distributed import processes
from dcmdp_jax.evaluation import held_out
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.records import Batch, Prompts, Sampling, Scored, TrainState, Weights
from dcmdp_jax.report import run_page
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.run_record import (
    RECORD_FILE,
    differences,
    lacks_field,
    read_record,
    to_json,
    upgrade_record,
)


class Inputs(NamedTuple):
    """What a run reads, checked before anything is compiled."""

    model_config: ModelConfig
    tokenizer: tokenizers.Tokenizer
    prompts: Iterator[Prompts]  # with get_state and set_state
    held_out: Prompts | None
    mesh: jax.sharding.Mesh  # that trains
    decode_mesh: jax.sharding.Mesh  # that samples
    lock: IO[str] | None = None  # on the work folder, held by process 0 from the claim to the end


def train(config: Config, workdir: pathlib.Path) -> TrainState:
    """Runs or resumes the experiment in `workdir`; returns the final state.

    Raises ValueError on input that cannot work, before compilation. On SIGINT or SIGTERM it saves
    at the next safe point and raises `stopping.Interrupted`; the same call resumes. Raises
    `stopping.Failed` where going on would teach nothing.
    """
    return run(config, workdir, prepare(config, workdir))


def prepare(config: Config, workdir: pathlib.Path) -> Inputs:
    """Reads and checks everything, then claims `workdir`; nothing is compiled, and bad input leaves
    no trace.

    What one process refuses, all refuse.
    """
    processes.check_same(json.dumps(to_json(config)), "configuration")
    with processes.raise_on_all():
        inputs = read_inputs(config)
        config = calibrate.with_recorded_tolerance(config, workdir)
        metrics.check_loggers(config)
    return inputs._replace(lock=claim(workdir, config))


def run(config: Config, workdir: pathlib.Path, inputs: Inputs, at_once: bool = False) -> TrainState:
    """The walk, over and over. With stale rollouts the next batch is sampled while the update runs.

    What fails after a step leaves that step saved. With `at_once` a second Ctrl-C ends the process.
    """
    with (
        inputs.lock or contextlib.nullcontext(),
        stopping.requests(processes.request_stop, at_once) as asked_here,
        contextlib.closing(checkpoint.Checkpoints(workdir, config.checkpoint.keep)) as saved,
    ):
        config = calibrate.with_recorded_tolerance(config, workdir)
        restored = _restore(saved, config, inputs)
        asked = partial(_any, (asked_here, processes.stop_requested))
        with metrics.Log(
            workdir, config, first_step=int(restored.step if restored else 0) + 1
        ) as log:
            state = _walk(config, workdir, inputs, saved, log, asked, restored)
        saved.close()
        if int(state.step) < config.steps:
            raise stopping.Interrupted(
                f"stopped after step {int(state.step)} of {config.steps}; everything is saved in "
                f"{workdir}"
            )
        if jax.process_index() == 0:
            run_page.write(workdir)
    return state


def _walk(
    config: Config,
    workdir: pathlib.Path,
    inputs: Inputs,
    saved: checkpoint.Checkpoints,
    log: metrics.Log,
    asked: Callable[[], bool],
    restored: TrainState | None,
) -> TrainState:
    """The state after the last step, or the one after which the run was asked to stop; it is saved."""
    state = restored or _start(config, inputs, workdir, lambda: processes.any_process(asked()))
    number = int(state.step)
    position = inputs.prompts.get_state()
    engine = make_engine(config, inputs)
    to_engine = sync.converter(inputs.model_config, config.rollout.precision, inputs.decode_mesh)
    held_out = _held_out(config, inputs, engine, asked)
    collect = partial(_collect, config, inputs, engine, asked)
    policy = to_engine(*step.sampled_from(state))
    if not np.asarray(policy.finite):
        weight = _weight_not_finite(state, inputs) or "a weight of the engine"
        raise stopping.Failed(
            f"{weight} is not finite in checkpoint {number} of {workdir}; remove the checkpoint, to go on "
            "from the one before with a smaller algorithm.learning_rate"
            if number
            else f"{weight} is not finite before the first step; start from other weights, or with a smaller "
            "warmup.learning_rate"
        )
    if isinstance(config.constraint.tolerance, Calibrated):
        config = _calibrated(config, inputs, workdir, state, partial(collect, policy))
        log.set_tolerance(config.constraint.tolerance)
    saved.save(state, position, config.seed)
    update = step.compile(config, inputs.model_config, inputs.mesh)
    if number < config.steps:
        processes.log0("compiling with the first step")
    started = time.perf_counter()
    ahead = config.rollout.staleness > 0
    updates = config.algorithm.epochs * config.algorithm.minibatches
    skipped = int(state.skipped)
    idle = 0  # steps in a row that made no update
    try:
        collected = collect(policy, number)
        while collected:
            stale = to_engine(*step.sampled_from(_aged(state))) if ahead else None
            sampled = {"tokens": collected.tokens, "truncated": collected.truncated}
            state, values = update(state, collected.batch)
            number = number + 1
            before = position
            position = inputs.prompts.get_state()
            policy = stale or to_engine(*step.sampled_from(state))
            if not np.asarray(policy.finite):
                weight = _weight_not_finite(state, inputs) or "a weight of the engine"
                raise stopping.Failed(
                    f"{weight} is not finite after step {number}, which is not saved; go on "
                    "from the last checkpoint, with a smaller algorithm.learning_rate"
                )
            collected = collect(policy, number) if ahead else None
            row, others = _row(values, sampled, started)
            if not others["apart"]:  # the step has left the state as it was
                _give_up(saved, state, before, config, workdir, _coupled(config))
            if due := _is_due(number, config.eval.every, config.steps, first=True):
                log.write_gaps(
                    number,
                    gaps.record(others["gaps"], config.rollout.max_tokens, inputs.tokenizer.decode),
                )
            if inputs.held_out and due:
                row |= held_out(policy, state)
            log.write(number, row)
            idle = idle + 1 if row["skipped"] - skipped == updates else 0
            skipped = row["skipped"]
            if idle and idle == config.algorithm.max_skipped:
                what = _first_not_finite(state, row, others["logp_finite"], inputs)
                _give_up(
                    saved,
                    state,
                    position,
                    config,
                    workdir,
                    f"{what} is not finite, and the last {idle} steps made no update "
                    "(algorithm.max_skipped allows that many); look for what overflows, or "
                    "lower algorithm.learning_rate",
                )
            if _is_due(number, config.checkpoint.every, config.steps):
                saved.save(state, position, config.seed)
            started = time.perf_counter()
            collected = collected if ahead else collect(policy, number)
    except stopping.Failed:
        raise
    except Exception as error:
        if not processes.raised_on_all(error):
            raise
        if log.step < number:  # its row is missing: something failed beside it
            with processes.print_errors(f"the row of step {number} is not written"):
                log.write(number, _row(values, sampled, started)[0])
        with processes.print_errors(f"the state after step {number} is not saved"):
            saved.save(state, position, config.seed)
            saved.close()
            processes.log0(f"the state after step {number} is saved in {workdir}")
        raise
    saved.save(state, position, config.seed)
    return state


def _row(
    values: step.Metrics, sampled: dict[str, float], started: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step's row, once it is computed, and what of its metrics is no part of a row."""
    values = jax.device_get(values)
    others = {name: values.pop(name) for name in ("gaps", "apart", "logp_finite")}
    row = {name: value.item() for name, value in values.items()}
    return row | sampled | {"seconds": time.perf_counter() - started}, others


def _any(questions: tuple[Callable[[], bool], ...]) -> bool:
    return any(question() for question in questions)


def _give_up(
    saved: checkpoint.Checkpoints,
    state: TrainState,
    position: Any,
    config: Config,
    workdir: pathlib.Path,
    reason: str,
) -> None:
    """Saves, and raises `stopping.Failed` with the reason."""
    saved.save(state, position, config.seed)
    saved.close()
    number = int(state.step)
    raise stopping.Failed(f"{reason}. Everything up to step {number} is saved in {workdir}")


def _coupled(config: Config) -> str:
    """Why a step whose microbatches were not judged apart made no update."""
    return (
        f"algorithm.surrogate={config.algorithm.surrogate!r}, or constraint.shaping, weighs "
        "microbatches against each other in this batch, which the trial before the run had not "
        "shown, so that their gradients cannot be added up; set algorithm.microbatches=1"
    )


def _first_not_finite(
    state: TrainState, values: dict[str, Any], logp_finite: bool, inputs: Inputs
) -> str:
    """The first thing on the way of a step that is not finite."""
    if weight := _weight_not_finite(state, inputs):
        return weight
    if not logp_finite:
        return "a log-prob of the trainer"
    return "the gradient" if math.isfinite(values["loss"]) else "the loss"


def _weight_not_finite(state: TrainState, inputs: Inputs) -> str:
    """The first parameter that holds NaN or an infinite number, in words; empty where none does, as
    where the engine's precision makes it so.
    """
    each = partial(jax.tree.map, lambda w: jnp.all(jnp.isfinite(w)))
    finite = jax.jit(each, out_shardings=sharding.replicated(inputs.mesh))(state.params)
    for path, finite in jax.tree_util.tree_leaves_with_path(finite):
        if not finite:
            return f"the weight {jax.tree_util.keystr(path, simple=True, separator='.')}"
    return ""


class Collected(NamedTuple):
    """What one step trains on."""

    batch: Batch  # laid out over the training mesh
    tokens: int  # sampled
    truncated: float  # share of completions that the length limit cut off


def _collect(
    config: Config,
    inputs: Inputs,
    engine: Engine,
    asked: Callable[[], bool],
    policy: Weights,
    number: int,
) -> Collected | None:
    """The batch of constrained step `number`, from all processes; None after the last, or where any
    was asked to stop.

    From `calibrate.FIRST` on, numbers are those of batches that calibrate.
    """
    if config.steps <= number < calibrate.FIRST:
        return None
    tokenizer = inputs.tokenizer
    engines = processes.num_engines(config.rollout)
    first = processes.share(config.data.prompts_per_step, engines).start * config.rollout.samples
    stops = asked
    # what runs in step stops in step; and its collectives do not mix with those that agree on it
    if config.rollout.one_engine:
        policy = jax.block_until_ready(policy)
        stops = lambda: processes.any_process(asked())
    try:
        # keys do not wait for a device that trains
        with jax.default_device(inputs.decode_mesh.local_devices[0]):
            sampled = rollout(
                engine,
                policy,
                next(inputs.prompts),
                samples=config.rollout.samples,
                first=first,
                key=jax.random.fold_in(jax.random.key(config.seed), number),
                max_tokens=config.rollout.max_tokens,
                sampling=sampling(config.rollout),
                stop_strings=config.rollout.stop_strings,
                decode=tokenizer.decode,
                asked=stops,
            )
    except stopping.Interrupted:
        sampled = None
    scored = None
    with (
        processes.raise_on_all()
    ):  # what one process's verifier fails on ends all in the same place
        try:
            if sampled is not None:
                scored = rewards.score(
                    sampled, tokenizer.decode, config.data.reward_function(), asked
                )
        except stopping.Interrupted:
            pass  # `scored` says so
    if processes.any_process(scored is None):
        return None
    scored = scored if engines == 1 else _together(scored)
    batch = data.pack(
        scored,
        minibatches=config.algorithm.minibatches,
        microbatches=config.algorithm.microbatches,
        row_length=config.algorithm.row_length or engine.max_length,
        row_divisor=sharding.num_batch_shards(inputs.mesh),
        pad_id=tokenizer.pad_id,
        seed=(config.seed, number),
    )
    return Collected(
        processes.make_global(batch, step.batch_shardings(config, inputs.mesh)),
        int(scored.rollout.lengths.sum()),
        float(1 - scored.rollout.stopped.mean()),
    )


def _together(scored: Scored) -> Scored:
    """The completions of all processes as one batch; texts and problems are left out."""
    sampled = scored.rollout
    prompts, arrays, reward = processes.gather(
        (
            sampled.prompts._replace(examples=()),
            sampled._replace(prompts=(), sampling=()),
            scored.reward,
        )
    )
    return Scored(arrays._replace(prompts=prompts, sampling=sampled.sampling), reward, ())


def _calibrated(
    config: Config,
    inputs: Inputs,
    workdir: pathlib.Path,
    state: TrainState,
    collect: Callable[[int], Collected | None],
) -> Config:
    """`config` with the tolerance that its starting weights call for, written down in `workdir`;
    the same on all processes.

    The prompts that measure it are asked again by the first steps.
    """
    wanted = config.constraint.tolerance
    position = inputs.prompts.get_state()
    processes.log0(f"measuring the floor of delta over {wanted.batches} batches")
    collected = [collect(calibrate.FIRST + i) for i in range(wanted.batches)]
    if None in collected:
        raise stopping.Interrupted("stopped in the calibration of the tolerance; it starts anew")
    found = calibrate.measure_floor(
        config,
        inputs.model_config,
        inputs.mesh,
        step.sampled_from(state)[0],
        [one.batch for one in collected],
        wanted.slack,
    )
    inputs.prompts.set_state(position)
    processes.log0(calibrate.describe(found, wanted.slack))
    config = with_tolerance(config, calibrate.rounded_tolerance(found))
    if jax.process_index() == 0:
        calibrate.write(found, wanted, workdir)
        _write_config(workdir, config)
    return config


def _aged(state: TrainState) -> TrainState:
    """As far as stale rollouts go, the state after the next update."""
    return state._replace(stale=(*state.stale, state.params)[1:], step=state.step + 1)


def _held_out(
    config: Config, inputs: Inputs, engine: Engine, asked: Callable[[], bool]
) -> Callable[[Weights, TrainState], dict[str, float]]:
    """Pass rates of the engine's policy and the trainer's on the held-out problems; none where the
    run stops in them.
    """
    to_exact = sync.converter(inputs.model_config, Precision(), inputs.decode_mesh)
    key = jax.random.key(config.seed)
    rate = partial(
        held_out.pass_rate,
        engine,
        prompts=inputs.held_out,
        config=config,
        tokenizer=inputs.tokenizer,
        key=jax.random.fold_in(key, HELD_OUT_KEY),
        asked=asked,
    )

    def measure(policy: Weights, state: TrainState) -> dict[str, float]:
        sampled = rate(policy)
        same = config.rollout.precision == Precision() and not state.stale
        exact = sampled if same or sampled is None else rate(to_exact(state.params, state.step))
        if exact is None:
            processes.log0(
                f"stopped in the evaluation of step {int(state.step)}, which is left out"
            )
            return {}
        return {"reward_eval_infer": sampled, "reward_eval_train": exact}

    return measure


def make_engine(config: Config, inputs: Inputs) -> Engine:
    """The engine that this process samples from."""
    slots = config.rollout.slots // processes.num_engines(config.rollout)
    return Engine(
        inputs.model_config,
        slots=slots,
        steps=config.rollout.tokens_per_dispatch,
        max_length=config.data.max_prompt_tokens + config.rollout.max_tokens,
        stop_ids=inputs.tokenizer.eos_ids,
        precision=config.rollout.precision,
        record_experts=config.algorithm.replay_routing,
        mesh=inputs.decode_mesh,
    )


def sampling(config: RolloutConfig) -> Sampling:
    """How a run's tokens are drawn."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


HELD_OUT_KEY = 2**31 - 1  # no step's number, so that evaluation shares no key with training


def read_inputs(config: Config) -> Inputs:
    """Model shape, tokenizer and data of a run. Raises ValueError, in one sentence, on whatever
    cannot work.
    """
    mesh, decode_mesh = sharding.meshes(config)
    model = read_model(config)
    if config.model.folder:
        weights.check(config.model.folder)
    engines = processes.num_engines(config.rollout)
    check(config, model, mesh, decode_mesh, engines)
    tokenizer = read_tokenizer(config)
    tokenizers.check_vocab_size(tokenizer, model.vocab_size)
    prompts, held_out = read_problems(config, tokenizer, engines)
    if config.eval.every and held_out is None:
        processes.log0("no held-out evaluation: data.eval_path names no file")
    return Inputs(model, tokenizer, prompts, held_out, mesh, decode_mesh)


def check(
    config: Config,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    decode_mesh: jax.sharding.Mesh,
    engines: int,
) -> None:
    """Raises ValueError on options that cannot work together on these meshes.

    Compiles nothing and reads no file.
    """
    step.check(config)
    if config.algorithm.replay_routing and not model.num_experts:
        raise ValueError(
            "algorithm.replay_routing replays the choices of a router, and this model "
            "is dense; leave it out"
        )
    if config.warmup.steps and config.data.task is None:
        raise ValueError(
            "warmup needs data.task: only a generated task has solutions to learn from; set --warmup.steps 0"
        )
    qwen3_shapes = jax.eval_shape(partial(decoder.init, config=model), jax.random.key(0))
    sharding.param_shardings(decoder.logical_axes(model), mesh, sharding.TRAIN, qwen3_shapes)
    sync.check(model, config.rollout.precision, decode_mesh)
    for name, size, shards in (
        ("rollout.slots", config.rollout.slots, engines * sharding.num_batch_shards(decode_mesh)),
        ("warmup.batch_size", config.warmup.batch_size, sharding.num_batch_shards(mesh)),
    ):
        if size % shards:
            raise ValueError(f"{name}={size} does not divide over the mesh's {shards} batch shards")
    if config.data.prompts_per_step % engines:
        raise ValueError(
            f"data.prompts_per_step={config.data.prompts_per_step} does not divide "
            f"over {engines} engines"
        )
    if config.data.max_prompt_tokens + config.rollout.max_tokens > model.max_position:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_tokens = "
            f"{config.data.max_prompt_tokens + config.rollout.max_tokens} positions are more than the model's "
            f"{model.max_position}"
        )


def read_problems(
    config: Config, tokenizer: tokenizers.Tokenizer, engines: int
) -> tuple[Iterator[Prompts], Prompts | None]:
    """This process's prompts, and the held-out problems if there are any.

    Raises ValueError where one cannot be read or asked.
    """
    task = config.data.task
    wrap = {
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "chat": config.data.chat,
        "enable_thinking": config.data.enable_thinking,
        "instruction": config.data.instruction,
        "special_tokens_in_text": config.data.special_tokens_in_text,
    }
    prompts = data.prompt_batches(
        data.read(config.data.path) if config.data.path else task,
        tokenizer,
        batch_size=config.data.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        process_index=jax.process_index() % engines,
        process_count=engines,
        **wrap,
    )
    if not config.data.path:  # too long a prompt is told before any work
        data.tokenize([task.example(0, config.seed)], tokenizer, **wrap)
    if not config.eval.every:
        return prompts, None
    if config.data.eval_path:
        problems = data.read(config.data.eval_path)[: config.eval.prompts]
        return prompts, data.tokenize(problems, tokenizer, **wrap)
    if config.data.path or task is None:
        return prompts, None
    return prompts, data.tokenize(task.held_out(config.eval.prompts), tokenizer, **wrap)


def read_model(config: Config) -> ModelConfig:
    """The model's shape. Raises ValueError where there is none."""
    source = config.model
    if not source.folder and source.architecture is None:
        raise ValueError(
            "model.folder names no folder and the experiment has no model.architecture; give --model.folder DIR"
        )
    model = weights.read_config(source.folder) if source.folder else source.architecture
    return dataclasses.replace(
        model,
        bfloat16=source.bfloat16 or model.bfloat16,
        remat=source.remat or model.remat,
        remat_policy=source.remat_policy or model.remat_policy,
    )


def read_tokenizer(config: Config) -> tokenizers.Tokenizer:
    """The named tokenizer, the model folder's, or the task's characters. Raises ValueError where
    there is none.
    """
    if config.model.tokenizer or config.model.folder:
        return tokenizers.load(config.model.tokenizer or config.model.folder, config.model.folder)
    if config.data.task is None:
        raise ValueError("model.tokenizer names no tokenizer; give --model.tokenizer DIR")
    return tokenizers.CharacterTokenizer(config.data.task.alphabet)


def claim(workdir: pathlib.Path, config: Config) -> IO[str] | None:
    """Locks the folder, writes the resolved config beside the run, or checks that the run there is
    this one.

    The number of steps, where it runs, and what only watches it may change between resumptions;
    anything else raises ValueError with its name, and so does a folder that another process uses.
    Process 0 writes, and gets the lock.
    """
    taken = None
    with processes.raise_on_all():
        if jax.process_index() == 0:
            taken = lock.take(workdir)
    try:
        with processes.raise_on_all():
            _check_goes_on(workdir, config)
        with processes.raise_on_all():
            if jax.process_index() == 0:
                if not checkpoint.steps(workdir):
                    metrics.set_aside(workdir)
                _write_config(workdir, config)
        with processes.raise_on_all():
            if not (workdir / RECORD_FILE).is_file():
                raise ValueError(
                    f"{workdir.absolute()} is not on a file system shared with process 0; give another --workdir"
                )
    except ValueError:
        if taken:
            taken.close()
        raise
    return taken


def _write_config(workdir: pathlib.Path, config: Config) -> None:
    # a run that dies here can still be resumed
    files.write_atomic(workdir / RECORD_FILE, json.dumps(to_json(config), indent=2) + "\n")


def _check_goes_on(workdir: pathlib.Path, config: Config) -> None:
    if not checkpoint.steps(workdir):
        return
    now = to_json(config)
    before = upgrade_record(read_record(workdir), config)
    for name, (old, new) in differences(before, now).items():
        if f"{name}.".startswith(tuple(f"{free}." for free in MAY_CHANGE)):
            continue
        if lacks_field(name, now):
            raise ValueError(
                f"{workdir} holds a run of another version, with {name}={old}, which this one does not know; go on "
                f"with that version, or take {name} out of {workdir / RECORD_FILE}"
            )
        short = not isinstance(old, dict) and not isinstance(new, dict)
        raise ValueError(
            f"{workdir} holds a run with {f'{name}={old}, not {new}' if short else f'another {name}'}; "
            f"choose another --workdir, or the old value (only {', '.join(MAY_CHANGE)} may change)"
        )


MAY_CHANGE = (
    "steps",
    "mesh",
    "rollout.devices",
    "rollout.mesh",
    "rollout.slots",
    "algorithm.microbatches",
    "algorithm.max_skipped",
    "eval",
    "checkpoint",
    "tensorboard",
    "wandb",
)


def _start(
    config: Config, inputs: Inputs, workdir: pathlib.Path, asked: Callable[[], bool]
) -> TrainState:
    """The starting weights, with an optimizer and a dual at their beginning."""
    params = starting_weights(config, inputs, workdir, asked)
    places = step.state_shardings(config, inputs.model_config, inputs.mesh)
    return jax.jit(partial(step.init_state, config), out_shardings=places, donate_argnums=0)(params)


def starting_weights(
    config: Config, inputs: Inputs, workdir: pathlib.Path, asked: Callable[[], bool]
) -> Any:
    """Fresh or loaded parameters, warmed up; the warm-up's losses go to `workdir`."""
    place = step.state_shardings(config, inputs.model_config, inputs.mesh).params
    if config.model.folder:
        _, params = weights.load(config.model.folder, shardings=place)
    else:
        params = jax.jit(partial(decoder.init, config=inputs.model_config), out_shardings=place)(
            jax.random.key(config.seed)
        )
    if config.warmup.steps:
        params = warmup.run(
            params, config, inputs.model_config, inputs.tokenizer, inputs.mesh, workdir, asked
        )
    return params


def warm_start(config: Config, folder: pathlib.Path, alter: Callable[[Any], Any]) -> None:
    """Writes what `alter` makes of a run's first parameters to `folder/model`, as a Hugging Face
    folder with its tokenizer.
    """
    inputs = read_inputs(config)
    model = folder / "model"
    weights.save(
        model,
        inputs.model_config,
        alter(_start(config, inputs, folder, lambda: False).params),
        token_ids=tokenizers.special_token_ids(inputs.tokenizer),
    )
    tokenizers.save(inputs.tokenizer, model)


def _restore(saved: checkpoint.Checkpoints, config: Config, inputs: Inputs) -> TrainState | None:
    """The newest whole checkpoint's state, with the data at its position; None where there is none."""
    found = saved.restore(step.abstract_state(config, inputs.model_config, inputs.mesh))
    if found is None:
        return None
    state, position = found
    inputs.prompts.set_state(position)
    return state


def export(config: Config, workdir: pathlib.Path, folder: str) -> int:
    """Writes the newest whole checkpoint of `workdir` as a Hugging Face folder, with its tokenizer;
    returns its step.

    Raises ValueError where there is no checkpoint.
    """
    model = read_model(config)
    like = step.abstract_state(config, model, sharding.single_device_mesh())
    state, _ = checkpoint.read(workdir, like)
    tokenizer = read_tokenizer(config)
    weights.save(folder, model, state.params, token_ids=tokenizers.special_token_ids(tokenizer))
    tokenizers.save(tokenizer, folder)
    return int(state.step)


def _is_due(number: int, every: int, last: int, first: bool = False) -> bool:
    return every > 0 and (number % every == 0 or number == last or first and number == 1)
