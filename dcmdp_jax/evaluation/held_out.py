"""Held-out evaluation of two policies: the one that the sampler draws from, and the trainer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dcmdp_jax import rewards, seeds, train_state
from dcmdp_jax.config import Config, Precision
from dcmdp_jax.distributed import processes
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import Prompts, Sampler, Sampling, Scored, TrainState
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens.tokenizer import Tokenizer
from dcmdp_jax.verifier_pool import VerifierPool

SHOWN = 8  # completions that are kept of an evaluation, of its first problems


class Sampled(NamedTuple):
    """The completions of an evaluation."""

    pass_rate: float  # over all processes
    scored: Scored | None  # those of this process; None if its engine had no share


class HeldOut:
    """Measures both policies on `inputs.held_out`.

    The trainer's policy is sampled from by an engine that rounds nothing, in the place of the run's
    own engine. A run that replaces the engine (`rollout.sampler`, `rollout.server`) has its sampler
    measured alone.
    """

    def __init__(
        self, config: Config, inputs: Inputs, sampler: Sampler, should_stop: Callable[[], bool]
    ):
        self._config = config
        self._inputs = inputs
        self._sampler = sampler
        self._should_stop = should_stop
        self._exact_config = exact(config)
        self._is_exact = is_exact(config)
        self._exact: Any = None  # a JetStreamSampler, made at its first use
        # of the last measurement, as `metrics.Log.write_samples` takes them; process 0 has them
        self.samples: list[dict[str, Any]] = []

    @phase("evaluating")
    def measure(self, state: TrainState) -> dict[str, float]:
        """Returns `reward_eval_infer`, the pass rate of the run's sampler with its present weights,
        and `reward_eval_train`, that of the parameters of `state`; the latter only if
        the library's own engine samples.

        Returns nothing where there are no held-out problems, or the run was asked to stop. All
        processes must call.
        """
        if self._inputs.held_out is None:
            return {}
        infer = self._sample(self._sampler)
        train = None
        if infer is not None and not self.samples:  # the first: the trainer's takes as long again
            processes.log0(f"step {int(state.step)}: held-out engine {infer.pass_rate:.3f}")
        if infer is not None and self._config.rollout.own_engine:
            train = infer if self._is_exact else self._sample_trainer(state)
        if infer is None or (train is None and self._config.rollout.own_engine):
            processes.log0(
                f"stopped in the evaluation of step {int(state.step)}, which is left out"
            )
            self.samples = []
            return {}
        self.samples = _shown(infer.scored, self._inputs.tokenizer)
        measured = {"reward_eval_infer": infer.pass_rate}
        if train is not None:
            measured["reward_eval_train"] = train.pass_rate
        return measured

    def _sample_trainer(self, state: TrainState) -> Sampled | None:
        if self._exact is None:
            # only the default sampler needs google-jetstream
            from dcmdp_jax.rollout import jetstream

            inputs = self._inputs
            self._exact = jetstream.sampler(
                self._exact_config, inputs.model_config, inputs.tokenizer, inputs.decode_mesh
            )
        self._exact.update_weights(train_state.policy_params(state, self._config), int(state.step))
        sampled = self._sample(self._exact)
        self._exact.release_weights()
        return sampled

    def _sample(self, sampler: Sampler) -> Sampled | None:
        config = self._config
        return sample(
            sampler,
            self._inputs.held_out,
            config,
            self._inputs.tokenizer,
            self._inputs.verifiers or config.data.reward_function(),
            seeds.seed(config.seed, Stream.HELD_OUT),
            self._should_stop,
        )


def exact(config: Config) -> Config:
    """Returns the configuration whose engine rounds nothing: it draws from the trainer's policy."""
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, precision=Precision())
    )


def is_exact(config: Config) -> bool:
    """True if the run's own engine draws from the trainer's policy."""
    return config.rollout == exact(config).rollout and not config.rollout.staleness


def _shown(scored: Scored | None, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the first completions with their prompts and rewards."""
    if scored is None:
        return []
    rollout = scored.rollout
    return [
        {
            "prompt": rewards.prompt_text(rollout.prompts.examples[i].prompt),
            "completion": tokenizer.decode(rollout.tokens[i, : rollout.text_lengths[i]]),
            "reward": float(scored.reward[i]),
        }
        for i in range(min(SHOWN, len(rollout.lengths)))
    ]


def sample(
    sampler: Sampler,
    prompts: Prompts,
    config: Config,
    tokenizer: Tokenizer,
    verifier: Callable[..., float] | VerifierPool,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Sampled | None:
    """Returns one completion per prompt, with their mean reward.

    Each engine samples its share of the prompts; all processes must call, and get the mean over all
    prompts. Returns None where a verifier or a server did not return in time, and any process was
    asked to stop.
    """
    count = len(prompts.lengths)
    engines = processes.num_engines(config.rollout)
    share = processes.share(count, engines)
    # shares of one size, the last ones padded
    reward = np.full(-(-count // engines), np.nan, np.float32)
    interrupted = False
    scored = None
    with processes.raise_on_all():  # a sampler or verifier that fails on one process ends all
        try:
            if share.stop > share.start:
                rollout = sampler.sample(
                    Prompts(prompts.tokens[share], prompts.lengths[share], prompts.examples[share]),
                    samples=1,
                    max_tokens=config.rollout.max_tokens,
                    sampling=Sampling(config.eval.temperature),
                    stop_strings=config.rollout.stop_strings,
                    seed=seed,
                    offset=share.start,
                    should_stop=lambda: False,
                )
                scored = rewards.score(rollout, tokenizer.decode, verifier, should_stop)
                reward[: share.stop - share.start] = scored.reward
        except Interrupted:
            interrupted = True
    if processes.any_process(interrupted):
        return None
    rewards_of_all = reward if engines == 1 else processes.gather(reward)
    return Sampled(float(np.mean(rewards_of_all[:count])), scored)
