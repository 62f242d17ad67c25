"""Blame: every engine decodes the same tokens, each source is what its definition says, and the
page shows it.
"""

import functools
import json
import re
import xml.etree.ElementTree as xml

import jax
import numpy as np
import pytest

from dcmdp_jax import sync
from dcmdp_jax.batches import make_engine
from dcmdp_jax.config import Precision
from dcmdp_jax.inputs import read_inputs
from dcmdp_jax.report import bar_chart, line_chart
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run_record import to_json
from dcmdp_jax.tools import diagnose, parity
from support.mismatch import EXPERTS, FLOAT, command, make_run, sampled, sharp, tiny
from support.training import ONE_DEVICE, dcmdp

pytestmark = pytest.mark.full

SMALL = {
    "rollout.samples": 3,
    "rollout.slots": 5,
    "rollout.tokens_per_dispatch": 5,
    "algorithm.minibatches": 1,
    "rollout.max_tokens": 10,
}  # 16 positions: one window to compile
MANY = {
    f"rollout.precision.{name}": value
    for name, value in (
        ("weights", "int8"),
        ("activations", "int8"),
        ("cache", "int8"),
        ("head", "int8"),
        ("embed", "bfloat16"),
        ("norms", "bfloat16"),
        ("router", "bfloat16"),
        ("experts_per_token", 2),
    )
}
THREE = EXPERTS | {"model.architecture.experts_per_token": 3}


SUPPORT = tuple({**FLOAT, "rollout.top_p": 0.7}.items())


@functools.cache
def case(changes=(), probe=False, staleness=False):
    """A run, what it read, the policy and the blame."""
    run = tiny(**SMALL | dict(changes))
    inputs = read_inputs(run, ONE_DEVICE)
    policy = sharp(inputs.model_config)
    other = (
        parity.TrainerWeights(jax.tree.map(lambda w: 1.1 * w, policy.params), 7, "later")
        if staleness
        else None
    )
    return run, inputs, policy, diagnose.diagnose(run, inputs, policy, other, probe=probe)


@functools.cache
def again(changes=()):
    """The rollout that `case` judged, the trainer's scoring and its log-probs."""
    run = tiny(**SMALL | dict(changes))
    inputs = read_inputs(run, ONE_DEVICE)
    policy = sharp(inputs.model_config)
    score = parity.scorer(run, inputs)
    out = sampled(run, inputs, policy)
    return out, score, score(policy.params, out, 0)


def mean_delta(one, two, out):
    mask = parity.token_mask(out)
    return abs(np.exp(one.astype(float)) - np.exp(two.astype(float)))[mask].mean()


@pytest.mark.parametrize(
    "changes", [FLOAT, {"rollout.top_p": 0.95}, MANY | THREE], ids=["float32", "int4", "moe"]
)
def test_a_replay_is_what_the_engine_reported(changes):
    """1e-5 nats, with slots that are reused, lengths that differ, and in another order with other
    neighbours.
    """
    run = tiny(**SMALL | changes)
    inputs = read_inputs(run, ONE_DEVICE)
    policy = sharp(inputs.model_config)
    out = sampled(run, inputs, policy)
    served = sync.converter(inputs.model_config, run.rollout.precision, inputs.decode_mesh)(
        policy.params, 0
    )
    engine = make_engine(run, inputs)
    reported = out.rollout_logp + np.log(np.where(parity.token_mask(out), out.support_mass, 1))
    assert run.rollout.precision.experts_per_token or len(set(out.lengths)) > 2
    assert (run.rollout.top_p == 1) == (out.support_mass[parity.token_mask(out)].min() == 1)
    np.testing.assert_allclose(replay(engine, served, out), reported, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        replay(engine, served, out, np.arange(12)[::-1]), reported, atol=1e-5, rtol=0
    )


def test_weights_alone_are_the_whole_where_nothing_else_is_rounded():
    _, _, _, found = case()
    (weights,) = found.effects
    out, _, trainer = again()
    assert (weights.source, weights.setting) == ("weights", "int4, a scale per channel")
    assert weights.alone == found.everything and found.everything.delta == pytest.approx(
        mean_delta(trainer, out.rollout_logp, out), rel=1e-4
    )
    assert (
        weights.left_out.delta < 1e-6 and diagnose.floor(found) < 1e-6 < 1e-3 < weights.alone.delta
    )
    assert [effect.source for effect in found.noise] == [
        "trainer",
        "batch composition",
        "exact engine",
    ]
    assert found.agreement <= 1e-5 and found.tokens == out.lengths.sum()
    assert "largest source is weights (int4, a scale per channel): alone" in diagnose.verdict(found)
    assert "(100%)" in diagnose.verdict(found)


