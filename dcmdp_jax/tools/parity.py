"""The parity gate: what the engine reports for the tokens it samples, against what the trainer
computes for them.
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

from dcmdp_jax import checkpoint, constraint, files, packing, seeds, sharding, step, sync
from dcmdp_jax.batches import make_engine, sampling
from dcmdp_jax.config import Calibrated, Config, ModelConfig, Precision
from dcmdp_jax.inputs import Inputs
from dcmdp_jax.losses import diagnostics
from dcmdp_jax.losses.tails import POSITION_EDGES
from dcmdp_jax.models.kernels import scoring
from dcmdp_jax.records import Rollout, Scored, Weights
from dcmdp_jax.report import tables
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.seeds import Stream
from dcmdp_jax.starting import starting_weights, unwarmed_weights

CLIP = 0.2
EXACT = 1e-5  # nats between trainer and an engine that rounds nothing

# (params, rollout, seed of the packing, split=1) -> log-probs [N, T]
Score = Callable[..., np.ndarray]


class TrainerWeights(NamedTuple):
    """The trainer's weights that an engine is given."""

    params: Any
    version: int  # constrained steps behind them
    origin: str  # where they come from, for people


class GapStatistics(NamedTuple):
    """Trainer against engine on a set of tokens. D = trainer's log-prob - engine's; delta = |gap in
    probability|.
    """

    tokens: int
    logp_diff_mean: float  # mean |D|, nats
    logp_diff_max: float  # largest |D|
    prob_diff_max: float  # largest delta
    # mean(e^D - 1 - D), nats: estimates KL(engine || trainer) on the engine's own samples
    k3: float
    # share of tokens with e^D outside [0.8, 1.2], which a clip of 0.2 cuts before anything is
    # learnt
    clipped: float
    delta: float  # mean delta


class Parity(NamedTuple):
    """Gaps by position, and the tolerance that they call for."""

    origin: str
    gaps: dict[str, GapStatistics]  # by bucket that has tokens; "all" last
    dropped: int  # tokens whose engine log-prob is not finite; they are in no gap
    calibration: constraint.Calibration


def load(config: Config, inputs: Inputs, workdir: pathlib.Path) -> TrainerWeights:
    """What the next batch is sampled from: the newest whole checkpoint in `workdir`, else the
    model's folder, else noise.

    The prompts go on from where that checkpoint left them.
    """
    if checkpoint.steps(workdir):
        state, position = checkpoint.read(
            workdir, step.abstract_state(config, inputs.model_config, inputs.mesh)
        )
        inputs.prompts.set_state(position)
        params, version = step.sampled_from(state, config)
        return TrainerWeights(
            params,
            int(version),
            f"checkpoint {int(state.step)} of {workdir}"
            + (f", weights of step {int(version)}" if state.stale else ""),
        )
    origin = config.model.folder or (
        "random weights: a flat policy shows little of a gap; train, or give --model.folder DIR"
    )
    return TrainerWeights(unwarmed_weights(config, inputs), 0, origin)


