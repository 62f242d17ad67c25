"""What reported log-probs are of: every mistake, made on purpose, is named, and none without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_meaning as meaning
from dcmdp_jax.rollout import log_prob_mixture, log_prob_scorer, log_prob_values
from dcmdp_jax.rollout import sampling as draw
from dcmdp_jax.rollout.log_prob_meaning import judge
from dcmdp_jax.rollout.log_prob_readings import Reading
from dcmdp_jax.rollout.log_prob_scorer import fields
from support.engines import DENSE, G, make_params, sample
from support.random_params import random_params

pytestmark = pytest.mark.full

BOS = 36  # of no completion here
NOISE = 0.06  # nats, for this flat model: a mean delta as of bfloat16 kernels, 5e-3
NOISES = pytest.mark.parametrize("noise", [0.0, NOISE], ids=["float32", "bfloat16-like"])
score = log_prob_scorer.scorer(make_params(DENSE), DENSE)


@functools.cache
def drawn(temperature=0.7, weights="float32", **cut):
    """Prompts and completions of a tiny engine, with the log-probs that it reports."""
    out = sample(DENSE, weights, temperature=temperature, **cut)
    prompts = [
        out.prompts.tokens[i // G, : out.prompts.lengths[i // G]] for i in range(len(out.tokens))
    ]
    rows = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)]
    logp = [row[:n].tolist() for row, n in zip(out.rollout_logp, out.lengths)]
    return [prompt.tolist() for prompt in prompts], rows, logp


def log_probs(prompts, tokens, sampling=Sampling(0.7), noise=0.0, params=None):
    """Returns what an engine with this prompt and distribution reports, a row a completion."""
    of = log_prob_scorer.scorer(params, DENSE) if params is not None else score
    (flat,) = of(prompts, tokens, fields([sampling]))
    flat = flat + noise * np.random.default_rng(0).normal(size=flat.shape)
    return np.split(flat, np.cumsum([len(row) for row in tokens])[:-1])


def mean_delta(a, b):
    return np.mean(np.abs(np.exp(np.concatenate(a)) - np.exp(np.concatenate(b))))


def test_the_noise_is_as_large_as_that_of_bfloat16_kernels():
    prompts, tokens, logp = drawn()
    assert 3e-3 < mean_delta(log_probs(prompts, tokens, noise=NOISE), logp) < 8e-3


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.0), Sampling(0.7, 4), Sampling(0.7, 0, 0.8), Sampling(1, 0, 1, 0.1)],
    ids=str,
)
@NOISES
def test_a_gap_that_is_numerical_is_called_so(sampling, noise):
    prompts, tokens, logp = drawn(**sampling._asdict())
    rng = np.random.default_rng(1)
    logp = [np.array(row) + noise * rng.normal(size=len(row)) for row in logp]
    verdict = judge(prompts, tokens, logp, score, sampling=sampling, bos_id=BOS)
    assert verdict.name == "as stated"
    assert verdict.best == verdict.stated


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_an_int8_engine_is_as_stated(temperature):
    prompts, tokens, logp = drawn(temperature, weights="int8")
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(temperature), bos_id=BOS)
    assert verdict.name == "as stated"
    assert 1e-4 < verdict.stated.error < meaning.NUMERICAL


def test_raw_and_processed_are_one_at_temperature_1():
    prompts, tokens, logp = drawn(1.0, weights="int8")
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(), reported=Sampling())
    assert verdict.name == "as stated"
    assert not {"raw log-probs", "processed log-probs"} & {t.reading.name for t in verdict.tried}


@pytest.mark.parametrize(
    "name, sampling, of",
    [
        ("temperature not sent", Sampling(0.7), Sampling()),
        ("support not renormalised", Sampling(0.7, 4), Sampling(0.7)),
        ("temperature not applied", Sampling(0.7, 4), Sampling(1.0, 4)),
        ("temperature applied twice", Sampling(0.7), Sampling(0.49)),
        ("temperature inverted", Sampling(0.7), Sampling(1 / 0.7)),
        ("another temperature", Sampling(1.0), Sampling(0.8)),
        ("support cut", Sampling(0.7), Sampling(0.7, 0, 0.8)),
        ("other sampling settings", Sampling(1.0), Sampling(0.6, 5, 0.95)),
    ],
)
@NOISES
def test_another_distribution_is_named(name, sampling, of, noise):
    prompts, tokens, _ = drawn(**of._asdict())
    logp = log_probs(prompts, tokens, of, noise)
    others = {"the model's generation_config.json": Sampling(0.6, 5, 0.95)}
    verdict = judge(prompts, tokens, logp, score, sampling=sampling, other_samplings=others)
    assert verdict.name == name
    assert verdict.best.error < noise + 1e-3


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, 0, 0.8)], ids=str)
@NOISES
def test_raw_log_probs_of_tokens_that_were_drawn_as_stated_are_named(sampling, noise):
    prompts, tokens, _ = drawn(**sampling._asdict())
    logp = log_probs(prompts, tokens, Sampling(), noise)
    verdict = judge(prompts, tokens, logp, score, sampling=sampling)
    assert verdict.name == "raw log-probs"


@NOISES
def test_processed_log_probs_that_are_said_to_be_raw_are_named(noise):
    prompts, tokens, _ = drawn(0.7)
    logp = log_probs(prompts, tokens, Sampling(0.7), noise)
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7), reported=Sampling())
    assert verdict.name == "processed log-probs"


def test_a_fitted_temperature_is_that_of_the_engine():
    prompts, tokens, _ = drawn(1.0)
    logp = log_probs(prompts, tokens, Sampling(1.17), NOISE)
    verdict = judge(prompts, tokens, logp, score)
    assert verdict.best.reading.sampling.temperature == pytest.approx(1.17, rel=0.03)


PROMPTS = {
    "BOS added": lambda ids: [BOS, *ids],
    "BOS missing": lambda ids: ids[1:],
    "first prompt token missing": lambda ids: ids[1:],
    "last prompt token missing": lambda ids: ids[:-1],
    "padding recorded": lambda ids: ids[3:],
    "other prompt: its text was tokenized again": lambda ids: [(3 * i + 5) % 35 for i in ids],
    "other prompt: it was put into the chat template": lambda ids: [30, 31, *ids, 32],
}


@pytest.mark.parametrize("name", PROMPTS)
@NOISES
def test_another_prompt_is_named(name, noise):
    prompts, tokens, _ = drawn(0.7)
    begin = {"BOS missing": [BOS], "padding recorded": [2, 2, 2]}.get(name, [])
    prompts = [[*begin, *ids] if begin else [*ids, 7] for ids in prompts]
    logp = log_probs([PROMPTS[name](ids) for ids in prompts], tokens, noise=noise)
    others = {other.removeprefix("other prompt: "): PROMPTS[other] for other in list(PROMPTS)[-2:]}
    verdict = judge(
        prompts, tokens, logp, score, sampling=Sampling(0.7), bos_id=BOS, other_prompts=others
    )
    assert verdict.name == name


VALUES = {
    "log of base 10": lambda row: row / np.log(10),
    "log of base 2": lambda row: row / np.log(2),
    "probabilities": lambda row: np.minimum(np.exp(row), 1),
    "sign": lambda row: np.maximum(-row, 0),
    "shifted: next token": lambda row: np.append(row[1:], 0.0),
    "shifted: previous token": lambda row: np.append(0.0, row[:-1]),
}


@pytest.mark.parametrize("name", VALUES)
@NOISES
def test_another_unit_or_place_is_named(name, noise):
    prompts, tokens, _ = drawn(0.7)
    logp = [VALUES[name](row) for row in log_probs(prompts, tokens, noise=noise)]
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7), bos_id=BOS)
    assert verdict.name == name


def test_two_mistakes_at_once_are_both_named():
    prompts, tokens, _ = drawn(0.7)
    logp = log_probs([[BOS, *ids] for ids in prompts], tokens, Sampling(), NOISE)
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7), bos_id=BOS)
    assert verdict.name == "raw log-probs, BOS added"


@pytest.mark.parametrize(
    "clip",
    [lambda row: np.maximum(row, -1.5), lambda row: np.where(row < -1.5, -9999.0, row)],
    ids=["floor", "placeholder"],
)
@NOISES
def test_clipped_values_are_named(clip, noise):
    prompts, tokens, _ = drawn(0.7)
    logp = [clip(row) for row in log_probs(prompts, tokens, noise=noise)]
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7))
    assert verdict.name == "clipped values"
    low = sum(np.sum(row <= -1.5) for row in logp)
    assert f"{low} of " in verdict.sentence


@NOISES
def test_equal_completions_of_a_prompt_have_no_floor(noise):
    """A greedy engine gives one completion for all samples of a prompt, and the same log-probs."""
    prompts, tokens, _ = drawn(0.7)
    each = slice(0, 4 * G, G)
    logp = log_probs(prompts[each], tokens[each], Sampling(), noise)
    verdict = judge(prompts[each] * 8, tokens[each] * 8, logp * 8, score)
    assert verdict.name == "as stated"


def left_out(tokens, values, trainer):
    prompts = [[1]] * len(tokens)
    return log_prob_values.left_out(prompts, tokens, np.array(values), np.array(trainer))


@pytest.mark.parametrize("contexts, is_floor", [(2, False), (3, True)])
def test_a_floor_is_shared_by_three_contexts(contexts, is_floor):
    """The least value stands beside the last token of each, twice."""
    tokens = [[5, 6 + i, 7] for i in range(contexts)] * 2
    values = np.array([-0.1237 * (1 + i % 13) for i in range(3 * len(tokens))])
    values[2::3] = -3.14159
    found = left_out(tokens, values, values).floor
    assert found.tolist() == [is_floor and i % 3 == 2 for i in range(len(values))]


def test_a_least_value_that_round_off_explains_is_no_floor():
    """Log-probs of an engine that is sure of every token: 0 or one float32 step below it."""
    values = [0.0, -1.1920929e-07] * 8
    assert not left_out([[i, i + 1] for i in range(8)], values, values).any.any()


@pytest.mark.parametrize("trainer, is_filled", [(-0.5, False), (-2.0, True)])
def test_a_log_prob_of_0_is_a_filling_where_the_token_is_unlikely(trainer, is_filled):
    """At -0.5 it may be of a token that a cut leaves alone."""
    tokens = [[5, 6 + i, 7] for i in range(8)]
    values = np.array([-0.1237 * (1 + i) for i in range(24)])
    values[2::3] = 0.0
    beside = np.where(values == 0, trainer, values)
    found = left_out(tokens, values, beside).filled
    assert found.tolist() == [is_filled and i % 3 == 2 for i in range(24)]


def test_a_number_that_one_token_in_fifty_shares_is_a_filling():
    tokens = [list(range(i, i + 20)) for i in range(10)]
    values = np.array([-0.0137123 * (8 + i) for i in range(200)])
    values[[5, 65, 125]] = -1.0
    assert not left_out(tokens, values, values).any.any()
    values[185] = -1.0
    found = left_out(tokens, values, values)
    assert not found.floor.any() and np.flatnonzero(found.filled).tolist() == [5, 65, 125, 185]


@pytest.mark.parametrize("filling", [0.0, -1.0])
@NOISES
def test_padding_that_was_left_in_is_named(filling, noise):
    """As verl pads with -1 and TRL with 0."""
    prompts, tokens, _ = drawn(0.7)
    logp = log_probs(prompts, tokens, noise=noise)
    padded = [[*row, *[2] * (24 - len(row))] for row in tokens]
    logp = [np.append(row, np.full(24 - len(row), filling)) for row in logp]
    verdict = judge(prompts, padded, logp, score, sampling=Sampling(0.7), bos_id=BOS)
    assert verdict.name == "filled values"
    assert verdict.tokens >= sum(map(len, tokens))
    assert verdict.stated.error < noise + 1e-3


def test_padding_and_raw_log_probs_are_both_said():
    prompts, tokens, _ = drawn(0.7)
    logp = log_probs(prompts, tokens, Sampling(), NOISE)
    padded = [[*row, *[2] * (24 - len(row))] for row in tokens]
    logp = [np.append(row, np.full(24 - len(row), -1.0)) for row in logp]
    verdict = judge(prompts, padded, logp, score, sampling=Sampling(0.7))
    assert verdict.name == "raw log-probs"
    assert "numbers are a constant" in verdict.sentence and "padding" in verdict.remedy


@pytest.mark.parametrize(
    "constant, said",
    [(lambda row: 0.0, "the number 0:"), (np.mean, "one number, which differs")],
    ids=["nothing recorded", "mean of the completion"],
)
def test_one_number_for_a_completion_is_named(constant, said):
    prompts, tokens, _ = drawn(0.7)
    logp = [np.full(len(row), constant(row)) for row in log_probs(prompts, tokens)]
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7))
    assert verdict.name == "constant values"
    assert said in verdict.sentence


@NOISES
def test_logits_are_no_log_probs(noise):
    prompts, tokens, _ = drawn(0.7)
    rng = np.random.default_rng(0)
    logp = log_probs(prompts, tokens, Sampling(), noise)
    verdict = judge(
        prompts, tokens, [row + rng.normal(4, 1, len(row)) for row in logp], score, bos_id=BOS
    )
    assert verdict.name == "no log-probs"
    assert "processed_logits" in verdict.remedy and not verdict.is_explained


# Completions that differ from the others


def third(rows, others):
    """Every third row is of `others`."""
    return [other if i % 3 == 0 else row for i, (row, other) in enumerate(zip(rows, others))]


def long_thirds(tokens):
    return tuple(i for i in range(0, len(tokens), 3) if len(tokens[i]) >= 8)


@pytest.mark.parametrize("raw_third", [True, False])
@NOISES
def test_raw_log_probs_of_some_completions_are_named(raw_third, noise):
    prompts, tokens, _ = drawn(0.5)
    rows = log_probs(prompts, tokens, Sampling(0.5), noise)
    raw = log_probs(prompts, tokens, Sampling(), noise)
    logp = third(rows, raw) if raw_third else third(raw, rows)
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.5), bos_id=BOS)
    assert verdict.name == "mixed: raw log-probs"
    assert set(verdict.odd) <= set(long_thirds(tokens)) and len(verdict.odd) >= 3
    assert ("are as stated; of the others" in verdict.sentence) != raw_third
    assert not verdict.is_explained


@NOISES
def test_other_weights_of_some_completions_are_named(noise):
    prompts, tokens, _ = drawn(0.7)
    other = random_params(DENSE, 0.16, norms=1.0, seed=9)
    logp = log_probs(prompts, tokens, noise=noise)
    stale = log_probs(prompts, tokens, noise=noise, params=other)
    verdict = judge(prompts, tokens, third(logp, stale), score, sampling=Sampling(0.7), bos_id=BOS)
    assert verdict.name == "mixed: other weights"
    assert set(verdict.odd) <= set(long_thirds(tokens)) and len(verdict.odd) >= 3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_coarse_engine_is_not_mixed(weights):
    prompts, tokens, logp = drawn(0.7, weights=weights)
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7), bos_id=BOS)
    assert not verdict.odd


def odd(seed, sizes):
    """A quarter of the completions is unsure; gaps are of `sizes` [32] times 1 - p."""
    rng = np.random.default_rng(seed)
    p = np.where(np.arange(32) % 4 != 0, 0.98, 0.4)[:, None] + rng.uniform(-0.01, 0.01, (32, 16))
    gap = (sizes[:, None] * rng.normal(size=p.shape) * (1 - p)).ravel()
    stated = Reading((), 0, Sampling(), list, lambda x: x, 0)
    return log_prob_mixture.odd_completions([(stated, gap)], gap, np.log(p).ravel(), [16] * 32)


@pytest.mark.parametrize("seed", range(4))
def test_a_completion_is_not_odd_because_it_is_unsure(seed):
    assert odd(seed, np.full(32, 0.5)) is None
    others = np.where(np.arange(32) % 4 == 0, 1.0, 0.02)
    assert odd(seed, others).completions == tuple(range(0, 32, 4))


@pytest.mark.parametrize(
    "rounded, grid",
    [
        (lambda row: np.round(row, 1), "1 decimal"),
        (lambda row: row.astype(jnp.bfloat16).astype(float), "bfloat16"),
    ],
    ids=["decimals", "bfloat16"],
)
def test_rounded_values_are_named(rounded, grid):
    prompts, tokens, _ = drawn(0.7)
    logp = [rounded(row) for row in log_probs(prompts, tokens)]
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7))
    assert verdict.name == "rounded values"
    assert grid in verdict.sentence


def test_digits_that_do_not_matter_are_not_named():
    """Two decimal places are far finer than this engine's noise."""
    prompts, tokens, _ = drawn(0.7)
    logp = [np.round(row, 2) for row in log_probs(prompts, tokens, noise=NOISE)]
    assert judge(prompts, tokens, logp, score, sampling=Sampling(0.7)).name == "as stated"


