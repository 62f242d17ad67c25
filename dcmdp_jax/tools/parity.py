"""Compares the log-probs that a sampler reports for its tokens with those of the trainer.

What `dcmdp parity` runs: the gap between them by length of context, a limit that an exact engine
must keep, and the tolerance that the gap calls for. It works with any sampler of a run.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dcmdp_jax import constraint, files, seeds, sharding, train_state, trainer_scores
from dcmdp_jax.batches import check_rollout, make_sampler, sampling
from dcmdp_jax.config import Calibrated, Config, Precision
from dcmdp_jax.losses import diagnostics
from dcmdp_jax.models import scoring
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Rollout, Sampler, Scored
from dcmdp_jax.report import tables
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.run.starting import starting_policy, starting_weights, unwarmed_weights
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tokens import packing

CLIP = 0.2
EXACT = 1e-5  # nats between the trainer and an engine that rounds nothing
CONTEXT_EDGES = (64, 256, 1024, 4096)  # tokens up to and with the one that is scored

# (params, rollout, seed of the packing, split=1) -> log-probs [N, T]
Score = Callable[..., np.ndarray]


class TrainerWeights(NamedTuple):
    """Parameters of the trainer that a sampler is given."""

    params: Any
    version: int  # constrained steps that led to them
    origin: str  # where they come from, in words
    prompt_state: Any = None  # iterator state before their next batch; None: the present one


class GapStatistics(NamedTuple):
    """Trainer against sampler on a set of tokens.

    D is the trainer's log-prob minus the sampler's, delta the absolute difference of the
    probabilities.
    """

    tokens: int
    logp_diff_mean: float  # mean |D|, nats
    logp_diff_max: float  # largest |D|
    prob_diff_max: float  # largest delta
    # Mean of e^D - 1 - D, nats: estimates KL(sampler || trainer) on the sampler's own tokens.
    k3: float
    # Share of tokens with e^D outside [0.8, 1.2], which a clip of 0.2 cuts before any update.
    clipped: float
    delta: float  # mean delta


class Parity(NamedTuple):
    """Gaps by length of the context, and the tolerance that they call for."""

    origin: str  # of the weights
    gaps: dict[str, GapStatistics]  # of each bucket that has tokens; "all" last
    dropped: int  # tokens whose reported log-prob is not finite; no gap includes them
    calibration: constraint.Calibration


def load(config: Config, inputs: Inputs, workdir: pathlib.Path) -> TrainerWeights:
    """Returns the weights that the next batch would be sampled with.

    They are those of the newest complete checkpoint in `workdir`, else of the model's folder, else
    random.
    """
    if checkpoint.steps(workdir):
        like = train_state.abstract(config, inputs.model_config, inputs.mesh)
        state, prompt_state = checkpoint.read(workdir, like)
        params, version = train_state.sampled_from(state, config)
        origin = f"checkpoint {int(state.step)} of {workdir}"
        if state.stale:
            origin += f", weights of step {int(version)}"
        return TrainerWeights(params, int(version), origin, prompt_state)
    origin = config.model.folder or (
        "random weights, which are close to a uniform distribution and show little of a gap; "
        "train, or give --model.folder DIR"
    )
    params = starting_policy(unwarmed_weights(config, inputs), config, inputs)
    return TrainerWeights(params, 0, origin)


def starting(config: Config, inputs: Inputs) -> TrainerWeights:
    """Returns the weights that a run's first batch is sampled with, warmed up as in the run.

    Leaves nothing on disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        params = starting_weights(config, inputs, pathlib.Path(folder), lambda: False)
    params = starting_policy(params, config, inputs)
    origin = config.model.folder or "random weights"
    if config.warmup.steps:
        origin += f", after {config.warmup.steps} steps of warm-up"
    return TrainerWeights(params, 0, origin)


def sample(sampler: Sampler, config: Config, inputs: Inputs, seed: int) -> Rollout:
    """Returns completions of the next prompts, drawn as a run draws them."""
    rollout = sampler.sample(
        next(inputs.prompts),
        samples=config.rollout.samples,
        max_tokens=config.rollout.max_tokens,
        sampling=sampling(config.rollout),
        stop_strings=config.rollout.stop_strings,
        seed=seed,
        offset=0,
        should_stop=lambda: False,
    )
    check_rollout(rollout, config)
    return rollout