def test_a_layer_is_the_trainers_forward_pass_with_that_layer_rounded():
    """An independent way to the same number: the stacked parameters are rounded by NumPy and scored
    by the trainer.
    """
    _, _, policy, found = case()
    out, score, trainer = again()
    contracted = {
        "q_proj": 0,
        "k_proj": 0,
        "v_proj": 0,
        "o_proj": (0, 1),
        "gate_proj": 0,
        "up_proj": 0,
        "down_proj": 0,
    }
    for layer, gap in enumerate(found.layers):
        params = jax.tree.map(np.array, policy.params)
        for part in ("attention", "mlp"):
            for name, w in params["stacks"][0][part].items():
                if name in contracted:
                    scale = abs(w[layer]).max(axis=contracted[name], keepdims=True) / 7
                    w[layer] = np.round(w[layer] / scale) * scale
        assert gap.delta == pytest.approx(mean_delta(trainer, score(params, out, 0), out), rel=1e-3)
    assert len(found.layers) == 2 and min(gap.delta for gap in found.layers) > 1e-3


def test_the_support_is_blamed_for_what_it_cuts():
    """Renormalising over a support of mass `kept` multiplies every probability by 1 / kept."""
    _, _, _, found = case(SUPPORT, staleness=True)
    out, _, trainer = again(SUPPORT)
    support = next(effect for effect in found.effects if effect.source == "support")
    mask = parity.token_mask(out)
    expected = (np.exp(trainer[mask].astype(float)) * (1 / out.support_mass[mask] - 1)).mean()
    assert support.alone.delta == pytest.approx(expected, rel=1e-3) and expected > 1e-2
    assert any("measure delta before the cut" in note for note in diagnose.notes(found))
    assert (
        support.setting == "top_p 0.7"
        and support.left_out.delta < 1e-6
        and support.alone == found.everything
    )


def test_staleness_is_the_newer_trainer_against_the_older_weights():
    """Beside everything: delta is measured at the weights that sampled."""
    _, _, policy, found = case(SUPPORT, staleness=True)
    out, score, trainer = again(SUPPORT)
    stale = next(effect for effect in found.effects if effect.source == "staleness")
    newer = score(jax.tree.map(lambda w: 1.1 * w, policy.params), out, 0)
    assert stale.alone.delta == pytest.approx(mean_delta(newer, trainer, out), rel=1e-4)
    assert (
        stale.left_out is None
        and stale.setting == "weights of step 3 against step 7"
        and len(found.effects) == 2
    )


@pytest.mark.slow
def test_every_property_of_an_engine_is_blamed_apart():
    """All at once, in a mixture of experts: each shows alone, and leaving it out changes the whole."""
    _, _, _, found = case(tuple((MANY | THREE | {"model.architecture.num_layers": 1}).items()))
    assert {effect.source for effect in found.effects} == set(diagnose.PROPERTIES)
    noise = diagnose.floor(found)
    for effect in found.effects:
        assert effect.alone.delta > 3 * noise, effect.source
        assert effect.left_out.delta != found.everything.delta, effect.source
    first = found.effects[0]
    assert first.source == "experts per token" and first.left_out.delta < found.everything.delta
    assert found.agreement <= 1e-5


@pytest.mark.slow
def test_probes_show_what_is_exact_in_the_engine():
    _, _, _, found = case(tuple((FLOAT | THREE).items()), probe=True)
    assert {effect.source for effect in found.effects} == set(diagnose.PROPERTIES)
    assert all(
        effect.left_out is None and effect.setting.endswith(", a probe") for effect in found.effects
    )
    assert min(effect.alone.delta for effect in found.effects) > 3 * diagnose.floor(found)
    assert len(found.layers) == 2 and found.layer_setting == "int8, a scale per channel"
    assert found.everything.delta < 1e-6


def test_properties_are_switched_one_at_a_time():
    dense = tiny().model.architecture
    configured = Precision(weights="int4", group=32, cache="int8", router="bfloat16")
    assert list(diagnose.properties(configured, dense, False)) == [
        (
            "weights",
            "int4, a scale per 32 inputs",
            Precision(weights="int4", group=32),
            Precision(cache="int8", router="bfloat16"),
        ),
        (
            "KV cache",
            "int8",
            Precision(cache="int8"),
            Precision(weights="int4", group=32, router="bfloat16"),
        ),
    ]
    probed = [name for name, *_ in diagnose.properties(configured, dense, True)]
    assert probed == ["weights", "activations", "KV cache", "embedding", "head", "norms"]


