"""Attributes the gap between engine and trainer to the properties of the engine, by ablation.

The configured engine samples one rollout. Then every engine that differs from the trainer in one
property alone, and every one that lacks one property of the configured engine, decodes the same
tokens again (`rollout.replay`), so that all figures are paired.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dcmdp_jax import constraint, seeds, sharding, sync, train_state
from dcmdp_jax.config import Config, Precision, RolloutConfig
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import Quantized
from dcmdp_jax.records import Rollout, Weights
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tools import parity

PROPERTIES = {  # name: the fields of `Precision` that set it
    "weights": ("weights", "group"),
    "activations": ("activations",),
    "KV cache": ("cache",),
    "embedding": ("embed",),
    "head": ("head",),
    "norms": ("norms",),
    "router": ("router",),
    "experts per token": ("experts_per_token",),
}
ROUTING = ("router", "experts per token")  # properties of mixtures of experts alone
EXACT = Precision()
PROBES = Precision(
    weights="int8",
    activations="int8",
    cache="int8",
    embed="int8",
    head="int8",
    norms="bfloat16",
    router="bfloat16",
)


class Difference(NamedTuple):
    """Two sets of log-probs of the same tokens; the figures of `parity.GapStatistics`."""

    delta: float
    std_error: float  # of delta, over prompts
    logp_diff_mean: float
    logp_diff_max: float
    k3: float
    clipped: float


class Source(NamedTuple):
    """One source of the gap."""

    name: str
    setting: str
    alone: Difference  # trainer against an engine that is exact but for this source
    # Trainer against the configured engine with this source made exact; None if it has it exact.
    left_out: Difference | None = None


class Attribution(NamedTuple):
    """Where the gap comes from, on the tokens of one rollout."""

    origin: str  # of the weights
    tokens: int
    total: Difference  # trainer against the engine as configured
    sources: tuple[Source, ...]  # largest first
    noise: tuple[Source, ...]  # comparisons whose difference is round-off alone
    layer_setting: str
    layers: tuple[Difference, ...]  # trainer against an engine with one layer's weights rounded
    replay_error: float  # largest |log-prob that was reported - that of the replay|, nats


class _Sampled(NamedTuple):
    """The rollout that all engines replay, and the trainer's scoring of it."""

    config: Config
    inputs: Inputs
    weights: parity.TrainerWeights
    rollout: Rollout
    score: parity.Score
    trainer_logp: np.ndarray  # [N, T]


def diagnose(
    config: Config,
    inputs: Inputs,
    weights: parity.TrainerWeights,
    other: parity.TrainerWeights | None = None,
    *,
    probe: bool = False,
) -> Attribution:
    """Attributes the gap between the trainer and the engine that `config` describes.

    Args:
        weights: must fit `inputs.model_config`.
        other: the weights of another step, for staleness; None leaves it out.
        probe: also measures properties that the configured engine has exact, set as in `PROBES`.

    Raises ValueError if `check` does, or if a log-prob is not finite.
    """
    check(config)
    sampled = _sample(config, inputs, weights)
    precision = config.rollout.precision
    has_rounded_weights = precision.weights != EXACT.weights
    rounded = precision if has_rounded_weights else PROBES
    exact, noise, layers = _exact_engine(
        sampled, rounded if has_rounded_weights or probe else EXACT
    )

    @functools.cache
    def replayed(other_precision: Precision) -> np.ndarray:
        return exact if other_precision == EXACT else _replay(sampled, other_precision)

    log_mass = _log_support_mass(sampled.rollout)
    sources = list(_sources(sampled, replayed, log_mass, probe))
    if other:
        sources.append(_staleness(sampled, other))
    sources.sort(key=lambda source: -source.alone.delta)
    configured = replayed(precision) - log_mass
    return Attribution(
        origin=weights.origin,
        tokens=int(sampled.rollout.lengths.sum()),
        total=_against_trainer(sampled, configured),
        sources=tuple(sources),
        noise=noise,
        layer_setting=_setting(rounded, "weights"),
        layers=layers,
        replay_error=float(np.max(np.abs(configured - sampled.rollout.rollout_logp))),
    )


