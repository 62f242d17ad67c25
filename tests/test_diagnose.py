"""Attribution: all engines decode the same tokens, and each source is what its definition says."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from dcmdp_jax.batches import make_sampler
from dcmdp_jax.config import Precision
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.run.record import to_json
from dcmdp_jax.tools import diagnose, diagnose_page, parity
from support.mismatch import EXPERTS, FLOAT, command, make_run, sampled, sharp, tiny
from support.training import ONE_DEVICE, QUICKSTART, dcmdp

pytestmark = pytest.mark.full

SMALL = {
    "rollout.samples": 3,
    "rollout.slots": 5,
    "rollout.tokens_per_dispatch": 5,
    "algorithm.minibatches": 1,
    "rollout.max_tokens": 10,
}  # 16 positions: one window to compile
ALL_ROUNDED = {
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
THREE_EXPERTS = EXPERTS | {"model.architecture.experts_per_token": 3}
ONE_LAYER = THREE_EXPERTS | {"model.architecture.num_layers": 1}
TOP_P = tuple({**FLOAT, "rollout.top_p": 0.7}.items())


def prepare(changes=()):
    """Returns a run, its inputs on one device, and weights."""
    run = tiny(**SMALL | dict(changes))
    inputs = read_inputs(run, ONE_DEVICE)
    return run, inputs, sharp(inputs.model_config)


@functools.cache
def attribution(changes=(), probe=False, staleness=False):
    run, inputs, weights = prepare(changes)
    other = None
    if staleness:
        newer = jax.tree.map(lambda w: 1.1 * w, weights.params)
        other = parity.TrainerWeights(newer, 7, "later")
    return diagnose.diagnose(run, inputs, weights, other, probe=probe)


@functools.cache
def scored(changes=()):
    """Returns the rollout that `attribution` is about, the trainer's scoring and its log-probs."""
    run, inputs, weights = prepare(changes)
    score = parity.scorer(run, inputs)
    rollout = sampled(run, inputs, weights)
    return rollout, score, score(weights.params, rollout, 0)


def mean_delta(logp, other, rollout):
    mask = parity.token_mask(rollout)
    return abs(np.exp(logp.astype(float)) - np.exp(other.astype(float)))[mask].mean()


