"""Blame: which property of the engine moves its log-probs away from the trainer's, and by how much.

The configured engine samples one rollout. Every engine that differs from the trainer in one
property alone, and every one that lacks one property of the configured engine, then decodes the
same tokens (`rollout.replay`): all figures are paired.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dcmdp_jax import checkpoint, constraint, files, seeds, sharding, step, sync
from dcmdp_jax.batches import make_engine, sampling
from dcmdp_jax.config import Config, ModelConfig, Precision, RolloutConfig
from dcmdp_jax.inputs import Inputs
from dcmdp_jax.models.quantized import Quantized
from dcmdp_jax.records import Rollout, Weights
from dcmdp_jax.report import bar_chart, html_page, line_chart, tables
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run_record import to_json
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tools import parity

PROPERTIES = {  # name: the fields of `Precision` that make it
    "weights": ("weights", "group"),
    "activations": ("activations",),
    "KV cache": ("cache",),
    "embedding": ("embed",),
    "head": ("head",),
    "norms": ("norms",),
    "router": ("router",),
    "experts per token": ("experts_per_token",),
}
ROUTING = ("router", "experts per token")  # of mixtures of experts alone
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
AGREEMENT = 1e-5  # nats between what the engine reported and its replay


class Difference(NamedTuple):
    """Two sets of log-probs of the same tokens; see `parity.Gap`."""

    delta: float
    std_error: float  # of delta, over prompts
    logp_diff_mean: float
    logp_diff_max: float
    k3: float
    clipped: float


class Effect(NamedTuple):
    """One source of discrepancy."""

    source: str
    setting: str
    alone: Difference  # trainer against an exact engine with this one property
    # trainer against the configured engine without it; None where it is no part of that
    left_out: Difference | None = None


class Attribution(NamedTuple):
    """Where the gap comes from, on the tokens of one rollout."""

    origin: str
    tokens: int
    everything: Difference  # trainer against the engine as configured
    effects: tuple[Effect, ...]  # largest first
    noise: tuple[Effect, ...]  # trainer and exact engine against themselves and each other
    layer_setting: str
    layers: tuple[
        Difference, ...
    ]  # trainer against an exact engine with the weights of one layer rounded
    agreement: float  # largest |what the engine reported - its replay|, nats


class Case(NamedTuple):
    """What engines are judged on."""

    config: Config
    inputs: Inputs
    policy: parity.TrainerWeights
    sampled: Rollout
    score: parity.Score
    trainer: np.ndarray  # [N, T], the trainer's log-probs


def diagnose(
    config: Config,
    inputs: Inputs,
    policy: parity.TrainerWeights,
    other: parity.TrainerWeights | None = None,
    *,
    probe: bool = False,
) -> Attribution:
    """Attributes the gap between the trainer and the engine that `config` describes.

    Args:
      policy: the weights; they must fit `inputs.model_config`.
      other: the weights of another step, for staleness; None leaves it out.
      probe: judge properties that the configured engine has exact as well, each set as in `PROBES`.

    Raises ValueError where a batch has one prompt (standard errors are over prompts) or a log-prob
    is not finite.
    """
    check(config)
    case = _case(config, inputs, policy)
    precision = config.rollout.precision
    rounded = PROBES if precision.weights == EXACT.weights else precision
    exact, noise, layers = _exact(case, rounded if rounded is precision or probe else EXACT)
    support = np.log(np.where(parity.token_mask(case.sampled), case.sampled.support_mass, 1))
    replayed = functools.cache(lambda one: exact if one == EXACT else _replay(case, one))
    effects = list(_effects(case, replayed, support, probe))
    if other:
        effects.append(_staleness(case, other))
    whole = replayed(precision) - support
    effects.sort(key=lambda effect: -effect.alone.delta)
    agreement = float(np.max(np.abs(whole - case.sampled.rollout_logp)))
    return Attribution(
        policy.origin,
        int(case.sampled.lengths.sum()),
        _against(case, whole),
        tuple(effects),
        noise,
        _setting(rounded, "weights"),
        layers,
        agreement,
    )


def check(config: Config) -> None:
    """Raises ValueError where standard errors over prompts cannot be, or a wrong router would be
    hidden.
    """
    if config.algorithm.replay_routing:
        raise ValueError(
            "algorithm.replay_routing gives the trainer the engine's experts, which hides what a router does; "
            "diagnose with --algorithm.replay_routing no"
        )
    if config.data.prompts_per_step < 2:
        raise ValueError("data.prompts_per_step=1 gives no standard error; set 2 or more")


def _case(config: Config, inputs: Inputs, policy: parity.TrainerWeights) -> Case:
    served = sync.converter(inputs.model_config, config.rollout.precision, inputs.decode_mesh)(
        policy.params, policy.version
    )
    seed = seeds.seed(config.seed, Stream.PARITY, policy.version)
    sampled = parity.sample(make_engine(config, inputs), served, config, inputs, seed)
    score = parity.scorer(config, inputs)
    trainer = score(policy.params, sampled, (config.seed, 0))
    if not np.isfinite(trainer).all():
        raise ValueError(
            "the trainer gives log-probs that are not finite; its weights are damaged or overflow"
        )
    return Case(config, inputs, policy, sampled, score, trainer)


def _effects(
    case: Case, replayed: Callable[[Precision], np.ndarray], support: np.ndarray, probe: bool
) -> Iterator[Effect]:
    """Precision and support. The support's part of a log-prob is -log(kept), whatever else differs."""
    precision = case.config.rollout.precision
    for name, setting, alone, without in properties(precision, case.inputs.model_config, probe):
        yield Effect(
            name,
            setting,
            _against(case, replayed(alone)),
            _against(case, replayed(without) - support) if without else None,
        )
    if support.any():
        yield Effect(
            "support",
            _support(case.config.rollout),
            _against(case, replayed(EXACT) - support),
            _against(case, replayed(precision)),
        )


