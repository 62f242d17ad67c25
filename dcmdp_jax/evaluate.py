"""Held-out evaluation of a policy through the engine."""

from __future__ import annotations

import jax
import numpy as np

from dcmdp_jax import rewards
from dcmdp_jax.config import Config
from dcmdp_jax.records import Prompts, Sampling, Weights
from dcmdp_jax.rollout.generate import Engine, rollout
from dcmdp_jax.tokenizer import Tokenizer


def pass_rate(engine: Engine, weights: Weights, prompts: Prompts, config: Config, tokenizer: Tokenizer, key: jax.Array) -> float:
    """Mean reward of one sample per held-out prompt, in [0, 1] for verifiers that answer 0 or 1."""
    sampled = rollout(engine, weights, prompts, samples=1, key=key, max_tokens=config.rollout.max_tokens,
                      sampling=Sampling(config.eval.temperature), stop_strings=config.rollout.stop_strings,
                      decode=tokenizer.decode)
    return float(np.mean(rewards.score(sampled, tokenizer.decode, config.data.verifier).reward))