def scorer(config: Config, inputs: Inputs) -> Score:
    """Returns the trainer's scoring of a rollout.

    Completions are packed as in a step, on the training mesh, and scored at the rollout's
    temperature. With `split` a pass scores that many times fewer completions, if their number is a
    multiple.
    """
    rows = sharding.batch_sharding(inputs.mesh, 0)
    replicated = sharding.replicated(inputs.mesh)
    packed_logp = jax.jit(
        partial(_packed_logp, config=config, model=inputs.model_config),
        in_shardings=(None, rows, rows, rows, replicated, rows, rows),
        out_shardings=replicated,
    )

    def score(params: Any, rollout: Rollout, seed: int, split: int = 1) -> np.ndarray:
        count = len(rollout.tokens)
        minibatches = config.algorithm.minibatches
        microbatches = config.algorithm.microbatches
        if count % (minibatches * microbatches * split) == 0:
            microbatches *= split
        how = {
            "minibatches": minibatches,
            "microbatches": microbatches,
            "row_length": config.row_length,
            "row_divisor": sharding.num_batch_shards(inputs.mesh),
            "seed": seed,
            "draw_groups": config.algorithm.share_prompts,
            "share_prompts": config.shares_prompts,
        }
        batch = packing.pack(
            Scored(rollout, np.zeros(count, np.float32)), pad_id=inputs.tokenizer.pad_id, **how
        )
        packed = []
        for i, j in np.ndindex(minibatches, microbatches):
            micro = jax.tree.map(lambda x, i=i, j=j: x[i, j], batch)
            packed.append(
                packed_logp(
                    params,
                    micro.tokens,
                    micro.positions,
                    micro.segment_ids,
                    micro.index,
                    micro.prefix_ids,
                    micro.replayed,
                )
            )
        logp = np.concatenate(packed)
        by_completion = np.zeros_like(rollout.rollout_logp)
        order = packing.packing_order(rollout, **how)
        by_completion[order] = np.where(batch.mask.reshape(logp.shape), logp, 0)
        return by_completion

    return score


def _packed_logp(
    params,
    tokens,
    positions,
    segment_ids,
    index,
    prefix_ids,
    replayed,
    *,
    config: Config,
    model: ModelConfig,
) -> jax.Array:
    return scoring.packed_logp(
        trainer_scores.scored_params(params, config, model),
        tokens,
        positions,
        segment_ids,
        index,
        model,
        config.rollout.temperature,
        prefix_ids=prefix_ids,
        replayed=replayed,
    )[0]


def measure(
    config: Config,
    inputs: Inputs,
    weights: TrainerWeights,
    batches: int,
    *,
    stream: Stream = Stream.PARITY,
    slack: float = 0.2,
) -> Parity:
    """Samples rollout batches with fixed weights and scores their tokens with the trainer.

    Args:
        weights: must fit `inputs.model_config`.
        batches: how many, 2 or more: the floor's standard error comes from their differences.
        stream: batch i is drawn with seed i of it.
        slack: of the suggested tolerance.
    """
    sampler = make_sampler(config, inputs)
    sampler.update_weights(train_state.for_sampler(weights.params, config), weights.version)
    score = scorer(config, inputs)
    if weights.prompt_state is not None:
        inputs.prompts.set_state(weights.prompt_state)
    old_logp = []
    rollout_logp = []
    mask = []
    context = []
    for number in range(batches):
        seed = seeds.seed(config.seed, stream, number)
        rollout = sample(sampler, config, inputs, seed)
        old_logp.append(score(weights.params, rollout, seed))
        rollout_logp.append(packing.full_vocab_logp(rollout))
        mask.append(token_mask(rollout))
        prompt_lengths = np.repeat(rollout.prompts.lengths, config.rollout.samples)
        context.append(prompt_lengths[:, None] + 1 + np.arange(rollout.tokens.shape[1]))
    sums = []
    counts = []
    for batch in zip(old_logp, rollout_logp, mask):
        delta_sum, count = constraint.measure(*batch)
        sums.append(float(delta_sum))
        counts.append(float(count))
    mask = np.concatenate(mask)
    rollout_logp = np.concatenate(rollout_logp)
    return Parity(
        weights.origin,
        by_context(np.concatenate(old_logp), rollout_logp, mask, np.concatenate(context)),
        int(np.sum(mask & ~np.isfinite(rollout_logp))),
        constraint.calibrate_tolerance(np.array(sums), np.array(counts), slack=slack),
    )


def token_mask(rollout: Rollout) -> np.ndarray:
    """Returns [N, T] bool, true for the tokens that were sampled."""
    return np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]


def by_context(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray, context: np.ndarray
) -> dict[str, GapStatistics]:
    """Returns the gaps of the buckets that have tokens, and of all tokens.

    Arrays are [N, T]; `context` is the number of tokens up to and with this one, prompt included.
    """
    names = [f"<= {edge}" for edge in CONTEXT_EDGES] + [f"> {CONTEXT_EDGES[-1]}"]
    bucket = np.searchsorted(CONTEXT_EDGES, context)
    gaps = {}
    for number, name in enumerate(names):
        inside = mask & (bucket == number)
        if inside.any():
            gaps[name] = gap_statistics(old_logp, rollout_logp, inside)
    gaps["all"] = gap_statistics(old_logp, rollout_logp, mask)
    return gaps