def test_figures_are_their_definitions():
    """The standard error treats a prompt as one observation: K/(K-1) sum of (n_k/n)^2 (mean_k -
    mean)^2.
    """
    out, _, trainer = again()
    engine = (trainer + np.random.default_rng(0).normal(size=trainer.shape) / 10).astype(np.float32)
    found = diagnose.measure(trainer, engine, out)
    mask = parity.token_mask(out)
    delta = np.where(
        mask, abs(np.exp(trainer.astype(float)) - np.exp(engine.astype(float))), 0
    ).reshape(4, -1)
    counts = mask.reshape(4, -1).sum(axis=1)
    error = (
        np.sqrt(4 / 3 * ((delta.sum(axis=1) - counts * delta.sum() / counts.sum()) ** 2).sum())
        / counts.sum()
    )
    difference = (trainer.astype(float) - engine)[mask]
    expected = (
        delta.sum() / counts.sum(),
        error,
        abs(difference).mean(),
        abs(difference).max(),
        (np.exp(difference) - 1 - difference).mean(),
        (abs(np.exp(difference) - 1) > 0.2).mean(),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert dcmdp(command("diagnose", tmp_path, **SMALL | {"data.prompts_per_step": 1})) == 2
    assert (
        capsys.readouterr().err
        == "dcmdp: data.prompts_per_step=1 gives no standard error; set 2 or more\n"
    )
    run, inputs, policy, _ = case()
    broken = policy._replace(
        params=policy.params | {"final_norm": policy.params["final_norm"] * np.nan}
    )
    with pytest.raises(ValueError, match="the engine is given weights that hold NaN"):
        diagnose.diagnose(run, read_inputs(run, ONE_DEVICE), broken)


def test_the_command(tmp_path, capsys):
    """An exact engine on a run of two checkpoints: nothing but staleness is blamed, and three files
    are written.
    """
    run = tiny(**SMALL | FLOAT)
    make_run(tmp_path, run, (1, 2))
    (tmp_path / "config.json").write_text(json.dumps(to_json(run)))
    before = {path.name for path in tmp_path.iterdir()}
    assert dcmdp(["diagnose", command("diagnose", tmp_path)[1], "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith(f"checkpoint 2 of {tmp_path}\nsource ")
        and "weights of step 1 against step 2" in out
    )
    assert "The engine is exact but for it." in out and "The support is left out" in out
    assert {path.name for path in tmp_path.iterdir()} - before == {
        "diagnose.html",
        "diagnose.json",
        "diagnose.svg",
    }
    record = json.loads((tmp_path / "diagnose.json").read_text())
    assert [source["source"] for source in record["sources"]] == ["staleness"] and record["layers"][
        "gaps"
    ] == []


def test_what_is_written_down(tmp_path):
    run, _, _, found = case()
    page = diagnose.write(found, run, tmp_path / "new")
    record = json.loads((tmp_path / "new" / "diagnose.json").read_text())
    assert record["everything"]["delta"] == found.everything.delta and record[
        "noise_floor"
    ] == diagnose.floor(found)
    (weights,) = record["sources"]
    assert weights["alone"] == record["everything"] and weights["left_out"]["delta"] < 1e-6
    assert [gap["delta"] for gap in record["layers"]["gaps"]] == [gap.delta for gap in found.layers]
    assert "Staleness is left out: there is no older checkpoint." in record["notes"]
    text = page.read_text(encoding="utf-8")
    assert diagnose.verdict(found) in text and "<script" not in text and "src=" not in text
    assert (tmp_path / "new" / "diagnose.svg").read_text() in text
    for line in diagnose.table(found)[1:]:
        assert all(cell in text for cell in line)


def test_bars_end_where_their_values_say():
    """Read off the drawing: powers of ten are evenly spaced on one chart, round numbers on the
    other.
    """
    rows = [
        bar_chart.Bar("a<b", "note", 3e-3, 1e-3, line_chart.ENGINE, 2e-5),
        bar_chart.Bar("b", "", 0.0, 0.0, line_chart.FAINT),
    ]
    both = [bar_chart.Chart("one", rows, 1e-6, True), bar_chart.Chart("two", rows, 1e-6, False)]
    logarithmic, linear = xml.fromstring(bar_chart.draw(both, ("legend",))).findall("{*}g")
    for drawn, scale, ticks in (
        (logarithmic, np.log10, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
        (linear, float, [0, 0.001, 0.002, 0.003, 0.004]),
    ):
        labels = [text for text in drawn.findall("{*}text") if text.get("text-anchor") == "middle"]
        assert [float(text.text) for text in labels] == ticks
        x = [float(text.get("x")) for text in labels]

        def value(place):
            return scale(ticks[0]) + (scale(ticks[-1]) - scale(ticks[0])) * (place - x[0]) / (
                x[-1] - x[0]
            )

        first, empty = (rect for rect in drawn.findall("{*}rect") if rect.get("height") == "12")
        unit = (scale(ticks[-1]) - scale(ticks[0])) / (x[-1] - x[0])  # coordinates have one decimal
        assert value(bar_chart.LEFT + float(first.get("width"))) == pytest.approx(
            scale(3e-3), abs=unit
        )
        assert float(empty.get("width")) == 0 and value(
            float(drawn.find("{*}circle").get("cx"))
        ) == pytest.approx(scale(2e-5), abs=unit)
        whisker = next(
            path.get("d") for path in drawn.findall("{*}path") if path.get("stroke") == "#1e293b"
        )
        ends = [
            value(float(place)) for place in re.fullmatch(r"M(\S+) \S+H(\S+)", whisker).groups()
        ]
        assert ends == pytest.approx([scale(2e-3), scale(4e-3)], abs=unit)
        assert "a<b" in [text.text for text in drawn.findall("{*}text")]


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 0.37])
def test_odd_values_can_be_drawn(value):
    for logarithmic in (True, False):
        chart = bar_chart.Chart(
            "t", [bar_chart.Bar("a", "", value, 0.0, line_chart.ENGINE)], 0.0, logarithmic
        )
        xml.fromstring(bar_chart.draw([chart], ()))
