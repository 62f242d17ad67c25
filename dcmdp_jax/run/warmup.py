"""Supervised warm-up on a generated task's own solutions.

Reinforcement learning then starts from a policy that is sometimes right.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcmdp_jax import data, sharding
from dcmdp_jax.config import Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import decoder
from dcmdp_jax.models.kernels import head
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.monitoring import phases
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.run import supervised
from dcmdp_jax.stopping import NotKept
from dcmdp_jax.tokens.tokenizer import Tokenizer

STEPS_PER_DISPATCH = 50


@phase("warming up")
def run(
    params: Any,
    config: Config,
    model: ModelConfig,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    should_stop: Callable[[], bool],
    steps_per_dispatch: int = STEPS_PER_DISPATCH,
) -> Any:
    """Returns the parameters after `config.warmup.steps` steps of AdamW on a cosine schedule.

    Losses go to `warmup.jsonl`. `params` are donated. Raises `NotKept` where `should_stop()`, the
    same on all processes, is true between two dispatches: a warm-up is short and begins again.
    """
    optimizer = supervised.optimizer(config.warmup)
    opt_state = jax.jit(optimizer.init)(params)
    take_steps = jax.jit(
        partial(_take_steps, model=model, optimizer=optimizer),
        donate_argnums=(0, 1),
        out_shardings=(None, None, sharding.replicated(mesh)),
    )
    writes = jax.process_index() == 0
    with (workdir / "warmup.jsonl").open("w") if writes else contextlib.nullcontext() as log:
        for start in range(0, config.warmup.steps, steps_per_dispatch):
            if should_stop():
                raise NotKept(
                    f"stopped in the warm-up, at step {start} of {config.warmup.steps}; warm-up "
                    "progress is not kept"
                )
            steps = range(start, min(start + steps_per_dispatch, config.warmup.steps))
            batches = [
                data.supervised_batch(
                    config.data.task, tokenizer, config.warmup.batch_size, config.seed, step
                )
                for step in steps
            ]
            params, opt_state, losses = take_steps(params, opt_state, _stack(batches, mesh))
            losses = np.asarray(losses)
            done = steps[-1] + 1
            left = phases.note_warmup(len(steps), config.warmup.steps - done)
            if writes:
                for step, loss in zip(steps, losses):
                    log.write(json.dumps({"step": step + 1, "loss": float(loss)}) + "\n")
                log.flush()
            processes.log0(f"warm-up {done}/{config.warmup.steps}  loss {losses[-1]:.3f}{left}")
    return params


def _stack(batches: list[data.SupervisedBatch], mesh: jax.sharding.Mesh) -> data.SupervisedBatch:
    """Batches as one, [steps, B, S] on the mesh; rows are padded to the longest."""
    width = max(batch.tokens.shape[1] for batch in batches)
    stacked = data.SupervisedBatch(
        *(
            np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in field])
            for field in zip(*batches)
        )
    )
    return processes.make_global(
        stacked, data.SupervisedBatch(*[sharding.batch_sharding(mesh, 1)] * 2)
    )


def _take_steps(
    params: Any,
    opt_state: Any,
    batches: data.SupervisedBatch,
    *,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any, jax.Array]:
    """Parameters and optimizer state after a step on each of `batches`, and the losses [steps]."""

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(_loss)(params, batch, model)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), batches)
    return params, opt_state, losses


def _loss(params: Any, batch: data.SupervisedBatch, model: ModelConfig) -> jax.Array:
    """Mean negative log-likelihood of the solutions' tokens."""
    hidden = decoder.hidden(params, batch.tokens[:, :-1], model)
    mask = batch.mask[:, 1:]
    logp, _ = head.token_logp(params, hidden, batch.tokens[:, 1:], mask, model, 1.0)
    return -jnp.sum(logp) / jnp.maximum(jnp.sum(mask), 1)
