"""A tiny decoder, made-up rollouts, and one compiled step of them."""

import dataclasses
import functools

import jax
import numpy as np

from dcmdp_jax import compiled_step, constraint, sharding, train_state
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    ModelSource,
    RolloutConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.records import Example, Prompts, Scored
from dcmdp_jax.tokens import packing
from support.random_params import random_params
from support.rollouts import make_rollout

TASK = object()  # never asked
B = 4
G = 4
P = 5
T = 7
ROW = 2 * (P + T)
TOLERANCE = 0.05
MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
)
MOE = dataclasses.replace(MODEL, num_experts=4, experts_per_token=2, expert_size=16)
CLIPPED = functools.partial(policy.clipped, clip_low=0.2, clip_high=0.24)


def make_config(model=MODEL, surrogate=corrections.decoupled(CLIPPED), **algorithm):
    """Rows hold two longest completions, with a prompt each or one for both."""
    algorithm = {"row_length": ROW} | algorithm
    return Config(
        name="test",
        model=ModelSource(
            architecture=dataclasses.replace(model, compute=Compute()), compute=model.compute
        ),
        data=DataConfig(verifier=max, task=TASK, prompts_per_step=B, max_prompt_tokens=P),
        rollout=RolloutConfig(samples=G, max_tokens=T, temperature=0.9),
        algorithm=AlgorithmConfig(
            advantage=advantages.grpo,
            surrogate=surrogate,
            reduce=reduce.token_mean,
            learning_rate=1e-2,
            **algorithm,
        ),
        constraint=ConstraintConfig(
            shaping=constraint.shape_advantage,
            dual=constraint.projected_ascent,
            tolerance=TOLERANCE,
        ),
        steps=1,
    )


@functools.cache
def make_params(model=MODEL):
    return random_params(model, 0.1, norms=1.0)


def make_scored(seed=0, reward=None):
    """A made-up rollout: ragged prompts and completions, log-probs a little off the trainer's."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(1, P + 1, B).astype(np.int32)
    told = rng.integers(0, T + 1, B * G).astype(np.int32)
    prompts = Prompts(rng.integers(0, 16, (B, P)).astype(np.int32), asked, (Example("", ""),) * B)
    rollout = make_rollout(
        prompts,
        rng.integers(0, 16, (B * G, T)),
        told,
        rng.normal(-2.5, 0.7, (B * G, T)),
        told < T,
        0.9,
    )
    reward = rng.integers(0, 2, B * G) if reward is None else reward
    return Scored(rollout, np.asarray(reward, np.float32))


@functools.cache
def cached_init(config, model, mesh):
    return jax.jit(
        functools.partial(train_state.init, config),
        out_shardings=train_state.shardings(config, model, mesh),
    )


def fresh_state(config, model, mesh, params=None):
    make = cached_init(config, model, mesh)
    return make(jax.tree.map(np.array, make_params(model) if params is None else params))


cached_step = functools.cache(compiled_step.compile_step)


def run(config, scored, mesh=None, row_length=ROW, params=None):
    """One step from fresh state: (params before, state after, metrics that are numbers)."""
    mesh = mesh or ONE
    model = config.model.architecture
    algorithm = config.algorithm
    batch = packing.pack(
        scored,
        minibatches=algorithm.minibatches,
        microbatches=algorithm.microbatches,
        row_length=row_length,
        row_divisor=sharding.num_batch_shards(mesh),
        seed=1,
        draw_groups=config.algorithm.share_prompts,
        share_prompts=config.shares_prompts,
    )
    params = make_params(model) if params is None else params
    state = fresh_state(config, model, mesh, params)
    state, metrics = cached_step(config, model, mesh)(
        state, jax.device_put(batch, train_state.batch_shardings(config, mesh))
    )
    return (
        params,
        state,
        {name: value for name, value in jax.device_get(metrics).items() if name != "gaps"},
    )


ONE = sharding.single_device_mesh()


forward = jax.jit(decoder.logits, static_argnums=2)


def row_logp(params, model, scored):
    """Log-probs of every completion, one unpacked row each: [N, T]."""
    rollout = scored.rollout
    rows = np.zeros((B * G, P + T), np.int32)
    starts = np.repeat(rollout.prompts.lengths, G)
    for i, n in enumerate(starts):
        rows[i, :n], rows[i, n : n + T] = rollout.prompts.tokens[i // G, :n], rollout.tokens[i]
    logp = jax.nn.log_softmax(forward(params, rows, model) / 0.9)
    position = starts[:, None] - 1 + np.arange(T)
    return logp[np.arange(B * G)[:, None], position, rollout.tokens]


def assert_close(a, b, atol=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, rtol=0),
        a,
        b,
    )