def check(config: Config) -> None:
    """Raises ValueError if the configuration does not allow an attribution.

    It needs the library's own sampler, a router of the trainer's own, and two prompts for a
    standard error.
    """
    rollout = config.rollout
    if not rollout.own_engine:
        field = "rollout.server" if rollout.server else "rollout.sampler"
        name = rollout.server or getattr(rollout.sampler, "__name__", repr(rollout.sampler))
        raise ValueError(
            "diagnose switches the properties of the library's own engine (rollout.precision.*), "
            f"and {field}={name} is another one; measure its gap with dcmdp parity, or leave "
            f"{field} out"
        )
    if config.algorithm.replay_routing:
        raise ValueError(
            "algorithm.replay_routing gives the trainer the engine's experts, which hides what a "
            "router does; diagnose with --algorithm.replay_routing no"
        )
    if config.algorithm.quantize_aware:
        raise ValueError(
            "algorithm.quantize_aware gives the trainer the engine's weights, which hides what "
            "their formats do; diagnose with --algorithm.quantize_aware no"
        )
    if config.data.prompts_per_step < 2:
        raise ValueError("data.prompts_per_step=1 gives no standard error; set 2 or more")


def other_version(
    config: Config, inputs: Inputs, workdir: pathlib.Path, weights: parity.TrainerWeights
) -> parity.TrainerWeights | None:
    """Returns the weights of `workdir` that `parity.load`'s `weights` are compared with, or None.

    These are the newest ones if a run samples from stale ones, else those of the checkpoint before.
    """
    before = math.inf if config.rollout.staleness else weights.version
    if not any(number < before for number in checkpoint.steps(workdir)):
        return None
    like = train_state.abstract(config, inputs.model_config, inputs.mesh)
    state, _ = checkpoint.read(workdir, like, before)
    number = int(state.step)
    return parity.TrainerWeights(
        train_state.policy_params(state, config), number, f"checkpoint {number} of {workdir}"
    )


def properties(
    configured: Precision, model: ModelConfig, probe: bool
) -> Iterator[tuple[str, str, Precision, Precision | None]]:
    """Yields of each property its name, its setting, and the precision that has it alone.

    And the configured precision without it, or None for a probe.
    """
    probes = dataclasses.replace(PROBES, experts_per_token=max(model.experts_per_token - 1, 0))
    for name, fields in PROPERTIES.items():
        if name in ROUTING and not model.num_experts:
            continue
        alone = _with_fields(EXACT, fields, configured)
        probed = _with_fields(EXACT, fields, probes)
        if alone != EXACT:
            yield name, _setting(configured, name), alone, _with_fields(configured, fields, EXACT)
        elif probe and probed != EXACT:
            yield name, f"{_setting(probed, name)}, a probe", probed, None


def difference(trainer_logp: np.ndarray, engine_logp: np.ndarray, rollout: Rollout) -> Difference:
    """Returns the figures of two sets of log-probs [N, T] on the sampled tokens."""
    mask = parity.token_mask(rollout)
    delta = np.asarray(constraint.delta(trainer_logp, engine_logp, mask))
    prompts = len(rollout.prompts.lengths)
    sums = delta.reshape(prompts, -1).sum(axis=1)
    counts = mask.reshape(prompts, -1).sum(axis=1)
    gap = parity.gap_statistics(trainer_logp, engine_logp, mask)
    return Difference(
        delta=gap.delta,
        std_error=float(constraint.calibrate_tolerance(sums, counts).std_error),
        logp_diff_mean=gap.logp_diff_mean,
        logp_diff_max=gap.logp_diff_max,
        k3=gap.k3,
        clipped=gap.clipped,
    )


def noise_floor(attribution: Attribution) -> float:
    """Returns the largest mean delta of comparisons that differ by round-off alone."""
    return max(source.alone.delta for source in attribution.noise)