def _staleness(case: Case, other: parity.TrainerWeights) -> Effect:
    """The newer weights' trainer against an exact engine that holds the older ones."""
    older, newer = sorted((case.policy, other), key=lambda one: one.version)
    trainer = case.score(newer.params, case.sampled, (case.config.seed, 0))
    return Effect(
        "staleness",
        f"weights of step {older.version} against step {newer.version}",
        measure(trainer, _replay(case._replace(policy=older), EXACT), case.sampled),
    )


def _exact(
    case: Case, rounded: Precision
) -> tuple[np.ndarray, tuple[Effect, ...], tuple[Difference, ...]]:
    """What needs the exact engine: its log-probs, the noise, and single layers rounded as `rounded`
    has them.
    """
    engine = _engine(case, EXACT)
    weights = _weights(case, EXACT)
    exact = _finite(replay(engine, weights, case.sampled), EXACT)
    layers = (
        ()
        if rounded == EXACT
        else tuple(
            _against(case, replay(engine, mixed, case.sampled))
            for mixed in _layers(case, weights, rounded)
        )
    )
    return exact, _noise(case, weights, exact), layers


def _noise(case: Case, weights: Weights, exact: np.ndarray) -> tuple[Effect, ...]:
    """What would be zero were it not for the order of sums."""
    config = case.config
    shards = sharding.num_batch_shards(case.inputs.decode_mesh)
    again = case.score(case.policy.params, case.sampled, (config.seed, 1), split=2)
    slots = max(config.rollout.slots // (2 * shards), 1) * shards
    fewer = _engine(case._replace(config=_with(config, slots=slots)), EXACT)
    order = np.random.default_rng(config.seed).permutation(len(exact))
    return (
        Effect("trainer", "against itself, packed otherwise", _against(case, again)),
        Effect(
            "batch composition",
            f"exact engine, {slots} slots against {config.rollout.slots}",
            measure(exact, replay(fewer, weights, case.sampled, order), case.sampled),
        ),
        Effect("exact engine", "against the trainer", _against(case, exact)),
    )


def _layers(case: Case, exact: Weights, rounded: Precision) -> Iterator[Weights]:
    """The exact weights with layer 0, 1, ... rounded and multiplied out again, so that all run the
    same program.
    """
    coarse = _weights(case, _take(rounded, PROPERTIES["weights"], EXACT)).params["stacks"]

    def multiplied_out(held: Any, like: jax.Array) -> jax.Array:
        return (held.dequantize() if isinstance(held, Quantized) else held).astype(like.dtype)

    layers = exact.params["stacks"]
    for i, layer in enumerate(layers):
        held = jax.tree.map(
            multiplied_out, coarse[i], layer, is_leaf=lambda x: isinstance(x, Quantized)
        )
        yield exact._replace(
            params=exact.params | {"stacks": [*layers[:i], held, *layers[i + 1 :]]}
        )


def _replay(case: Case, precision: Precision) -> np.ndarray:
    """Log-probs [N, T] of the sampled tokens by the engine with `precision`, over the whole
    vocabulary.
    """
    print(f"decoding the tokens again with {_named(precision)}", file=sys.stderr, flush=True)
    return _finite(
        replay(_engine(case, precision), _weights(case, precision), case.sampled), precision
    )


def _finite(logp: np.ndarray, precision: Precision) -> np.ndarray:
    if not np.isfinite(logp).all():
        raise ValueError(
            f"{_named(precision)} gives log-probs that are not finite; choose another precision"
        )
    return logp


def _named(precision: Precision) -> str:
    fields = dataclasses.asdict(precision).items()
    own = [f"{name} {value}" for name, value in fields if value != getattr(EXACT, name)]
    return f"an engine with {', '.join(own)}" if own else "an exact engine"


def _engine(case: Case, precision: Precision) -> Any:
    return make_engine(_with(case.config, precision=precision), case.inputs)


def _weights(case: Case, precision: Precision) -> Weights:
    return sync.converter(case.inputs.model_config, precision, case.inputs.decode_mesh)(
        case.policy.params, case.policy.version
    )


def _with(config: Config, **rollout: Any) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **rollout))


