"""The loop: prompts, rollout, rewards, the compiled step, weight sync."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax

from dcmdp_jax import checkpoint, data, evaluate, metrics, report, rewards, sharding, step, sync, tokenizer, warmup
from dcmdp_jax.config import Config, ModelConfig, to_json
from dcmdp_jax.models import qwen3, weights
from dcmdp_jax.records import Prompts, TrainState
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine


class Inputs(NamedTuple):
    """What a run reads, checked before anything is compiled."""

    model: ModelConfig
    tokenizer: tokenizer.Tokenizer
    prompts: Iterator[Prompts]  # with get_state and set_state
    held_out: Prompts | None


def train(config: Config, workdir: pathlib.Path) -> TrainState:
    """Runs or resumes the experiment in `workdir`; returns the final state.

    Raises ValueError on input that cannot work, before compilation. On SIGINT or SIGTERM it saves at the next safe point and
    raises `Interrupted`; the same call resumes.
    """
    mesh = sharding.make_mesh(config.mesh)
    inputs = read_inputs(config, mesh)
    claim(workdir, config)
    model, vocabulary = inputs.model, inputs.tokenizer
    saved = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    log = metrics.Log(workdir, config, first_step=(saved.latest or 0) + 1)
    state = _restore(saved, config, inputs, mesh) or _start(config, inputs, mesh, workdir)

    update = step.compile(config, model, mesh)
    engine = Engine(model, slots=config.rollout.slots, max_length=config.data.max_prompt_tokens + config.rollout.max_tokens,
                    stop_ids=vocabulary.eos_ids, steps=config.rollout.tokens_per_dispatch, mesh=mesh)
    to_engine, to_exact = (sync.make(model, dtype, mesh) for dtype in (config.rollout.weights, "float32"))
    params, exact = to_engine(state.params), config.rollout.weights == "float32" and not model.bfloat16
    with log, _stop_requests() as stopping:
        while (number := int(state.step)) < config.steps:
            started, position = time.perf_counter(), inputs.prompts.get_state()
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            sampled = rollout(engine, params, next(inputs.prompts), samples=config.rollout.samples, key=key,
                              max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature, version=number)
            if stopping():
                break
            scored = rewards.score(sampled, vocabulary.decode, config.data.verifier)
            batch = data.pack(
                scored, minibatches=config.algorithm.minibatches, microbatches=config.algorithm.microbatches,
                row_length=config.algorithm.row_length or engine.max_length, row_divisor=sharding.batch_size(mesh),
                pad_id=vocabulary.pad_id, seed=config.seed + number)
            state, values = update(state, batch)
            params, position, number = to_engine(state.params), inputs.prompts.get_state(), number + 1
            values = {name: value.item() for name, value in jax.device_get(values).items()}
            values |= {"tokens": int(sampled.lengths.sum()), "seconds": time.perf_counter() - started}
            if inputs.held_out and _is_due(number, config.eval.every, config.steps, first=True):
                rate = partial(evaluate.pass_rate, engine, prompts=inputs.held_out, config=config, tokenizer=vocabulary,
                               key=jax.random.key(config.seed))
                values["reward_eval_infer"] = rate(params)
                values["reward_eval_train"] = values["reward_eval_infer"] if exact else rate(to_exact(state.params))
            log.write(number, values)
            if _is_due(number, config.checkpoint.every, config.steps):
                saved.save(state, position, config.seed)
            if stopping():
                break
        saved.save(state, position, config.seed)
    saved.close()
    if jax.process_index() == 0:
        report.write(workdir)
    if number < config.steps:
        raise Interrupted(f"stopped after step {number} of {config.steps}; everything is saved in {workdir}")
    return state


class Interrupted(Exception):
    """The run was asked to stop and can be resumed."""


def read_inputs(config: Config, mesh: jax.sharding.Mesh) -> Inputs:
    """Model shape, tokenizer and data of a run. Raises ValueError, in one sentence, on whatever cannot work."""
    task, source = config.data.task, config.model
    if source.folder:
        model = weights.read_config(source.folder)
    elif source.shape is not None:
        model = source.shape
    else:
        raise ValueError("model.folder names no folder and the experiment has no model.shape; give --model.folder DIR")
    model = dataclasses.replace(model, bfloat16=source.bfloat16, remat=source.remat)
    if source.tokenizer or source.folder:
        vocabulary = tokenizer.load(source.tokenizer or source.folder)
    elif task is not None:
        vocabulary = tokenizer.Characters(task.alphabet)
    else:
        raise ValueError("model.tokenizer names no tokenizer; give --model.tokenizer DIR")
    tokenizer.check_vocabulary(vocabulary, model.vocab_size)
    if config.warmup.steps and task is None:
        raise ValueError("warmup needs data.task: only a generated task has solutions to learn from; set --warmup.steps 0")
    qwen3_shapes = jax.eval_shape(partial(qwen3.init, config=model), jax.random.key(0))
    sharding.params(qwen3.logical_axes(model), mesh, sharding.TRAIN, qwen3_shapes)
    if config.rollout.slots % sharding.batch_size(mesh):
        raise ValueError(f"rollout.slots={config.rollout.slots} does not divide over {sharding.batch_size(mesh)} batch shards")

    wrap = {"max_prompt_tokens": config.data.max_prompt_tokens, "chat": config.data.chat,
            "enable_thinking": config.data.enable_thinking, "instruction": config.data.instruction}
    prompts = data.prompts(data.read(config.data.path) if config.data.path else task, vocabulary,
                           batch_size=config.data.prompts_per_step, seed=config.seed, shuffle=config.data.shuffle, **wrap)
    held_out = None
    if config.eval.every and config.data.eval_path:
        held_out = data.tokenize(data.read(config.data.eval_path)[:config.eval.prompts], vocabulary, **wrap)
    elif config.eval.every and task is not None and not config.data.path:
        held_out = data.tokenize(task.held_out(config.eval.prompts), vocabulary, **wrap)
    return Inputs(model, vocabulary, prompts, held_out)


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Writes the resolved config beside the run, or checks that the run there is this one.

    The number of steps, the mesh, and what only watches the run may change between resumptions; anything else raises
    ValueError with its name.
    """
    file, now = workdir / "config.json", to_json(config)
    if file.exists():
        before = json.loads(file.read_text())
        for name, (old, new) in _differences(before, now).items():
            if name.split(".")[0] not in MAY_CHANGE:
                raise ValueError(f"{workdir} holds a run with {name}={old}, not {new}; choose another --workdir, or the old value")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=2) + "\n")