def _sample(config: Config, inputs: Inputs, weights: parity.TrainerWeights) -> _Sampled:
    """Samples the rollout and scores it with the trainer."""
    sampler = jetstream.sampler(config, inputs.model_config, inputs.tokenizer, inputs.decode_mesh)
    sampler.update_weights(weights.params, weights.version)
    if weights.prompt_state is not None:
        inputs.prompts.set_state(weights.prompt_state)
    seed = seeds.seed(config.seed, Stream.PARITY, weights.version)
    rollout = parity.sample(sampler, config, inputs, seed)
    score = parity.scorer(config, inputs)
    trainer_logp = score(weights.params, rollout, seed)
    if not np.isfinite(trainer_logp).all():
        raise ValueError(
            "the trainer gives log-probs that are not finite; its weights are damaged or overflow"
        )
    return _Sampled(config, inputs, weights, rollout, score, trainer_logp)


def _log_support_mass(rollout: Rollout) -> np.ndarray:
    """Returns [N, T] the log of the probability that top-k, top-p and min-p leave; 0 past the
    length.
    """
    if rollout.support_mass is None:
        return np.zeros_like(rollout.rollout_logp)
    return np.log(np.where(parity.token_mask(rollout), rollout.support_mass, 1))


def _sources(
    sampled: _Sampled,
    replayed: Callable[[Precision], np.ndarray],
    log_mass: np.ndarray,
    probe: bool,
) -> Iterator[Source]:
    """Yields the properties of the precision, and the support.

    The support's part of a log-prob is -log of its mass, whatever else differs.
    """
    precision = sampled.config.rollout.precision
    model = sampled.inputs.model_config
    for name, setting, alone, without in properties(precision, model, probe):
        left = _against_trainer(sampled, replayed(without) - log_mass) if without else None
        yield Source(name, setting, _against_trainer(sampled, replayed(alone)), left)
    if log_mass.any():
        yield Source(
            "support",
            _support(sampled.config.rollout),
            _against_trainer(sampled, replayed(EXACT) - log_mass),
            _against_trainer(sampled, replayed(precision)),
        )


def _staleness(sampled: _Sampled, other: parity.TrainerWeights) -> Source:
    """Compares the trainer with the newer weights and an exact engine with the older ones."""
    older, newer = sorted((sampled.weights, other), key=lambda weights: weights.version)
    trainer_logp = sampled.score(newer.params, sampled.rollout, sampled.config.seed)
    engine_logp = _replay(sampled._replace(weights=older), EXACT)
    return Source(
        "staleness",
        f"weights of step {older.version} against step {newer.version}",
        difference(trainer_logp, engine_logp, sampled.rollout),
    )


def _exact_engine(
    sampled: _Sampled, rounded: Precision
) -> tuple[np.ndarray, tuple[Source, ...], tuple[Difference, ...]]:
    """Returns the exact engine's log-probs, the noise, and the gaps of single rounded layers.

    Layers are rounded as `rounded` has the weights, and left out if it is exact.
    """
    sampler = _sampler(sampled, EXACT)
    exact = _checked(replay(sampler.engine, sampler.weights, sampled.rollout), EXACT)
    layers = []
    if rounded != EXACT:
        for weights in _with_one_layer_rounded(sampled, sampler.weights, rounded):
            engine_logp = replay(sampler.engine, weights, sampled.rollout)
            layers.append(_against_trainer(sampled, engine_logp))
    return exact, _noise(sampled, sampler.weights, exact), tuple(layers)