def gap_statistics(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray
) -> GapStatistics:
    """Returns the figures of the tokens in `mask`; arrays are [N, T]."""
    values = {name: float(value) for name, value in _metrics(old_logp, rollout_logp, mask).items()}
    return GapStatistics(
        tokens=int(np.sum(mask)),
        logp_diff_mean=values["logp_diff_mean"],
        logp_diff_max=values["logp_diff_max"],
        prob_diff_max=values["prob_diff_max"],
        k3=values["k3"],
        clipped=values["ratio_out"],
        delta=values["prob_diff_mean"],
    )


@jax.jit
def _metrics(old_logp, rollout_logp, mask) -> dict[str, jax.Array]:
    return diagnostics.prob_diff(old_logp, rollout_logp, mask) | diagnostics.log_ratio(
        old_logp, rollout_logp, mask, low=1 - CLIP, high=1 + CLIP
    )


def default_limit(config: Config, inputs: Inputs) -> float | None:
    """Returns the bound on |D| if engine and trainer can differ by float32 round-off alone, or
    None.
    """
    exact = (
        config.rollout.own_engine
        and config.rollout.precision == Precision()
        and not inputs.model_config.compute.bfloat16
    )
    return EXACT if exact else None


def failure(parity: Parity, limit: float | None) -> str:
    """Returns why the parity check fails, or "" if it passes.

    `limit` bounds |D| in nats; None: no bound.
    """
    largest = parity.gaps["all"].logp_diff_max
    if parity.dropped:
        return f"the engine reported no finite log-prob for {parity.dropped} tokens"
    if limit is not None and not largest <= limit:  # NaN fails
        return f"the largest |log-prob difference| of {largest:.3g} exceeds the limit of {limit:g}"
    return ""


def verdict(parity: Parity, tolerance: float | Calibrated) -> str:
    """Returns sentences about the floor, and whether `tolerance` can be met."""
    floor, error, suggested, batches = map(float, parity.calibration)
    measured = (
        f"Mean delta at fixed weights, the floor, is {floor:.3g} ± {error:.1g} (standard error "
        f"over {batches:.0f} batches); the suggested tolerance is {suggested:.3g}."
    )
    if isinstance(tolerance, Calibrated):
        return f"{measured} The experiment measures its tolerance at its start."
    if tolerance < floor:
        return (
            f"{measured} The experiment's tolerance of {tolerance:g} lies under the floor: no "
            "multiplier can meet it."
        )
    return f"{measured} The experiment's tolerance of {tolerance:g} lies above the floor."


def table(parity: Parity) -> str:
    """Returns the gaps as text, a line for each bucket."""
    header = (
        "context",
        "tokens",
        "mean |dlogp|",
        "max |dlogp|",
        "max |dp|",
        "k3",
        "clipped",
        "mean delta",
    )
    rows = [
        (
            name,
            f"{gap.tokens:,}",
            f"{gap.logp_diff_mean:.2e}",
            f"{gap.logp_diff_max:.2e}",
            f"{gap.prob_diff_max:.2e}",
            f"{gap.k3:.2e}",
            f"{gap.clipped:.3%}",
            f"{gap.delta:.2e}",
        )
        for name, gap in parity.gaps.items()
    ]
    return tables.aligned_text([header, *rows])


def write(
    parity: Parity, config: Config, limit: float | None, workdir: pathlib.Path
) -> pathlib.Path:
    """Writes `parity.json` into `workdir` and returns its path.

    Numbers that are not finite are null, and so is the precision of a sampler that is not the
    library's own.
    """
    floor, error, suggested, batches = map(float, parity.calibration)
    tolerance = config.constraint.tolerance
    if isinstance(tolerance, Calibrated):
        tolerance = None
    precision = dataclasses.asdict(config.rollout.precision) if config.rollout.own_engine else None
    record = {
        "weights": parity.origin,
        "precision": precision,
        "sampling": sampling(config.rollout)._asdict(),
        "batches": batches,
        "context": {name: gap._asdict() for name, gap in parity.gaps.items()},
        "dropped": parity.dropped,
        "floor": floor,
        "floor_std_error": error,
        "suggested_tolerance": suggested,
        "tolerance": tolerance,
        "tolerance_under_floor": tolerance is not None and tolerance < floor,
        "max_error": limit,
        "passed": not failure(parity, limit),
    }
    return files.write_json(workdir / "parity.json", record)
