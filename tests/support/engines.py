"""Tiny engines with weights far from uniform, and what they sample."""

import functools

import jax
import numpy as np

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Example, Prompts, Sampling
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.generate import rollout
from support.random_params import random_params

DENSE = ModelConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
MOE = ModelConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    num_experts=4,
    experts_per_token=2,
    expert_size=24,
    tie_word_embeddings=True,
)
STOP = (1, 5)
P = 9
T = 20
G = 3  # 29 positions: windows of 16 and 29


@functools.cache
def make_params(model):
    """Weights large enough that the policy is far from uniform."""
    return random_params(model, 0.16, norms=1.0)


def make_prompts(count=7):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[1, P], rng.integers(1, P + 1, count - 2)]).astype(np.int32)
    tokens = np.where(np.arange(P) < lengths[:, None], rng.integers(0, 37, (count, P)), 0).astype(
        np.int32
    )
    return Prompts(tokens, lengths, (Example("", ""),) * count)


@functools.cache
def make_engine(model, slots=4, steps=3, **options):
    return jetstream.Engine(
        model, slots=slots, max_length=P + T, stop_ids=STOP, steps=steps, **options
    )


@functools.cache
def make_weights(model, dtype="float32", version=0):
    return sync.converter(model, Precision(weights=dtype), sharding.single_device_mesh())(
        make_params(model), version
    )


@functools.cache
def sample(model, weights="float32", temperature=0.8, slots=4, steps=3, key=1, **options):
    engine = make_engine(model, slots, steps)
    return rollout(
        engine,
        make_weights(model, weights),
        make_prompts(),
        samples=G,
        key=jax.random.key(key),
        max_tokens=T,
        sampling=Sampling(temperature, **options),
    )


def scored(model, out, temperature):
    """The trainer's log-probs of every sampled token, one sequence at a time, and the rollout's
    own.
    """
    forward = jax.jit(decoder.logits, static_argnums=2)
    width = P + T
    for i, n in enumerate(out.lengths):
        prompt = out.prompts.tokens[i // G, : out.prompts.lengths[i // G]]
        row = np.zeros((1, width), np.int32)
        row[0, : len(prompt) + n] = np.concatenate([prompt, out.tokens[i, :n]])
        logp = jax.nn.log_softmax(forward(make_params(model), row, model)[0] / temperature)
        yield (
            np.asarray(logp)[len(prompt) - 1 : len(prompt) - 1 + n],
            out.tokens[i, :n],
            out.rollout_logp[i, :n],
        )