def properties(
    configured: Precision, model: ModelConfig, probe: bool
) -> Iterator[tuple[str, str, Precision, Precision | None]]:
    """Of each property: name, setting, the engine that has it alone, the configured one without it
    (if it has it).
    """
    probes = dataclasses.replace(PROBES, experts_per_token=max(model.experts_per_token - 1, 0))
    for name, fields in PROPERTIES.items():
        if name in ROUTING and not model.num_experts:
            continue
        alone = _take(configured, fields, EXACT)
        tried = _take(probes, fields, EXACT)
        if alone != EXACT:
            yield name, _setting(configured, name), alone, _take(EXACT, fields, configured)
        elif probe and tried != EXACT:
            yield name, f"{_setting(tried, name)}, a probe", tried, None


def _take(source: Precision, fields: tuple[str, ...], rest: Precision) -> Precision:
    """`rest` with `fields` of `source`."""
    return dataclasses.replace(rest, **{field: getattr(source, field) for field in fields})


def _setting(precision: Precision, name: str) -> str:
    value = str(getattr(precision, PROPERTIES[name][0]))
    if name != "weights" or value in ("float32", "bfloat16"):
        return value
    shared = {0: "channel", -1: "tensor"}.get(precision.group, f"{precision.group} inputs")
    return f"{value}, a scale per {shared}"


def _support(rollout: RolloutConfig) -> str:
    fields = (
        (name, getattr(rollout, name), full)
        for name, full in (("top_k", 0), ("top_p", 1), ("min_p", 0))
    )
    return ", ".join(f"{name} {value:g}" for name, value, full in fields if value != full)


def _against(case: Case, engine: np.ndarray) -> Difference:
    return measure(case.trainer, engine, case.sampled)


