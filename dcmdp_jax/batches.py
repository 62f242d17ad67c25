"""The batches that a run trains on: prompts, their completions, rewards, all packed into rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dcmdp_jax import dynamic_sampling, rewards, seeds, sharding, train_state
from dcmdp_jax.config import Config, RolloutConfig
from dcmdp_jax.distributed import processes
from dcmdp_jax.dynamic_sampling import Draw, has_spread
from dcmdp_jax.monitoring import measurements
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import Batch, Rollout, Sampler, Sampling, Scored, TrainState
from dcmdp_jax.rollout import servers
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens import packing


class Collected(NamedTuple):
    """What one step trains on."""

    packed: Batch | None  # laid out over the training mesh
    metrics: dict[str, float]  # `measurements.measure` of it
    prompt_state: Any  # of the prompt iterator after this batch; checkpoints save it

    def without_arrays(self) -> Collected:
        """Returns the rest of it, which may be kept: no batch lies on the devices beside the next
        update's.
        """
        return self._replace(packed=None)


class Batches:
    """An iterator over the batches of the steps that are left; owns the sampler and its weights.

    With staleness, `before_update` copies the weights of the next batch, which the update donates,
    and `after_update` samples that batch while the update runs; with `RolloutConfig.in_flight` the
    sampler goes on with the updated weights once they are there. Without staleness, `before_update`
    frees the sampler's weights, `after_update` copies the updated ones, and each batch is sampled
    when the iterator is advanced. Iteration ends after `config.steps` steps, or where any process
    was asked to stop.
    """

    def __init__(
        self, config: Config, inputs: Inputs, state: TrainState, should_stop: Callable[[], bool]
    ):
        """Makes the sampler and gives it the weights of `state`.

        Raises records.NotFinite where one of them is not finite.
        """
        self.sampler = make_sampler(config, inputs)
        self._config = config
        self._inputs = inputs
        self._should_stop = should_stop
        self._number = int(state.step)  # of the step that the next batch is for
        self._looks_ahead = config.rollout.staleness > 0
        self._next: Collected | None = None
        self._update_weights(state)

    def __iter__(self) -> Iterator[Collected]:
        batch = self._collect_next()
        while batch is not None:
            yield batch
            batch = self._next if self._looks_ahead else self._collect_next()

    def before_update(self, state: TrainState) -> None:
        """To be called before each update, with the state that it donates.

        With staleness it gives the sampler the weights of the next batch. Otherwise a sampler that
        has `release_weights` frees its own, which nothing reads before `after_update`: they do not
        lie beside the update.
        """
        if self._looks_ahead:
            # Only `stale` and `step` of this state are updated yet; the sampler reads no other
            # field.
            self._update_weights(
                state._replace(stale=(*state.stale, state.params)[1:], step=state.step + 1)
            )
        elif hasattr(self.sampler, "release_weights"):
            self.sampler.release_weights()

    def after_update(self, state: TrainState) -> None:
        """To be called once each update is dispatched, with the updated state.

        With staleness it samples the next batch while the update runs; otherwise it gives the
        sampler the updated weights.
        """
        if self._looks_ahead:
            with self._in_flight(state):
                self._next = self._collect_next()
        else:
            self._update_weights(state)

    def _in_flight(self, state: TrainState) -> contextlib.AbstractContextManager:
        if not self._config.rollout.in_flight:
            return contextlib.nullcontext()

        def params() -> Any:
            return train_state.for_sampler(
                train_state.policy_params(state, self._config), self._config
            )

        # `state.step` would be waited for; batches are numbered as steps are
        return self.sampler.in_flight(state.params, params, version=self._number)

    def collect(self, stream: Stream, number: int) -> Collected | None:
        """Samples, scores and packs batch `number` of `stream`, from all processes, with the
        sampler's present weights.

        Returns None where any process was asked to stop. All processes must call; where the
        verifier fails on one, all raise.
        """
        config = self._config
        seed = seeds.seed(config.seed, stream, number)
        batch = self._draw(seed)
        if batch is None:
            return None
        metrics: dict[str, float] = {}
        if stream is Stream.ROLLOUT and config.data.max_refills:
            refilled = self._refill(batch, number)
            if refilled is None:
                return None
            batch, metrics = refilled
        packed = packing.pack(
            batch.scored,
            minibatches=config.algorithm.minibatches,
            microbatches=config.algorithm.microbatches,
            row_length=config.row_length,
            row_divisor=sharding.num_batch_shards(self._inputs.mesh),
            pad_id=self._inputs.tokenizer.pad_id,
            seed=seed,
            draw_groups=config.algorithm.share_prompts,
            share_prompts=config.shares_prompts,
            with_versions=config.rollout.in_flight,
        )
        metrics |= measurements.measure_rows(batch.scored, packed)
        return Collected(
            processes.make_global(packed, train_state.batch_shardings(config, self._inputs.mesh)),
            measurements.measure(*batch) | metrics,
            self._inputs.prompts.get_state(),
        )

    def _draw(self, seed: int) -> Draw | None:
        """Samples and scores the next prompts of all processes; None where one is asked to stop.

        Raises Refused where a verifier with a time limit raises on every completion.
        """
        engines = processes.num_engines(self._config.rollout)
        scored = self._sample_and_score(seed)
        if processes.any_process(scored is None):
            return None
        sources = [example.source for example in scored.rollout.prompts.examples]
        scored = dynamic_sampling.arrays_of(scored)
        if engines > 1:
            scored = processes.gather(scored)
            sources = measurements.gather_sources(sources)
        else:
            # on another process a verifier may take too long, or answer otherwise; all must draw
            # the same refills
            own = scored.reward, scored.failed, scored.raised
            reward, failed, raised = processes.from_process_0(own)
            scored = scored._replace(reward=reward, failed=failed, raised=raised)
        if scored.raised is not None and scored.raised.all():
            raise processes.Refused(
                f"data.verifier raises on all {len(scored.raised)} completions of a batch, the "
                "first time as printed above; fix it"
            )
        return Draw(scored, sources)

    def _refill(self, batch: Draw, number: int) -> tuple[Draw, dict[str, float]] | None:
        """Returns the batch of step `number` with further prompts in place of those without spread,
        of at most `max_refills` draws, and its metrics; None where any process was asked to stop.
        """
        config = self._config
        rounds = [dynamic_sampling.summary(batch)]
        while len(rounds) <= config.data.max_refills and not has_spread(batch).all():
            refill = number * seeds.REFILLS + len(rounds)
            more = self._draw(seeds.seed(config.seed, Stream.REFILL, refill))
            if more is None:
                return None
            rounds.append(dynamic_sampling.summary(more))
            batch = dynamic_sampling.replace_groups(batch, more)
        return batch, dynamic_sampling.measure(rounds, batch)

    def _collect_next(self) -> Collected | None:
        """The batch of the next step; None after the last."""
        if self._number >= self._config.steps:
            return None
        self._number += 1
        return self.collect(Stream.ROLLOUT, self._number - 1)

    @phase("sampling")
    def _sample_and_score(self, seed: int) -> Scored | None:
        """Returns this process's part of a batch; None where it was asked to stop."""
        config = self._config
        share = processes.share(config.data.prompts_per_step, processes.num_engines(config.rollout))
        with processes.raise_on_all():  # a sampler or verifier that fails on one process ends all
            try:
                rollout = self.sampler.sample(
                    next(self._inputs.prompts),
                    samples=config.rollout.samples,
                    max_tokens=config.rollout.max_tokens,
                    sampling=sampling(config.rollout),
                    stop_strings=config.rollout.stop_strings,
                    seed=seed,
                    offset=share.start * config.rollout.samples,
                    should_stop=self._should_stop,
                )
                check_rollout(rollout, config)
                if not config.algorithm.replay_routing:
                    # the batch is then packed without them
                    rollout = rollout._replace(experts=None)
                if not config.rollout.top_logprobs:
                    rollout = rollout._replace(top_tokens=None, top_logp=None)
                with phase("computing rewards"):
                    return rewards.score(
                        rollout,
                        self._inputs.tokenizer.decode,
                        self._inputs.verifiers or config.data.reward_function(),
                        self._should_stop,
                    )
            except Interrupted:
                return None

    # the update may still be computing, and this waits for it
    @phase("updating, then giving the weights to the sampler")
    def _update_weights(self, state: TrainState) -> None:
        takes_early = self._config.rollout.in_flight
        if takes_early and self.sampler.version == int(train_state.sampled_version(state)):
            return  # they came in flight
        params, version = train_state.sampled_from(state, self._config)
        params = train_state.for_sampler(params, self._config)
        self.sampler.update_weights(params, int(version))