def starting(config: Config, inputs: Inputs) -> TrainerWeights:
    """What a run's first batch is sampled from, warmed up as the run warms up; nothing is left on
    disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        params = starting_weights(config, inputs, pathlib.Path(folder), lambda: False)
    origin = config.model.folder or "random weights"
    return TrainerWeights(
        params,
        0,
        f"{origin}, after {config.warmup.steps} steps of warm-up"
        if config.warmup.steps
        else origin,
    )


def sample(engine: Engine, policy: Weights, config: Config, inputs: Inputs, seed: int) -> Rollout:
    """Returns the completions of the next prompts, drawn with `seed`."""
    return rollout(
        engine,
        policy,
        next(inputs.prompts),
        samples=config.rollout.samples,
        key=jax.random.key(seed),
        max_tokens=config.rollout.max_tokens,
        sampling=sampling(config.rollout),
        stop_strings=config.rollout.stop_strings,
        decode=inputs.tokenizer.decode,
    )


def scorer(config: Config, inputs: Inputs) -> Score:
    """The trainer's scoring: packed as a step packs, on the training mesh, at the rollout's
    temperature.

    With `split` the passes hold that many times fewer completions, where their number allows.
    """
    rows = sharding.batch_sharding(inputs.mesh, 0)
    whole = sharding.replicated(inputs.mesh)
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    packed = jax.jit(
        partial(_packed, model=inputs.model_config, temperature=config.rollout.temperature),
        in_shardings=(None, rows, rows, rows, whole, rows),
        out_shardings=whole,
    )

    def score(params: Any, sampled: Rollout, seed: Any, split: int = 1) -> np.ndarray:
        count = len(sampled.tokens)
        minibatches = config.algorithm.minibatches
        microbatches = config.algorithm.microbatches * split
        microbatches = (
            microbatches
            if count % (minibatches * microbatches) == 0
            else config.algorithm.microbatches
        )
        # rewards tell which completion went where
        numbered = Scored(sampled, np.arange(count, dtype=np.float32))
        batch = packing.pack(
            numbered,
            minibatches=minibatches,
            microbatches=microbatches,
            row_length=config.algorithm.row_length or longest,
            pad_id=inputs.tokenizer.pad_id,
            row_divisor=sharding.num_batch_shards(inputs.mesh),
            seed=seed,
        )
        micros = (
            jax.tree.map(lambda x: x[i, j], batch) for i, j in np.ndindex(batch.mask.shape[:2])
        )
        logp = np.concatenate(
            [
                packed(
                    params,
                    micro.tokens,
                    micro.positions,
                    micro.segment_ids,
                    micro.index,
                    micro.experts,
                )
                for micro in micros
            ]
        )
        out = np.zeros_like(sampled.rollout_logp)
        out[batch.reward.reshape(-1).astype(np.int32)] = np.where(
            batch.mask.reshape(logp.shape), logp, 0
        )
        return out

    return score


def _packed(
    params,
    tokens,
    positions,
    segment_ids,
    index,
    experts,
    *,
    model: ModelConfig,
    temperature: float,
) -> jax.Array:
    return scoring.packed_logp(
        params, tokens, positions, segment_ids, index, model, temperature, experts=experts
    )[0]


def measure(
    config: Config,
    inputs: Inputs,
    policy: TrainerWeights,
    batches: int,
    *,
    stream: Stream = Stream.PARITY,
    slack: float = 0.2,
) -> Parity:
    """Samples `batches` rollout batches at fixed weights and scores their tokens with the trainer.

    `policy` must fit `inputs.model_config`; `batches` >= 2, for the spread between batches is the floor's
    standard error. Batch i is drawn with seed i of `stream`.
    """
    engine = make_engine(config, inputs)
    score = scorer(config, inputs)
    served = sync.converter(inputs.model_config, config.rollout.precision, inputs.decode_mesh)(
        policy.params, policy.version
    )
    old = []
    reported = []
    mask = []
    position = []
    for number in range(batches):
        seed = seeds.seed(config.seed, stream, number)
        sampled = sample(engine, served, config, inputs, seed)
        old.append(score(policy.params, sampled, seed))
        reported.append(packing.full_vocab_logp(sampled))
        mask.append(token_mask(sampled))
        asked = np.repeat(sampled.prompts.lengths, config.rollout.samples)
        position.append(asked[:, None] + 1 + np.arange(sampled.tokens.shape[1]))
    sums, counts = zip(*(map(float, constraint.measure(*one)) for one in zip(old, reported, mask)))
    old, reported, mask, position = map(np.concatenate, (old, reported, mask, position))
    return Parity(
        policy.origin,
        by_position(old, reported, mask, position),
        int(np.sum(mask & ~np.isfinite(reported))),
        constraint.calibrate_tolerance(np.array(sums), np.array(counts), slack=slack),
    )


def token_mask(sampled: Rollout) -> np.ndarray:
    """[N, T] bool, the tokens that were sampled."""
    return np.arange(sampled.tokens.shape[1]) < sampled.lengths[:, None]


def by_position(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray, position: np.ndarray
) -> dict[str, GapStatistics]:
    """Gaps of the tokens of each bucket that has any, and of all; `position` counts from 1. Arrays
    [N, T].
    """
    edges = (0, *POSITION_EDGES, np.inf)
    names = [f"<= {edge}" for edge in POSITION_EDGES] + [f"> {POSITION_EDGES[-1]}"]
    inside = {
        name: mask & (position > low) & (position <= high)
        for name, low, high in zip(names, edges, edges[1:])
    }
    return {
        name: gap_statistics(old_logp, rollout_logp, part)
        for name, part in (inside | {"all": mask}).items()
        if part.any() or name == "all"
    }


def gap_statistics(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray
) -> GapStatistics:
    """The figures of the tokens in `mask`, [N, T] each."""
    values = {name: float(value) for name, value in _figures(old_logp, rollout_logp, mask).items()}
    named = (
        "logp_diff_mean",
        "logp_diff_max",
        "prob_diff_max",
        "k3",
        "ratio_out",
        "prob_diff_mean",
    )
    return GapStatistics(int(np.sum(mask)), *(values[name] for name in named))


@jax.jit
def _figures(old_logp, rollout_logp, mask) -> dict[str, jax.Array]:
    return diagnostics.prob_diff(old_logp, rollout_logp, mask) | diagnostics.log_ratio(
        old_logp, rollout_logp, mask, low=1 - CLIP, high=1 + CLIP
    )


def default_limit(config: Config, inputs: Inputs) -> float | None:
    """The bound on |D| where nothing but round-off in float32 tells the engine from the trainer;
    None elsewhere.
    """
    return (
        EXACT
        if config.rollout.precision == Precision() and not inputs.model_config.compute.bfloat16
        else None
    )


def failure(found: Parity, limit: float | None) -> str:
    """The sentence that the gate refuses with; empty where it passes. `limit` bounds |D| in nats,
    None: no bound.
    """
    worst = found.gaps["all"].logp_diff_max
    if found.dropped:
        return f"the engine reported no finite log-prob for {found.dropped} tokens"
    if limit is not None and not worst <= limit:  # so that NaN fails
        return f"the largest |log-prob difference| of {worst:.3g} exceeds the limit of {limit:g}"
    return ""


def verdict(found: Parity, tolerance: float | Calibrated) -> str:
    """The floor in a sentence, and whether `tolerance` can be met."""
    floor, error, wanted, batches = map(float, found.calibration)
    said = (
        f"Mean delta at fixed weights, the floor, is {floor:.3g} ± {error:.1g} (standard error over {batches:.0f} "
        f"batches); the suggested tolerance is {wanted:.3g}. "
    )
    if isinstance(tolerance, Calibrated):
        return said + "The experiment measures its tolerance at its start."
    if tolerance < floor:
        return (
            said
            + f"The experiment's tolerance of {tolerance:g} lies under the floor: no multiplier can meet it."
        )
    return said + f"The experiment's tolerance of {tolerance:g} lies above the floor."


def table(found: Parity) -> str:
    """The gaps as text, a line a bucket."""
    head = (
        "position",
        "tokens",
        "mean |dlogp|",
        "max |dlogp|",
        "max |dp|",
        "k3",
        "clipped",
        "mean delta",
    )
    lines = [
        (
            name,
            f"{gap.tokens:,}",
            *(f"{x:.2e}" for x in gap[1:5]),
            f"{gap.clipped:.3%}",
            f"{gap.delta:.2e}",
        )
        for name, gap in found.gaps.items()
    ]
    return tables.aligned_text([head, *lines])


def write(
    found: Parity, config: Config, limit: float | None, workdir: pathlib.Path
) -> pathlib.Path:
    """Writes `parity.json` into `workdir` and returns its path; numbers that are not finite are
    null.
    """
    floor, error, wanted, batches = map(float, found.calibration)
    own = config.constraint.tolerance
    own = None if isinstance(own, Calibrated) else own
    record = {
        "weights": found.origin,
        "precision": dataclasses.asdict(config.rollout.precision),
        "sampling": sampling(config.rollout)._asdict(),
        "batches": batches,
        "positions": {name: g._asdict() for name, g in found.gaps.items()},
        "dropped": found.dropped,
        "floor": floor,
        "floor_std_error": error,
        "suggested_tolerance": wanted,
        "tolerance": own,
        "tolerance_under_floor": own is not None and own < floor,
        "max_error": limit,
        "passed": not failure(found, limit),
    }
    return files.write_json(workdir / "parity.json", record)