@pytest.mark.parametrize("order", [None, np.arange(12)[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize(
    "changes",
    [FLOAT, {"rollout.top_p": 0.95}, ALL_ROUNDED | THREE_EXPERTS],
    ids=["float32", "int4", "moe"],
)
def test_a_replay_repeats_what_the_engine_reported(changes, order):
    """To 1e-5 nats, with slots that are used again, different lengths and other neighbours."""
    run, inputs, weights = prepare(changes)
    rollout = sampled(run, inputs, weights)
    sampler = make_sampler(run, inputs)
    sampler.update_weights(weights.params, weights.version)
    mass = np.where(parity.token_mask(rollout), rollout.support_mass, 1)
    assert run.rollout.precision.experts_per_token or len(set(rollout.lengths)) > 2
    assert (run.rollout.top_p == 1) == (mass.min() == 1)
    replayed = replay(sampler.engine, sampler.weights, rollout, order)
    np.testing.assert_allclose(replayed, rollout.rollout_logp + np.log(mass), atol=1e-5, rtol=0)


def test_the_only_rounded_property_is_the_total():
    rollout, _, trainer_logp = scored()
    result = attribution()
    (weights,) = result.sources
    expected = mean_delta(trainer_logp, rollout.rollout_logp, rollout)
    assert (weights.name, weights.setting) == ("weights", "int4, a scale per channel")
    assert weights.alone == result.total
    assert result.total.delta == pytest.approx(expected, rel=1e-4)
    assert weights.left_out.delta < 1e-6 < 1e-3 < weights.alone.delta


def test_noise_is_round_off():
    result = attribution()
    assert diagnose.noise_floor(result) < 1e-6 and result.replay_error <= 1e-5
    assert [source.name for source in result.noise] == [
        "trainer",
        "batch composition",
        "exact engine",
    ]


def test_weights_are_converted_for_the_rollout_and_for_the_exact_engine_alone(monkeypatch):
    converted = []
    update_weights = JetStreamSampler.update_weights

    def counted(*args):
        converted.append(args)
        update_weights(*args)

    monkeypatch.setattr(JetStreamSampler, "update_weights", counted)
    diagnose.diagnose(*prepare(FLOAT))
    assert len(converted) == 2


def test_all_sampled_tokens_are_counted():
    rollout, _, _ = scored()
    assert attribution().tokens == rollout.lengths.sum()


def test_a_layer_is_the_trainers_forward_pass_with_that_layer_rounded():
    """An independent way to the same number: NumPy rounds the stacked parameters, and the trainer
    scores with them.
    """
    _, _, weights = prepare()
    rollout, score, trainer_logp = scored()
    contracted = {
        "q_proj": 0,
        "k_proj": 0,
        "v_proj": 0,
        "o_proj": (0, 1),
        "gate_proj": 0,
        "up_proj": 0,
        "down_proj": 0,
    }
    layers = attribution().layers
    assert len(layers) == 2 and min(gap.delta for gap in layers) > 1e-3
    for layer, gap in enumerate(layers):
        params = jax.tree.map(np.array, weights.params)
        for part in ("attention", "mlp"):
            for name, w in params["stacks"][0][part].items():
                if name in contracted:
                    scale = abs(w[layer]).max(axis=contracted[name], keepdims=True) / 7
                    w[layer] = np.round(w[layer] / scale) * scale
        rounded_logp = score(params, rollout, 0)
        expected = mean_delta(trainer_logp, rounded_logp, rollout)
        assert gap.delta == pytest.approx(expected, rel=1e-3)


def test_the_support_is_what_it_cuts():
    """Renormalising over a support of mass m multiplies every probability by 1 / m."""
    result = attribution(TOP_P, staleness=True)
    rollout, _, trainer_logp = scored(TOP_P)
    support = next(source for source in result.sources if source.name == "support")
    mask = parity.token_mask(rollout)
    probabilities = np.exp(trainer_logp[mask].astype(float))
    expected = (probabilities * (1 / rollout.support_mass[mask] - 1)).mean()
    assert support.alone.delta == pytest.approx(expected, rel=1e-3) and expected > 1e-2
    assert support.setting == "top_p 0.7" and support.alone == result.total
    assert support.left_out.delta < 1e-6


def test_staleness_is_the_newer_trainer_against_the_older_weights():
    _, _, weights = prepare(TOP_P)
    result = attribution(TOP_P, staleness=True)
    rollout, score, trainer_logp = scored(TOP_P)
    stale = next(source for source in result.sources if source.name == "staleness")
    newer_logp = score(jax.tree.map(lambda w: 1.1 * w, weights.params), rollout, 0)
    expected = mean_delta(newer_logp, trainer_logp, rollout)
    assert stale.alone.delta == pytest.approx(expected, rel=1e-4)
    assert stale.setting == "weights of step 3 against step 7"
    assert stale.left_out is None, "it is no part of the engine"


@pytest.mark.slow
def test_every_rounded_property_has_an_effect_of_its_own():
    """All at once, in a mixture of experts: each shows alone, and making it exact changes the
    total.
    """
    result = attribution(tuple((ALL_ROUNDED | ONE_LAYER).items()))
    assert {source.name for source in result.sources} == set(diagnose.PROPERTIES)
    noise = diagnose.noise_floor(result)
    for source in result.sources:
        assert source.alone.delta > 3 * noise, source.name
        assert source.left_out.delta != result.total.delta, source.name
    first = result.sources[0]
    assert first.name == "experts per token" and first.left_out.delta < result.total.delta
    assert result.replay_error <= 1e-5


@pytest.mark.slow
def test_probes_measure_properties_that_the_engine_has_exact():
    result = attribution(tuple((FLOAT | ONE_LAYER).items()), probe=True)
    assert {source.name for source in result.sources} == set(diagnose.PROPERTIES)
    assert all(source.left_out is None for source in result.sources)
    assert all(source.setting.endswith(", a probe") for source in result.sources)
    smallest = min(source.alone.delta for source in result.sources)
    assert smallest > 3 * diagnose.noise_floor(result)
    assert len(result.layers) == 1 and result.layer_setting == "int8, a scale per channel"
    assert result.total.delta < 1e-6


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


def test_probes_are_of_properties_that_the_model_has():
    dense = tiny().model.architecture
    configured = Precision(weights="int4", group=32, cache="int8", router="bfloat16")
    probed = [name for name, *_ in diagnose.properties(configured, dense, True)]
    assert probed == ["weights", "activations", "KV cache", "embedding", "head", "norms"]


def test_differences_are_their_definitions():
    """The standard error treats a prompt as one observation: K/(K-1) sum of (n_k/n)^2 (mean_k -
    mean)^2.
    """
    rollout, _, trainer_logp = scored()
    noise = np.random.default_rng(0).normal(size=trainer_logp.shape) / 10
    engine_logp = (trainer_logp + noise).astype(np.float32)
    mask = parity.token_mask(rollout)
    trainer64 = trainer_logp.astype(float)
    delta = np.where(mask, abs(np.exp(trainer64) - np.exp(engine_logp.astype(float))), 0)
    sums = delta.reshape(4, -1).sum(axis=1)
    counts = mask.reshape(4, -1).sum(axis=1)
    mean = sums.sum() / counts.sum()
    std_error = np.sqrt(4 / 3 * ((sums - counts * mean) ** 2).sum()) / counts.sum()
    diff = (trainer64 - engine_logp)[mask]
    expected = (
        mean,
        std_error,
        abs(diff).mean(),
        abs(diff).max(),
        (np.exp(diff) - 1 - diff).mean(),
        (abs(np.exp(diff) - 1) > 0.2).mean(),
    )
    result = diagnose.difference(trainer_logp, engine_logp, rollout)
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_a_single_prompt_is_refused(tmp_path, capsys):
    words = command("diagnose", tmp_path, **SMALL | {"data.prompts_per_step": 1})
    assert dcmdp(words) == 2
    message = "dcmdp: --data.prompts_per_step=1 gives no standard error; set 2 or more\n"
    assert capsys.readouterr().err == message


def test_another_sampler_is_refused():
    run = tiny(**SMALL)

    def black_box(config, model, tokenizer, mesh):
        raise AssertionError("it is not made")

    rollout = dataclasses.replace(run.rollout, sampler=black_box)
    message = "rollout.sampler=black_box is another one; measure its gap with dcmdp parity"
    with pytest.raises(ValueError, match=message):
        diagnose.check(dataclasses.replace(run, rollout=rollout))


def test_weights_that_are_not_finite_are_refused():
    run, inputs, weights = prepare()
    params = weights.params | {"final_norm": weights.params["final_norm"] * np.nan}
    with pytest.raises(ValueError, match="the engine is given weights that hold NaN"):
        diagnose.diagnose(run, inputs, weights._replace(params=params))


def test_the_command_compares_the_checkpoints_of_an_exact_engine(tmp_path, capsys):
    """Nothing but staleness is a source."""
    run = tiny(**SMALL | FLOAT)
    make_run(tmp_path, run, (1, 2))
    (tmp_path / "config.json").write_text(json.dumps(to_json(run)))
    words = ["diagnose", QUICKSTART, "--workdir", str(tmp_path)]
    assert dcmdp(words) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"checkpoint 2 of {tmp_path}\nsource ")
    assert "weights of step 1 against step 2" in output
    assert "The engine is exact up to the noise." in output
    assert "The support is left out" in output
    record = json.loads((tmp_path / "diagnose.json").read_text())
    assert [source["source"] for source in record["sources"]] == ["staleness"]
    assert record["layers"]["gaps"] == []


# The page


@pytest.fixture
def written(tmp_path):
    """The folder of the page of `attribution()`; it is made."""
    diagnose_page.write(attribution(), tiny(**SMALL), tmp_path / "new")
    return tmp_path / "new"


def test_three_files_are_written(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"diagnose.html", "diagnose.json", "diagnose.svg"}


def test_the_record_holds_the_figures(written):
    result = attribution()
    record = json.loads((written / "diagnose.json").read_text())
    assert record["total"]["delta"] == result.total.delta
    assert record["noise_floor"] == diagnose.noise_floor(result)
    (weights,) = record["sources"]
    assert weights["alone"] == record["total"] and weights["left_out"]["delta"] < 1e-6
    layers = [gap.delta for gap in result.layers]
    assert [gap["delta"] for gap in record["layers"]["gaps"]] == layers


def test_the_page_shows_verdict_table_and_picture_without_scripts(written):
    page = (written / "diagnose.html").read_text(encoding="utf-8")
    assert diagnose_page.verdict(attribution()) in page
    assert (written / "diagnose.svg").read_text() in page
    for row in diagnose_page.table(attribution())[1:]:
        assert all(cell in page for cell in row)
    assert "<script" not in page and "src=" not in page


def test_the_verdict_names_the_largest_source():
    verdict = diagnose_page.verdict(attribution())
    assert "largest source is weights (int4, a scale per channel): alone" in verdict
    assert "(100%)" in verdict


def test_notes_name_what_is_left_out():
    assert "Staleness is left out: there is no older checkpoint." in diagnose_page.notes(
        attribution()
    )


def test_notes_say_where_the_support_counts():
    notes = diagnose_page.notes(attribution(TOP_P, staleness=True))
    assert any("measure delta before the cut" in note for note in notes)
