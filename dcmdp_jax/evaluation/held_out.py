"""Held-out evaluation of a policy through the engine."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from dcmdp_jax import rewards
from dcmdp_jax.config import Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.records import Prompts, Sampling, Weights
from dcmdp_jax.rollout.generate import SlotEngine, rollout
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokenizer import Tokenizer


def pass_rate(
    engine: SlotEngine,
    weights: Weights,
    prompts: Prompts,
    config: Config,
    tokenizer: Tokenizer,
    key: jax.Array,
    asked: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean reward of one sample per held-out prompt, in [0, 1] for verifiers that answer 0 or 1.

    Each engine samples its part of the prompts; all processes get the mean. None where a verifier
    did not return and any process was asked to stop.
    """
    count = len(prompts.lengths)
    engines = processes.num_engines(config.rollout)
    here = processes.share(count, engines)
    # parts of one size, the last ones padded
    reward = np.full(-(-count // engines), np.nan, np.float32)
    sampled = None
    if here.stop > here.start:
        own = Prompts(prompts.tokens[here], prompts.lengths[here], prompts.examples[here])
        sampled = rollout(
            engine,
            weights,
            own,
            samples=1,
            key=key,
            first=here.start,
            max_tokens=config.rollout.max_tokens,
            sampling=Sampling(config.eval.temperature),
            stop_strings=config.rollout.stop_strings,
            decode=tokenizer.decode,
        )
    left = False
    with (
        processes.raise_on_all()
    ):  # what one process's verifier fails on ends all in the same place
        try:
            if sampled is not None:
                scored = rewards.score(
                    sampled, tokenizer.decode, config.data.reward_function(), asked
                )
                reward[: here.stop - here.start] = scored.reward
        except Interrupted:
            left = True
    if processes.any_process(left):
        return None
    return float(np.mean((reward if engines == 1 else processes.gather(reward))[:count]))