def measure(trainer: np.ndarray, engine: np.ndarray, sampled: Rollout) -> Difference:
    """The figures of two sets of log-probs [N, T] on the sampled tokens."""
    mask = parity.token_mask(sampled)
    delta = np.asarray(constraint.delta(trainer, engine, mask))
    sums, counts = (x.reshape(len(sampled.prompts.lengths), -1).sum(axis=1) for x in (delta, mask))
    spread = constraint.calibrate_tolerance(sums, counts)
    figures = parity.gap_statistics(trainer, engine, mask)
    return Difference(
        figures.delta,
        float(spread.std_error),
        figures.logp_diff_mean,
        figures.logp_diff_max,
        figures.k3,
        figures.clipped,
    )


def other_version(
    config: Config, inputs: Inputs, workdir: pathlib.Path, policy: parity.TrainerWeights
) -> parity.TrainerWeights | None:
    """What `policy`, `parity.load`'s, can be compared with, if there is any.

    The newest weights, where a run samples from stale ones; else those of the checkpoint before.
    """
    before = math.inf if config.rollout.staleness else policy.version
    if not any(number < before for number in checkpoint.steps(workdir)):
        return None
    like = step.abstract_state(config, inputs.model_config, inputs.mesh)
    state, _ = checkpoint.read(workdir, like, before)
    number = int(state.step)
    return parity.TrainerWeights(
        step.policy_params(state, config), number, f"checkpoint {number} of {workdir}"
    )


def floor(found: Attribution) -> float:
    """The largest mean delta of what ought to be equal."""
    return max(effect.alone.delta for effect in found.noise)


def verdict(found: Attribution) -> str:
    """Who is to blame, in sentences."""
    whole = found.everything.delta
    noise = floor(found)
    said = (
        f"Mean delta is {whole:.2g} over {found.tokens:,} tokens; the noise floor is {noise:.1g}."
    )
    if whole <= 2 * noise:
        return f"{said} The engine is exact but for it."
    first = next((effect for effect in found.effects if effect.left_out), None)
    if first is None:
        return f"{said} No property of the engine that can be switched explains it."
    return (
        f"{said} The largest source is {first.source} ({first.setting}): alone it gives {first.alone.delta:.2g} "
        f"({first.alone.delta / whole:.0%}), and with it exact {first.left_out.delta:.2g} is left."
    )


def table(found: Attribution) -> list[tuple[str, ...]]:
    """The figures as rows of text, the first one the head."""

    def line(
        name: str,
        setting: str,
        gap: Difference,
        left_out: Difference | None = None,
        part: bool = False,
    ) -> tuple[str, ...]:
        share = (
            f"{gap.delta / found.everything.delta:.1%}" if part and found.everything.delta else ""
        )
        without = f"{left_out.delta:.1e}" if left_out else ""
        return (
            name,
            setting,
            f"{gap.delta:.1e} ± {gap.std_error:.0e}",
            share,
            without,
            f"{gap.logp_diff_mean:.1e}",
            f"{gap.logp_diff_max:.1e}",
            f"{gap.clipped:.2%}",
        )

    rows = [
        (
            "source",
            "setting",
            "delta alone",
            "share",
            "delta without",
            "mean |dlogp|",
            "max |dlogp|",
            "clipped",
        ),
        line("everything", "as configured", found.everything, part=True),
    ]
    rows += [line(*effect, part=bool(effect.left_out)) for effect in found.effects]
    rows += [
        line(f"weights of layer {i}", found.layer_setting, gap)
        for i, gap in enumerate(found.layers)
    ]
    return rows + [line(*effect) for effect in found.noise]


def notes(found: Attribution) -> list[str]:
    """What is not judged, and how far the replay is to be trusted."""
    judged = {effect.source for effect in found.effects}
    said = [
        f"The replay repeats what the engine reported to within {found.agreement:.1g} nats"
        + ("." if found.agreement <= AGREEMENT else ": smaller differences are not to be trusted.")
    ]
    if "staleness" in judged:
        said.append(
            "Staleness is beside everything: delta is measured at the weights that sampled."
        )
    else:
        said.append("Staleness is left out: there is no older checkpoint.")
    if "support" not in judged:
        said.append(
            "The support is left out: every token can be drawn (top_k 0, top_p 1, min_p 0)."
        )
    else:
        said.append(
            "The support is a part of everything here alone: a run and parity measure "
            "delta before the cut."
        )
    return said


