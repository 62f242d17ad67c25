"""Supervised learning of a file's completions before reinforcement learning (`warmup.path`)."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcmdp_jax import optimizers, sharding, train_state
from dcmdp_jax.config import Config, WarmupConfig
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import scoring
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.monitoring import metrics, phases
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import Batch, TrainState
from dcmdp_jax.run import checkpoint, pairs
from dcmdp_jax.run.pairs import Pair
from dcmdp_jax.stopping import Failed, Interrupted

FILE = "warmup.jsonl"  # a row for each step: step, loss, grad_norm, tokens
SHOWN = 20  # lines on the terminal


@phase("warming up")
def run(
    load: Callable[[], Any],
    learnt: Sequence[Pair],
    config: Config,
    model: ModelConfig,
    pad_id: int,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    should_stop: Callable[[], bool],
) -> Any:
    """Returns the parameters after `config.warmup.steps` steps on the pairs `learnt`.

    Checkpoints lie in `workdir/warmup`, and the stage goes on from the newest: the result is that
    of an uninterrupted stage, bit for bit.

    Args:
        load: gives the parameters to start from, where there is no checkpoint.
        should_stop: the same on all processes; polled before each step.

    Raises `Interrupted`, with everything saved, where `should_stop()`, and `Failed` where a loss or
    a gradient is not finite.
    """
    steps = config.warmup.steps
    width = max(len(pair.completion) for pair in learnt)
    folder = workdir / checkpoint.WARMUP
    with contextlib.closing(checkpoint.Checkpoints(folder, config.checkpoint.keep)) as saved:
        restored = saved.restore(abstract(config, model, mesh))
        state = restored[0] if restored else _start(config, model, mesh)(load())
        take_step = compile_step(config, model, mesh)
        number = int(state.step)
        with _log(workdir, number) as write:
            while number < steps:
                if should_stop():
                    saved.save(state, {})
                    raise Interrupted(
                        f"stopped after step {number} of {steps} of the warm-up; everything is "
                        f"saved in {workdir}"
                    )
                batch = pairs.pack(
                    pairs.draw(
                        learnt,
                        config.warmup.batch_size,
                        config.seed,
                        number,
                        shuffle=config.data.shuffle,
                    ),
                    microbatches=config.warmup.microbatches,
                    row_length=config.row_length,
                    width=width,
                    row_divisor=sharding.num_batch_shards(mesh),
                    pad_id=pad_id,
                )
                state, measured = take_step(
                    state, processes.make_global(batch, _batch_shardings(config, mesh))
                )
                number += 1
                row = {name: x.item() for name, x in jax.device_get(measured).items()}
                left = phases.note_warmup(1, steps - number)
                _check_finite(number, row)
                write({"step": number, **row})
                if number % max(1, steps // SHOWN) == 0 or number == steps:
                    processes.log0(f"warm-up {number}/{steps}  loss {row['loss']:.3f}{left}")
                if config.checkpoint.every and number % config.checkpoint.every == 0:
                    saved.save(state, {})
        saved.save(state, {})
    return state.params


def optimizer(config: WarmupConfig) -> optax.GradientTransformation:
    """Returns AdamW on a cosine schedule, without weight decay, from gradients of norm 1 at most.

    The learning rate rises over the first 20 steps, or half of all if that is less.
    """
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(20, config.steps // 2), config.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))


def compile_step(
    config: Config, model: ModelConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted step; its state argument is donated."""
    state = shardings(config, model, mesh)
    return jax.jit(
        sharding.with_mesh(
            mesh, partial(take_step, model=model, optimizer=optimizer(config.warmup))
        ),
        in_shardings=(state, _batch_shardings(config, mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def take_step(
    state: TrainState, batch: Batch, *, model: ModelConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update, from the gradients of all microbatches of `batch`.

    Loss: the mean over completion tokens of all pairs of -log pi(token | those before it), in nats.

    Returns:
        The state after it; the loss, the norm of the gradient and the number of completion tokens.
    """
    batch = jax.tree.map(lambda x: x[0], batch)  # the only minibatch
    count = jnp.sum(batch.mask)

    def loss_of(params: Any, micro: Batch) -> jax.Array:
        logp, _ = scoring.packed_logp(
            params, micro.tokens, micro.positions, micro.segment_ids, micro.index, model, 1.0
        )
        return -jnp.sum(jnp.where(micro.mask, logp, 0.0)) / count

    def accumulate(total: Any, micro: Batch) -> tuple[Any, None]:
        # Without the barrier the sum over devices would move out of the loop, which would then
        # hold unsharded gradients.
        part = jax.lax.optimization_barrier(jax.value_and_grad(loss_of)(state.params, micro))
        return jax.tree.map(jnp.add, total, part), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    (loss, grads), _ = jax.lax.scan(accumulate, zero, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = state._replace(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        step=state.step + 1,
    )
    return after, {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": count}


def shardings(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the layout of the stage's state: moments lie as their parameters do."""
    shapes = _shapes(config, model, mesh)
    params = train_state.params_shardings(model, mesh)
    replicated = sharding.replicated(mesh)
    return jax.tree.map(lambda _: replicated, shapes)._replace(
        params=params,
        opt_state=optimizers.map_param_like(shapes.opt_state, shapes.params, params, replicated),
    )


def abstract(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns shapes and shardings of the stage's state, for checkpoints and for plans."""
    return sharding.abstract_arrays(_shapes(config, model, mesh), shardings(config, model, mesh))


def _shapes(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    return jax.eval_shape(partial(init, config), train_state.abstract_params(model, mesh))


def init(config: Config, params: Any) -> TrainState:
    """Returns the state before the first step. It has no dual, and nothing is stale."""
    return TrainState(
        params=params,
        opt_state=optimizer(config.warmup).init(params),
        dual=(),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        stale=(),
    )


def _start(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> Callable:
    return jax.jit(
        partial(init, config), out_shardings=shardings(config, model, mesh), donate_argnums=0
    )


def _batch_shardings(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    return train_state.batch_shardings(config, mesh)._replace(
        prefix_ids=None, replayed=None, top_tokens=None, top_rollout_logp=None, version=None
    )


def _check_finite(number: int, row: dict[str, float]) -> None:
    """Raises Failed if the step's loss or gradient is not finite."""
    for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
        if not math.isfinite(row[name]):
            raise Failed(
                f"the {words} of step {number} of the warm-up is not finite; start again in "
                "another --workdir with a smaller warmup.learning_rate, or look at the pairs of "
                "warmup.path"
            )


@contextlib.contextmanager
def _log(workdir: pathlib.Path, step: int) -> Iterator[Callable[[dict], None]]:
    """Yields a function that adds a row to `FILE`, whose rows after `step` are dropped first."""
    if jax.process_index() != 0:
        yield lambda row: None
        return
    path = workdir / FILE
    if path.exists():
        metrics.truncate_file(path, step)
    with path.open("a", encoding="utf-8") as file:

        def write(row: dict) -> None:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()

        yield write
