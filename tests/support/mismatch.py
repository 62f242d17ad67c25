"""The tiny quickstart with an int4 engine, two layers and weights far from uniform."""

import jax
import jax.numpy as jnp

from dcmdp_jax import seeds, train_state
from dcmdp_jax.batches import make_sampler
from dcmdp_jax.models import decoder
from dcmdp_jax.run.checkpoint import Checkpoints
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tools import parity
from support import training
from support.random_params import random_params

FLOAT = {"rollout.precision.weights": "float32"}
EXPERTS = {
    "model.architecture.num_experts": 4,
    "model.architecture.experts_per_token": 2,
    "model.architecture.expert_size": 16,
}
OPTIONS = {"model.architecture.num_layers": 2, "rollout.temperature": 0.8, "warmup.steps": 0}


def tiny(**changes):
    """Returns the quickstart, smaller: an int4 engine."""
    return training.tiny(**OPTIONS | changes)


def sharp(model):
    """Returns weights far from a uniform distribution, so that a wrong log-prob shows."""
    return parity.TrainerWeights(random_params(model, 0.3, norms=1.0), 3, "random")


def sampled(run, inputs, weights):
    """Returns the rollout that `diagnose` samples."""
    sampler = make_sampler(run, inputs)
    sampler.update_weights(weights.params, weights.version)
    seed = seeds.seed(run.seed, Stream.PARITY, weights.version)
    return parity.sample(sampler, run, inputs, seed)


def command(name, workdir, *words, **changes):
    return [
        name,
        training.QUICKSTART,
        "--workdir",
        str(workdir),
        *words,
        *training.words(**OPTIONS | changes),
    ]


def make_run(workdir, run, steps):
    """Writes checkpoints as a run does; returns the prompts of the batch after them.

    All parameters are the step's number, the stale ones the number before.
    """
    inputs = read_inputs(run, training.ONE_DEVICE)
    state = jax.jit(
        lambda: train_state.init(run, decoder.init(jax.random.key(0), inputs.model_config))
    )()
    saved = Checkpoints(workdir, run.checkpoint.keep)
    for number in steps:
        next(inputs.prompts)
        now, before = (
            jax.tree.map(lambda x, n=n: jnp.full_like(x, n), state.params)
            for n in (number, number - 1)
        )
        saved.save(
            state._replace(
                params=now, step=jnp.int32(number), stale=(before,) * run.rollout.staleness
            ),
            inputs.prompts.get_state(),
        )
    saved.close()
    return next(inputs.prompts)