def chart(found: Attribution) -> str:
    """The mean deltas as one SVG: by source, on a logarithmic scale, and by layer."""

    def bar(effect: Effect, color: str) -> bar_chart.Bar:
        gap = effect.alone
        left_out = effect.left_out
        ring = left_out.delta if left_out else None
        return bar_chart.Bar(effect.source, effect.setting, gap.delta, gap.std_error, color, ring)

    rows = [
        bar(Effect("everything", "as configured", found.everything), line_chart.NEUTRAL),
        *(
            bar(effect, line_chart.ENGINE if effect.left_out else line_chart.TRAINER)
            for effect in found.effects
        ),
        *(bar(effect, line_chart.FAINT) for effect in found.noise),
    ]
    drawn = [
        bar_chart.Chart("Mean delta of each source alone (logarithmic)", rows, floor(found), True)
    ]
    if found.layers:
        layers = [
            bar_chart.Bar(f"layer {i}", "", g.delta, g.std_error, line_chart.ENGINE)
            for i, g in enumerate(found.layers)
        ]
        title = f"Mean delta with the weights of one layer alone: {found.layer_setting}"
        drawn.append(bar_chart.Chart(title, layers, floor(found), False))
    return bar_chart.draw(drawn, LEGEND)


def _page_table(found: Attribution) -> str:
    """`table` as HTML, with the setting below its source so that the table is not too wide."""
    header, *rows = table(found)
    return tables.html_table(
        [header[0], *header[2:]],
        [
            [tables.with_note(source, setting, below=True), *cells]
            for source, setting, *cells in rows
        ],
    )


def write(found: Attribution, config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Writes diagnose.json, diagnose.svg (the picture) and diagnose.html into `workdir`; returns
    the page's path.
    """
    record = {
        "weights": found.origin,
        "precision": dataclasses.asdict(config.rollout.precision),
        "sampling": sampling(config.rollout)._asdict(),
        "tokens": found.tokens,
        "noise_floor": floor(found),
        "everything": found.everything._asdict(),
        "sources": [_record(effect) for effect in found.effects],
        "noise": [_record(effect) for effect in found.noise],
        "layers": {"setting": found.layer_setting, "gaps": [gap._asdict() for gap in found.layers]},
        "replay_agreement": found.agreement,
        "notes": notes(found),
    }
    files.write_json(workdir / "diagnose.json", record)
    picture = chart(found)
    files.write_atomic(workdir / "diagnose.svg", picture)
    said = "".join(f"<p>{html.escape(note)}</p>" for note in [METHOD, *notes(found)])
    body = (
        f'<p class="summary">{html.escape(found.origin)}</p><p class="verdict">{html.escape(verdict(found))}</p>'
        f'<figure class="scroll">{picture}</figure>{_page_table(found)}{said}'
    )
    path = workdir / "diagnose.html"
    page = html_page.page(f"{config.name}: blame", body, to_json(config))
    files.write_atomic(path, page)
    return path


LEGEND = (
    "Orange: part of the engine. Blue: probes and staleness, which are not. Whisker: ± a standard error.",
    "Ring: the configured engine without that source. Shaded: the noise floor.",
)
METHOD = (
    "Delta is |π_train − π_infer| of a sampled token. Alone: the trainer against an engine that has this property and "
    "is exact otherwise; without: against the configured engine with this property made exact. All decode the same "
    "tokens, so the figures are paired; effects interact, and their shares need not add up. ± is a standard error over "
    f"prompts. Clipped: tokens whose probability ratio lies outside 1 ± {parity.CLIP} before anything is learnt."
)


def _record(effect: Effect) -> dict[str, Any]:
    return {
        "source": effect.source,
        "setting": effect.setting,
        "alone": effect.alone._asdict(),
        "left_out": effect.left_out._asdict() if effect.left_out else None,
    }