def _noise(sampled: _Sampled, weights: Weights, exact: np.ndarray) -> tuple[Source, ...]:
    """Returns comparisons that would be zero if the order of sums did not matter."""
    config = sampled.config
    rollout = sampled.rollout
    repacked = sampled.score(sampled.weights.params, rollout, config.seed + 1, split=2)
    shards = sharding.num_batch_shards(sampled.inputs.decode_mesh)
    slots = max(config.rollout.slots // (2 * shards), 1) * shards
    fewer = _empty_sampler(sampled._replace(config=_with_rollout(config, slots=slots)), EXACT)
    order = np.random.default_rng(config.seed).permutation(len(exact))
    shuffled = replay(fewer.engine, weights, rollout, order)
    return (
        Source("trainer", "against itself, packed otherwise", _against_trainer(sampled, repacked)),
        Source(
            "batch composition",
            f"exact engine, {slots} slots against {config.rollout.slots}",
            difference(exact, shuffled, rollout),
        ),
        Source("exact engine", "against the trainer", _against_trainer(sampled, exact)),
    )


def _with_one_layer_rounded(
    sampled: _Sampled, exact: Weights, rounded: Precision
) -> Iterator[Weights]:
    """Yields the exact weights with layer 0, 1, ... rounded, and dequantized again so that all run
    the same program.
    """
    precision = _with_fields(EXACT, PROPERTIES["weights"], rounded)
    convert = sync.converter(sampled.inputs.model_config, precision, sampled.inputs.decode_mesh)
    coarse = convert(sampled.weights.params, sampled.weights.version).params["stacks"]

    def dequantize(weight: Any, like: jax.Array) -> jax.Array:
        weight = weight.dequantize() if isinstance(weight, Quantized) else weight
        return weight.astype(like.dtype)

    layers = exact.params["stacks"]
    for i, layer in enumerate(layers):
        replaced = jax.tree.map(
            dequantize, coarse[i], layer, is_leaf=lambda x: isinstance(x, Quantized)
        )
        stacks = [*layers[:i], replaced, *layers[i + 1 :]]
        yield exact._replace(params=exact.params | {"stacks": stacks})


def _replay(sampled: _Sampled, precision: Precision) -> np.ndarray:
    """Returns log-probs [N, T] of the sampled tokens by an engine with `precision`, over the whole
    vocabulary.
    """
    print(f"decoding the tokens again with {_describe(precision)}", file=sys.stderr, flush=True)
    sampler = _sampler(sampled, precision)
    return _checked(replay(sampler.engine, sampler.weights, sampled.rollout), precision)


def _checked(logp: np.ndarray, precision: Precision) -> np.ndarray:
    """Returns `logp`. Raises ValueError if it is not finite."""
    if not np.isfinite(logp).all():
        raise ValueError(
            f"{_describe(precision)} gives log-probs that are not finite; choose another precision"
        )
    return logp


def _empty_sampler(sampled: _Sampled, precision: Precision) -> jetstream.JetStreamSampler:
    """Returns the library's sampler with `precision`, without weights."""
    config = _with_rollout(sampled.config, precision=precision)
    inputs = sampled.inputs
    return jetstream.sampler(config, inputs.model_config, inputs.tokenizer, inputs.decode_mesh)


def _sampler(sampled: _Sampled, precision: Precision) -> jetstream.JetStreamSampler:
    """Returns the library's sampler with `precision` and the sampled weights."""
    sampler = _empty_sampler(sampled, precision)
    sampler.update_weights(sampled.weights.params, sampled.weights.version)
    return sampler


def _against_trainer(sampled: _Sampled, engine_logp: np.ndarray) -> Difference:
    return difference(sampled.trainer_logp, engine_logp, sampled.rollout)


def _with_rollout(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))


def _with_fields(precision: Precision, fields: tuple[str, ...], source: Precision) -> Precision:
    """Returns `precision` with `fields` from `source`."""
    return dataclasses.replace(precision, **{field: getattr(source, field) for field in fields})


def _describe(precision: Precision) -> str:
    """Returns an engine's precision in words."""
    fields = dataclasses.asdict(precision).items()
    rounded = [f"{name} {value}" for name, value in fields if value != getattr(EXACT, name)]
    return f"an engine with {', '.join(rounded)}" if rounded else "an exact engine"


def _setting(precision: Precision, name: str) -> str:
    """Returns the setting of property `name` in words."""
    value = str(getattr(precision, PROPERTIES[name][0]))
    if name != "weights" or value in ("float32", "bfloat16"):
        return value
    shared_by = {0: "channel", -1: "tensor"}.get(precision.group, f"{precision.group} inputs")
    return f"{value}, a scale per {shared_by}"


def _support(rollout: RolloutConfig) -> str:
    """Returns the settings that cut the support in words."""
    settings = []
    for name, full in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        value = getattr(rollout, name)
        if value != full:
            settings.append(f"{name} {value:g}")
    return ", ".join(settings)