def test_other_weights_are_named():
    prompts, tokens, _ = drawn(0.7)
    other = random_params(DENSE, 0.16, norms=1.0, seed=9)
    logp = log_probs(prompts, tokens, params=other)
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7), bos_id=BOS)
    assert verdict.name == "other weights"
    assert verdict.stated.error > meaning.NUMERICAL


def after_two_tokens(prompts, tokens, samplings):
    """Scores by a model whose next token depends on the last two alone."""
    rng = np.random.default_rng(5)
    table = 2 * rng.normal(size=(37, 37, 37)).astype(np.float32)
    rows = [
        table[tuple(zip(*pairs))]
        for prompt, completion in zip(prompts, tokens)
        if (ids := [0, *prompt, *completion])
        and (pairs := list(zip(ids, ids[1:]))[len(prompt) - 1 : len(ids) - 2])
    ]
    ids = jnp.asarray(np.concatenate(tokens))
    return np.asarray(jax.jit(log_prob_scorer.log_probs)(np.concatenate(rows), ids, samplings))


def test_another_prompt_that_nobody_thought_of_shows_in_the_first_tokens():
    """What the engine sampled makes up for the prompt after a while."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 37, 5).tolist() for _ in range(20)]
    tokens = [rng.integers(0, 37, 30).tolist() for _ in range(20)]
    others = [rng.integers(0, 37, 5).tolist() for _ in range(20)]
    (logp,) = after_two_tokens(others, tokens, fields([Sampling()]))
    logp = np.split(logp + NOISE * rng.normal(size=logp.shape), 20)
    assert judge(prompts, tokens, logp, after_two_tokens).name == "other prompt"


def test_a_few_tokens_are_too_few_to_tell():
    prompts, tokens, logp = drawn(0.7)
    verdict = judge(
        prompts[:3], [row[:5] for row in tokens[:3]], [row[:5] for row in logp[:3]], score
    )
    assert verdict.name == "cannot tell"


def test_tokens_without_a_log_prob_are_left_out():
    prompts, tokens, logp = drawn(0.7)
    logp = [[np.nan, *row[1:]] for row in logp]
    verdict = judge(prompts, tokens, logp, score, sampling=Sampling(0.7))
    assert verdict.name == "as stated"
    assert verdict.tokens == sum(map(len, tokens)) - len(tokens)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, t, r: (p[1:], t, r), "do not belong together"),
        (lambda p, t, r: ([[], *p[1:]], t, r), "prompt 0 is empty"),
        (lambda p, t, r: (p, t, [r[0][:-1], *r[1:]]), "one for each token"),
        (lambda p, t, r: (p, t, [[np.nan] * len(row) for row in r]), "no reported log-prob"),
    ],
    ids=["rows", "empty prompt", "lengths", "nothing reported"],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        judge(*change(*drawn(0.7)), score)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 3),
        Sampling(0.7, 0, 0.9),
        Sampling(0.7, 0, 1.0, 0.2),
        Sampling(0.7, 9, 0.8, 0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("likeliest", [4, 64, 1024])
def test_the_support_is_that_of_the_sampler(sampling, likeliest):
    """Where its end is looked for among the likeliest tokens, and where it lies past them."""
    rng = np.random.default_rng(3)
    logits = jnp.asarray(2 * rng.normal(size=(16, 500)), jnp.float32)
    each = Sampling(*(jnp.full(16, value) for value in sampling))
    ids = jnp.argmax(logits, axis=1)
    mass = draw.sample(logits, jnp.zeros((16, 2), jnp.uint32), each).support_mass
    full = jax.nn.log_softmax(logits / 0.7)[jnp.arange(16), ids]
    found = log_prob_scorer.log_probs(logits, ids, fields([sampling]), likeliest)[0]
    np.testing.assert_allclose(found, full - jnp.log(mass), atol=2e-5)


def test_sequences_of_all_lengths_are_scored_as_one_by_one():
    prompts, tokens, _ = drawn(0.7)
    together = log_prob_scorer.scorer(make_params(DENSE), DENSE, batch_tokens=64)
    logp = together(prompts, tokens, fields([Sampling(0.7), Sampling()]))
    ends = np.cumsum([0, *map(len, tokens)])
    for i in (0, 1, 4, len(tokens) - 1):
        alone = score([prompts[i]], [tokens[i]], fields([Sampling(0.7), Sampling()]))
        np.testing.assert_allclose(logp[:, ends[i] : ends[i + 1]], alone, atol=1e-5)