def make_sampler(config: Config, inputs: Inputs) -> Sampler:
    """Returns what this process samples with."""
    make = config.rollout.sampler
    if config.rollout.server:
        make = servers.sampler
    elif make is None:
        # only the default sampler needs google-jetstream
        from dcmdp_jax.rollout import jetstream

        make = jetstream.sampler
    sampler = make(config, inputs.model_config, inputs.tokenizer, inputs.decode_mesh)
    if config.rollout.in_flight and not hasattr(sampler, "in_flight"):
        raise ValueError(
            "rollout.in_flight needs a sampler that takes weights while it samples, by a method "
            "in_flight (see records.Sampler), and this one has none; set --rollout.in_flight no"
        )
    return sampler


def sampling(config: RolloutConfig) -> Sampling:
    """Returns how a run's tokens are drawn."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


def check_rollout(rollout: Rollout, config: Config) -> None:
    """Raises ValueError if a sampler's rollout is not as this configuration needs it."""
    options = config.rollout
    width = rollout.tokens.shape[1]
    if width != options.max_tokens:
        raise ValueError(
            f"the sampler reports completions of {width} columns; pad them to "
            f"rollout.max_tokens={options.max_tokens}, so that all batches have one shape"
        )
    is_cut = {"top_k": options.top_k > 0, "top_p": options.top_p < 1, "min_p": options.min_p > 0}
    cuts = [name for name, cut in is_cut.items() if cut]
    if cuts and rollout.support_mass is None:
        raise ValueError(
            f"rollout.{cuts[0]}={getattr(options, cuts[0])} cuts the support that tokens are drawn "
            "from, and the sampler reports no support_mass, without which delta would count the "
            "cut as a gap; report Rollout.support_mass, ones if nothing is cut"
        )
    if config.algorithm.replay_routing and rollout.experts is None:
        raise ValueError(
            "algorithm.replay_routing replays the experts that the sampler chose, and the sampler "
            "reports none; report Rollout.experts, or set --algorithm.replay_routing no"
        )
    shape = (*rollout.tokens.shape, options.top_logprobs)
    reported = [getattr(x, "shape", None) for x in (rollout.top_tokens, rollout.top_logp)]
    if options.top_logprobs and reported != [shape, shape]:
        raise ValueError(
            f"rollout.top_logprobs={options.top_logprobs} asks for Rollout.top_tokens and top_logp "
            f"of shape {shape}, and the sampler reports {reported[0]} and {reported[1]}; report "
            "them, padded with -inf, or set --rollout.top_logprobs 0"
        )