MAY_CHANGE = ("steps", "mesh", "eval", "checkpoint", "tensorboard", "wandb")


def _differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: (before, now)}
    found = {}
    for name in before.keys() | now.keys():
        found |= _differences(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
    return found


def _start(config: Config, inputs: Inputs, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> TrainState:
    """Fresh or loaded parameters, warmed up, with an optimizer and a dual at their beginning."""
    places = step.state_shardings(config, inputs.model, mesh)
    if config.model.folder:
        _, params = weights.load(config.model.folder, shardings=places.params)
    else:
        make = jax.jit(partial(qwen3.init, config=inputs.model), out_shardings=places.params)
        params = make(jax.random.key(config.seed))
    if config.warmup.steps:
        params = warmup.run(params, config, inputs.model, inputs.tokenizer, mesh, workdir)
    return jax.jit(partial(step.init_state, config), out_shardings=places, donate_argnums=0)(params)


def _restore(saved: checkpoint.Checkpoints, config: Config, inputs: Inputs, mesh: jax.sharding.Mesh) -> TrainState | None:
    """The newest checkpoint's state, with the data at its position; None where there is none."""
    if saved.latest is None:
        return None
    shapes = jax.eval_shape(lambda: step.init_state(config, qwen3.init(jax.random.key(0), inputs.model)))
    state, position, _ = saved.restore(checkpoint.abstract(shapes, step.state_shardings(config, inputs.model, mesh)))
    inputs.prompts.set_state(position)
    return state


def export(config: Config, workdir: pathlib.Path, folder: str) -> int:
    """Writes the newest checkpoint of `workdir` as a Hugging Face folder; returns its step. Raises ValueError if none."""
    mesh = sharding.make_mesh(config.mesh)
    inputs = read_inputs(config, mesh)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds no checkpoints; give the run's --workdir")
    state = _restore(checkpoint.Checkpoints(workdir, config.checkpoint.keep), config, inputs, mesh)
    if state is None:
        raise ValueError(f"{workdir} holds no whole checkpoint yet")
    weights.save(folder, inputs.model, state.params)
    return int(state.step)


def _is_due(number: int, every: int, last: int, first: bool = False) -> bool:
    return every > 0 and (number % every == 0 or number == last or first and number == 1)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that is asked at safe points; a second SIGINT interrupts at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping at the next safe point; press Ctrl-C again to stop at once", flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
